"""Table 2: EfficientNet-B6 trained at 512 and at 380 px."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import counts, estimates
from experiments.experiment import (
    EXACT,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    shown,
)

VARIANT = "efficientnet-b6"
CONFIG = "configs/v1.py:b6"
OUT_OF_MEMORY = "out of memory"
# Table 2: (train size in px, images a core) -> images/s/core on TPUv3; NaN: out of memory.
PAPER = {(512, 32): 42.0, (512, 128): math.nan, (380, 32): 76.0, (380, 128): 93.0}
# Table 2: train size in px -> top-1 in %, images/s on a V100 with 12 and with 24 images.
PAPER_TOP1_AND_V100 = {512: (84.3, 29.0, math.nan), 380: (84.6, 37.0, 52.0)}
SIZES = tuple(PAPER_TOP1_AND_V100)
# The two cells of each ratio of speeds.
_RATIOS = {
    "380 px / 512 px, 32 images a core": ((380, 32), (512, 32)),
    "380 px and 128 images / 512 px and 32 images": ((380, 128), (512, 32)),
    "128 images / 32 images a core, 380 px": ((380, 128), (380, 32)),
}


def _at(image_size: int) -> str:
    return f"{VARIANT} at {image_size} px"


def _step(image_size: int, per_core: int) -> str:
    return f"{_at(image_size)}, {per_core} a core"


def items() -> Sequence[Item]:
    """Counts at both sizes, and the four train steps."""
    found = [
        Item(EXACT, _at(size), functools.partial(counts.quantities, VARIANT, size))
        for size in SIZES
    ]
    # Small programs first.
    for size, per_core in sorted(PAPER, key=lambda cell: cell[0] ** 2 * cell[1]):
        run = estimates.train_step(CONFIG, size, per_core)
        measure = functools.partial(estimates.step_quantities, run)
        name = _step(size, per_core)
        found.append(Item(TPU_ESTIMATE, name, measure, estimates.POD, packages=estimates.PACKAGES))
    return found


def _estimate(rows: Rows, cell: tuple[int, int], quantity: str = "images/s/core") -> float:
    return rows.number(_step(*cell), quantity, TPU_ESTIMATE)


def _speedup(rows: Rows, name: str) -> float:
    one, other = _RATIOS[name]
    return _estimate(rows, one) / _estimate(rows, other)


def _paper_speedup(name: str) -> float:
    one, other = _RATIOS[name]
    return PAPER[one] / PAPER[other]


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 2 beside the paper's."""
    flops = {size: rows.number(_at(size), "FLOPs, G", EXACT) for size in SIZES}
    speed = [
        (
            size,
            shown(flops[size], ".2f"),
            per_core,
            # The words of a step that does not fit are its value.
            shown(
                _estimate(rows, (size, per_core)),
                ".0f",
                unknown=rows.find(_step(size, per_core), "images/s/core", TPU_ESTIMATE),
            ),
            shown(_estimate(rows, (size, per_core), "memory, GiB"), ".1f"),
            shown(paper, ".0f", unknown=OUT_OF_MEMORY),
        )
        for (size, per_core), paper in PAPER.items()
    ]
    speed_header = (
        *("train size, px", "FLOPs an image, G", "images a core"),
        *("TPUv3 estimate, images/s/core", "memory needed, GiB of 16", "the paper's TPUv3"),
    )
    ratios = [
        (
            name,
            shown(_speedup(rows, name), ".2f"),
            f"{_paper_speedup(name):.2f}",
            shown(flops[other[0]] / flops[one[0]], ".2f"),
        )
        for name, (one, other) in _RATIOS.items()
    ]
    ratios_header = ("speed of", "TPUv3 estimate", "the paper's TPUv3", "by FLOPs alone")
    published = [
        (size, top1, shown(small, ".0f"), shown(large, ".0f", unknown=OUT_OF_MEMORY))
        for size, (top1, small, large) in PAPER_TOP1_AND_V100.items()
    ]
    published_header = (
        *("train size, px", "the paper's top-1, %"),
        *("the paper's V100, images/s with 12", "with 24"),
    )
    return {
        "speed": markdown(speed_header, speed),
        "ratios": markdown(ratios_header, ratios),
        "published": markdown(published_header, published),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """Whether the large step fits, and the speed-ups."""
    cell = (512, 128)
    value = rows.find(_step(*cell), "images/s/core", TPU_ESTIMATE)
    memory = shown(_estimate(rows, cell, "memory, GiB"), ".1f", "unknown")
    if not value:
        fits = "not compiled yet"
    elif value == OUT_OF_MEMORY:
        fits = f"out of memory ({memory} GiB needed of 16), as in the paper"
    else:
        fits = f"fits in {memory} GiB of 16, where the paper ran out of memory"
    speedups = [
        f"{name}: {shown(_speedup(rows, name), '.2f', 'not compiled yet')} "
        f"(the paper {_paper_speedup(name):.2f})"
        for name in list(_RATIOS)[:2]
    ]
    return (
        f"128 images a core at 512 px: {fits}; estimated speed of {speedups[0]}, of {speedups[1]}"
    )


def _command(image_size: int, more: str = "") -> str:
    return (
        f"python -m effnetv2_jax.main --config={CONFIG} "
        f"--config.progressive.image_size='({image_size}, {image_size})' {more}--workdir=DIR"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="What does training EfficientNet-B6 at a smaller image size save?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=(
        *((f"top-1, {size} px", _command(size)) for size in SIZES),
        *(
            (
                f"speed, {size} px, {per_core} images a core",
                # As the paper timed it: not cut down to fit.
                _command(
                    size,
                    f"--config.batch_size={estimates.CORES * per_core} "
                    "--config.memory.micro_batches=1 --config.memory.remat_groups=0 ",
                ),
            )
            for size, per_core in PAPER
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
