"""Speed on this machine's processor, by `tools.benchmark`."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from pathlib import Path

from effnetv2_jax.benchmark.protocol import Unavailable, Work
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.benchmark import Runner, compare

_RUNS, _SECONDS = 5, 2.0
_PEERS = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"


def _quantities(kind: str, variant: str, image_size: int, batch_size: int) -> dict[str, float]:
    threads = len(os.sched_getaffinity(0))
    work = Work(kind, variant, image_size, batch_size, threads=threads)
    (result,) = compare(work, runs=_RUNS, seconds=_SECONDS)
    return {
        "images/s": result.images_per_second,
        "images/s, lowest": result.lowest,
        "images/s, highest": result.highest,
        "batch size": batch_size,
        "cores": threads,
    }


def train_quantities(variant: str, image_size: int, batch_size: int) -> dict[str, float]:
    """Images a second of a whole train step, float32: the median of five runs."""
    return _quantities("train", variant, image_size, batch_size)


def inference_quantities(variant: str, image_size: int, batch_size: int) -> dict[str, float]:
    """Images a second from images to logits, float32: the median of five runs."""
    return _quantities("inference", variant, image_size, batch_size)


def latency_quantities(
    program: str,
    model: str,
    image_size: int,
    reference: tuple[str, int],
    *,
    batch_size: int = 16,
    rounds: int = 3,
) -> dict[str, float]:
    """Milliseconds from a batch of images to logits, float32, beside a network of timm.

    Args:
      program: `ours` or `timm`, see `tools.benchmark`.
      model: our name, or timm's own.
      image_size: pixels.
      reference: timm's name of a network and its image size. It runs in turn with the other, so
        that the ratio does not depend on how the machine drifts.
      batch_size: images.
      rounds: of both.

    Raises:
      InputError: a program cannot run, for instance because timm is not installed.
    """
    cores = sorted(os.sched_getaffinity(0))
    python = os.environ.get("PEERS", str(_PEERS) if _PEERS.exists() else sys.executable)

    def runner(name: str, variant: str, size: int) -> Runner:
        work = Work("inference", variant, size, batch_size, threads=len(cores))
        return Runner(name, work, cores, python)

    try:
        with (
            contextlib.closing(runner(program, model, image_size)) as measured,
            contextlib.closing(runner("timm", *reference)) as other,
        ):
            pairs = [(measured.seconds(1), other.seconds(1)) for _ in range(rounds)]
    except Unavailable as reason:
        raise InputError(
            f"{model} cannot be timed ({reason}): run `make .venv-peers/installed-peers`."
        ) from reason
    return {
        "ms": 1e3 * statistics.median(taken for taken, _ in pairs),
        "ms, lowest": 1e3 * min(taken for taken, _ in pairs),
        "ms, highest": 1e3 * max(taken for taken, _ in pairs),
        "time / V2-S": statistics.median(taken / beside for taken, beside in pairs),
        "image size, px": image_size,
        "batch size": batch_size,
        "cores": len(cores),
    }
