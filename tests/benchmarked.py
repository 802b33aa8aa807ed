"""A program for `tests/tools/test_benchmark.py` to time: a batch is a sleep of known length."""

from __future__ import annotations

import sys
import time

from effnetv2_jax.benchmark.protocol import Program, Unavailable, Work, serve

SECONDS = {"ours": 0.02, "timm": 0.06, "torchvision": 0.06, "keras-tf": 0.01}


def prepare(name: str, work: Work) -> Program:
    """`torchvision` refuses, `keras-tf` ends at its second run, `flax` cannot be prepared."""
    print("what a library prints")
    if name == "torchvision":
        raise Unavailable(f"torchvision has no {work.variant}")
    seconds = SECONDS[name]
    ballast = bytearray(32 * 2**20) if name == "timm" else bytearray()
    runs = [0]

    def run(repetitions: int) -> None:
        runs[0] += 1
        if name == "keras-tf" and runs[0] == 3:
            sys.exit(3)
        assert ballast is not None  # Held until the end.
        for _ in range(repetitions):
            time.sleep(seconds)

    return Program(versions=f"{name} 1.0", device="sleep", run=run)


if __name__ == "__main__":
    serve(prepare)
