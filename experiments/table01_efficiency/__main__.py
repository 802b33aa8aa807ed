"""Table 1: EfficientNet-B6 needs fewer parameters and FLOPs than others as accurate as it is."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import counts
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown, shown

VARIANT = "efficientnet-b6"
SIZE = 528  # B6's own, of inference; the paper names none.
NAME = "EfficientNet-B6"
# Table 1: model -> top-1 in %, parameters in M and FLOPs in G.
PAPER = {
    NAME: (84.6, 43, 19),
    "ResNet-RS-420": (84.4, 192, 64),
    "NFNet-F1": (84.7, 133, 36),
}
_NOT_OURS = "not a network of this project"
_QUANTITIES = ("parameters, M", "FLOPs, G")


def items() -> Sequence[Item]:
    """The one network of the table that this project has."""
    return [Item(EXACT, VARIANT, functools.partial(counts.quantities, VARIANT, SIZE))]


def _ours(rows: Rows) -> list[float]:
    return [rows.number(VARIANT, quantity) for quantity in _QUANTITIES]


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 1 beside the paper's, and what the others need as multiples of B6."""
    parameters, flops = _ours(rows)
    exact = []
    for model, paper in PAPER.items():
        cells: tuple[str, ...] = (_NOT_OURS, "", _NOT_OURS, "")
        if model == NAME:
            cells = (
                *(shown(parameters, ".2f"), shown(100 * (parameters / paper[1] - 1), "+.1f")),
                *(shown(flops, ".2f"), shown(100 * (flops / paper[2] - 1), "+.1f")),
            )
        exact.append((model, cells[0], paper[1], cells[1], cells[2], paper[2], cells[3], paper[0]))
    header = (
        *("model", "parameters, M", "the paper's", "difference, %"),
        *("FLOPs, G", "the paper's", "difference, %", "the paper's top-1, %"),
    )
    ratios = [
        (
            model,
            shown(paper[1] / parameters, ".2f"),
            f"{paper[1] / PAPER[NAME][1]:.2f}",
            shown(paper[2] / flops, ".2f"),
            f"{paper[2] / PAPER[NAME][2]:.2f}",
        )
        for model, paper in PAPER.items()
        if model != NAME
    ]
    ratios_header = (
        *("model", "parameters / B6's as counted", "/ B6's in the paper"),
        *("FLOPs / B6's as counted", "/ B6's in the paper"),
    )
    return {
        "exact": markdown(header, exact),
        "ratios": markdown(ratios_header, ratios),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """How far B6's row is from the paper's, and the multiples that the others need."""
    parameters, flops = _ours(rows)
    if math.isnan(parameters):
        return "not counted yet"
    others = [
        f"{model} has {paper[1] / parameters:.1f} and {paper[2] / flops:.1f} times as many"
        for model, paper in PAPER.items()
        if model != NAME
    ]
    return (
        f"parameters and FLOPs of B6 differ from the paper's by "
        f"{100 * (parameters / PAPER[NAME][1] - 1):+.1f} and "
        f"{100 * (flops / PAPER[NAME][2] - 1):+.1f} %; "
        f"by the paper's numbers {', '.join(others)}"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="How many parameters and FLOPs do EfficientNet-B6 and networks as accurate need?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=((NAME, "python -m effnetv2_jax.main --config=configs/v1.py:b6 --workdir=DIR"),),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
