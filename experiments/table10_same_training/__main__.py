"""Table 10: EfficientNet-B7 and EfficientNetV2-M, both with progressive learning."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import counts, estimates
from experiments.experiment import (
    EXACT,
    NOT_RUN,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    shown,
)


class Published(NamedTuple):
    """A row of Table 10: top-1 in %, parameters in M, FLOPs in G, hours, ms a batch on a V100."""

    top1: float
    parameters: float
    flops: float
    hours: float
    inference_ms: float


V1, V2 = "efficientnet-b7", "efficientnetv2-m"
# Table 10.
PAPER = {V1: Published(85.0, 66, 38, 54, 170), V2: Published(85.1, 55, 24, 13, 57)}
NAMES = {V1: "V1-B7", V2: "V2-M"}
SIZES = {V1: 600, V2: 480}  # Of inference, pixels: the released ones; the paper names none.
CONFIGS = {V1: "configs/v1.py:b7,progressive=yes", V2: "configs/m.py"}
# What is counted -> its field of the paper's row.
_COUNTS = {"parameters, M": "parameters", "FLOPs, G": "flops"}


def items() -> Sequence[Item]:
    """Counts of both networks and both runs; the steps of M are compiled in `tpu_compile`."""
    found = [
        Item(EXACT, variant, functools.partial(counts.quantities, variant, size))
        for variant, size in SIZES.items()
    ]
    for variant in (V2, V1):
        run = estimates.Run(CONFIGS[variant])
        measure = functools.partial(estimates.hours_quantities, run)
        found.append(
            Item(
                TPU_ESTIMATE, CONFIGS[variant], measure, estimates.POD, packages=estimates.PACKAGES
            )
        )
    return found


def _ours(rows: Rows, quantity: str) -> list[float]:
    """Of B7 and of M."""
    if quantity == "hours":
        return [rows.number(CONFIGS[variant], quantity, TPU_ESTIMATE) for variant in PAPER]
    return [rows.number(variant, quantity, EXACT) for variant in PAPER]


def _papers(field: str) -> list[float]:
    """Of B7 and of M."""
    return [getattr(published, field) for published in PAPER.values()]


def _change(values: Sequence[float], unknown: str = "") -> str:
    """From B7 to M in %, as the paper prints it."""
    old, new = values
    change = 100 * (new / old - 1)
    return unknown if math.isnan(change) else f"{change:+.0f} %"


def _pair(values: Sequence[float], spec: str, unknown: Sequence[str] = ("", "")) -> tuple[str, str]:
    """Cells of B7 and of M, the latter with its change in brackets."""
    first, second = (
        shown(value, spec, words) for value, words in zip(values, unknown, strict=True)
    )
    change = _change(values)
    return first, f"{second} ({change})" if change else second


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 10 beside the paper's."""
    header = ("", "V1-B7", "V2-M", "the paper's V1-B7", "the paper's V2-M")
    exact = [
        (quantity, *_pair(_ours(rows, quantity), ".2f"), *_pair(_papers(field), "g"))
        for quantity, field in _COUNTS.items()
    ]
    # The words of a run that does not fit are its value.
    words = [rows.find(config, "hours", TPU_ESTIMATE) for config in CONFIGS.values()]
    run = [
        (
            "training on 32 cores of TPUv3, h (ours: estimate)",
            *_pair(_ours(rows, "hours"), ".1f", words),
            *_pair(_papers("hours"), "g"),
        ),
        (
            "inference of 16 images on a V100, ms",
            *("[elsewhere](../latency)",) * 2,
            *_pair(_papers("inference_ms"), "g"),
        ),
        ("top-1, %", NOT_RUN, NOT_RUN, *(f"{top1:.1f}" for top1 in _papers("top1"))),
    ]
    return {
        "exact": markdown(header, exact),
        "run": markdown(header, run),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """What M saves."""
    parts = [
        f"{what} {_change(_ours(rows, quantity), unknown)} (the paper {_change(_papers(field))})"
        for what, quantity, field, unknown in (
            ("parameters", "parameters, M", "parameters", "not counted yet"),
            ("FLOPs", "FLOPs, G", "flops", "not counted yet"),
            ("estimated training hours", "hours", "hours", "not compiled yet"),
        )
    ]
    return f"V2-M against V1-B7: {', '.join(parts)}"


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="What does EfficientNetV2-M save against V1-B7 when both are trained alike?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=tuple(
        (NAMES[variant], f"python -m effnetv2_jax.main --config={config} --workdir=DIR")
        for variant, config in CONFIGS.items()
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
