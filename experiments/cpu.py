"""Speed on this machine's processor, by `tools.benchmark`."""

from __future__ import annotations

import os

from effnetv2_jax.benchmark.protocol import Work
from effnetv2_jax.tools.benchmark import compare

_RUNS, _SECONDS = 5, 2.0


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
