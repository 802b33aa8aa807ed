"""Table 3: EfficientNet-B4 with Fused-MBConv in its first three, five or all stages."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import counts, cpu, estimates, rank
from experiments.experiment import (
    CPU,
    EXACT,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    shown,
)

SIZE = 380  # B4's own; the paper names none.
_PER_CORE = 32  # The smaller of Table 2's; Table 3 names none.
_CPU_BATCH = 4
# Variant -> the paper's parameters in M, FLOPs in G, top-1 in %, images/s/core on TPUv3 and
# images/s on a V100.
PAPER = {
    "efficientnet-b4": (19.3, 4.5, 82.8, 262, 155),
    "efficientnet-b4-fused-1-3": (20.0, 7.5, 83.1, 362, 216),
    "efficientnet-b4-fused-1-5": (43.4, 21.3, 83.1, 327, 223),
    "efficientnet-b4-fused-1-7": (132.0, 34.4, 81.7, 254, 206),
}
NAMES = ("no fused", "stages 1-3", "stages 1-5", "stages 1-7")


def _config(variant: str) -> str:
    return f"configs/v1.py:{variant.removeprefix('efficientnet-')}"


def items() -> Sequence[Item]:
    """Each variant at each scale."""
    found = [Item(EXACT, v, functools.partial(counts.quantities, v, SIZE)) for v in PAPER]
    for variant in PAPER:
        run = estimates.train_step(_config(variant), SIZE, _PER_CORE)
        measure = functools.partial(estimates.step_quantities, run)
        found.append(
            Item(TPU_ESTIMATE, variant, measure, estimates.POD, packages=estimates.PACKAGES)
        )
    for variant in PAPER:
        measure = functools.partial(cpu.train_quantities, variant, SIZE, _CPU_BATCH)
        found.append(Item(CPU, variant, measure))
    return found


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 3 beside the paper's."""
    first = next(iter(PAPER))
    exact = []
    speed = []
    for name, (variant, paper) in zip(NAMES, PAPER.items(), strict=True):
        exact.append(
            (
                name,
                shown(rows.number(variant, "parameters, M"), ".2f"),
                paper[0],
                shown(rows.number(variant, "FLOPs, G"), ".2f"),
                paper[1],
            )
        )
        tpu = rows.number(variant, "images/s/core", TPU_ESTIMATE)
        here = rows.number(variant, "images/s", CPU)
        speed.append(
            (
                name,
                shown(tpu, ".0f"),
                shown(tpu / rows.number(first, "images/s/core", TPU_ESTIMATE), ".2f"),
                f"{paper[3]} ({paper[3] / PAPER[first][3]:.2f})",
                shown(here, ".3g"),
                shown(here / rows.number(first, "images/s", CPU), ".2f"),
                f"{paper[4]} ({paper[4] / PAPER[first][4]:.2f})",
            )
        )
    header = ("fused", "parameters, M", "the paper's", "FLOPs, G", "the paper's")
    speed_header = (
        *("fused", "TPUv3 estimate, images/s/core", "against no fused", "the paper's TPUv3"),
        *("CPU, images/s", "against no fused", "the paper's V100"),
    )
    return {"exact": markdown(header, exact), "speed": markdown(speed_header, speed)}


def answer(rows: Rows) -> str:
    """How the ranking compares."""
    far = max(
        abs(rows.number(variant, quantity) / paper[column] - 1.0)
        for variant, paper in PAPER.items()
        for column, quantity in enumerate(("parameters, M", "FLOPs, G"))
    )
    parts = [f"parameters and FLOPs are within {far:.1%} of the paper's"]
    for scale, quantity, column, what in (
        (TPU_ESTIMATE, "images/s/core", 3, "the TPU compiler's estimate"),
        (CPU, "images/s", 4, "this CPU"),
    ):
        ours = [rows.number(variant, quantity, scale) for variant in PAPER]
        correlation = rank.correlation(ours, [paper[column] for paper in PAPER.values()])
        parts.append(f"rank correlation of speed with {what}: {shown(correlation, '.2f', 'none')}")
    return "; ".join(parts)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Where does Fused-MBConv pay in EfficientNet-B4?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=tuple(
        (name, f"python -m effnetv2_jax.main --config={_config(variant)} --workdir=DIR")
        for name, variant in zip(NAMES, PAPER, strict=True)
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
