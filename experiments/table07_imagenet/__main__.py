"""Table 7: parameters, FLOPs and training hours of every network of this project in it."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from effnetv2_jax.models.create import create_model
from experiments import counts, estimates, rank
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


class Published(NamedTuple):
    """A row of Table 7: top-1 in %, parameters in M, FLOPs in G, hours on 32 TPUv3 cores."""

    top1: float
    parameters: float
    flops: float
    hours: float


# Table 7 of the later revision.
PAPER = {
    "EfficientNet-B3": Published(81.5, 12, 1.9, 10),
    "EfficientNet-B4": Published(82.9, 19, 4.2, 21),
    "EfficientNet-B5": Published(83.7, 30, 10, 43),
    "EfficientNet-B6": Published(84.3, 43, 19, 75),
    "EfficientNet-B7": Published(84.7, 66, 38, 139),
    "EfficientNetV2-S": Published(83.9, 22, 8.8, 7.1),
    "EfficientNetV2-M": Published(85.1, 54, 24, 13),
    "EfficientNetV2-L": Published(85.7, 120, 53, 24),
    "EfficientNetV2-S (21k)": Published(84.9, 22, 8.8, 9.0),
    "EfficientNetV2-M (21k)": Published(86.2, 54, 24, 15),
    "EfficientNetV2-L (21k)": Published(86.8, 120, 53, 26),
    "EfficientNetV2-XL (21k)": Published(87.3, 208, 94, 45),
}
# Of inference, pixels: the released sizes, which the paper does not name. After ImageNet-21k the
# networks are the same; XL has no other row.
SIZES = {
    "EfficientNet-B3": 300,
    "EfficientNet-B4": 380,
    "EfficientNet-B5": 456,
    "EfficientNet-B6": 528,
    "EfficientNet-B7": 600,
    "EfficientNetV2-S": 384,
    "EfficientNetV2-M": 480,
    "EfficientNetV2-L": 480,
    "EfficientNetV2-XL (21k)": 512,
}
# The steps of the first six are compiled in `tpu_compile`, the others from small to large.
CONFIGS = {
    "EfficientNetV2-S": "configs/s.py",
    "EfficientNetV2-M": "configs/m.py",
    "EfficientNetV2-L": "configs/l.py",
    "EfficientNetV2-S (21k)": "configs/s_21k.py",
    "EfficientNetV2-L (21k)": "configs/l_21k.py",
    "EfficientNetV2-XL (21k)": "configs/xl_21k.py",
    "EfficientNet-B3": "configs/v1.py:b3",
    "EfficientNet-B4": "configs/v1.py:b4",
    "EfficientNet-B5": "configs/v1.py:b5",
    "EfficientNetV2-M (21k)": "configs/m_21k.py",
    "EfficientNet-B6": "configs/v1.py:b6",
    "EfficientNet-B7": "configs/v1.py:b7",
}
# S as the first arXiv version has it, in its Tables 4 and 7: channels of the last stage and of the
# head, parameters in M and FLOPs in G. Later: 256, 1280, 22M and again 8.8G.
FIRST_S = "EfficientNetV2-S, first arXiv version"
PAPER_FIRST_S = (272, 1792, 24, 8.8)
# Why a row differs by more than the rounding of the paper's own digits.
_OLD_FLOPS = "the paper's FLOPs are of the network of its first arXiv version"
REASONS = {
    "EfficientNet-B3": "not known; timm counts 1.87 G",
    "EfficientNet-B4": "the paper contradicts itself: 4.5 G in its Table 3",
    "EfficientNetV2-S": f"{_OLD_FLOPS}; the released README has 21.5M, which may be rounded again",
    FIRST_S: "not known",
    "EfficientNetV2-M": f"{_OLD_FLOPS} (24.4 G in its Figure 5)",
    "EfficientNetV2-L": f"{_OLD_FLOPS} (52.9 G in its Figure 5); the released README has 119.5M",
    "EfficientNetV2-XL (21k)": "not known; timm counts 93.85 G",
}
# What training hours are compared within.
_GROUPS = {
    "all": tuple(PAPER),
    "V1": tuple(name for name in PAPER if name.startswith("EfficientNet-")),
    "V2, ImageNet-1k": tuple(f"EfficientNetV2-{size}" for size in "SML"),
    "V2, ImageNet-21k": tuple(name for name in PAPER if name.endswith("(21k)")),
}


def _variant(name: str) -> str:
    return name.removesuffix(" (21k)").lower()


def _first_s_quantities() -> dict[str, float | int]:
    """Counts of S as the first arXiv version has it."""
    last_filters, head_filters = PAPER_FIRST_S[:2]
    network = create_model("efficientnetv2-s")
    spec = network.spec
    rows = (*spec.rows[:-1], dataclasses.replace(spec.rows[-1], filters=last_filters))
    network = network.clone(spec=dataclasses.replace(spec, rows=rows, head_filters=head_filters))
    return counts.quantities_of(network, SIZES["EfficientNetV2-S"])


def items() -> Sequence[Item]:
    """Counts of every network, and every run."""
    found = []
    for name, size in SIZES.items():
        variant = _variant(name)
        found.append(Item(EXACT, variant, functools.partial(counts.quantities, variant, size)))
    found.append(Item(EXACT, FIRST_S, _first_s_quantities))
    for config in CONFIGS.values():
        measure = functools.partial(estimates.hours_quantities, estimates.Run(config))
        found.append(
            Item(TPU_ESTIMATE, config, measure, estimates.POD, packages=estimates.PACKAGES)
        )
    return found


def _differences(rows: Rows, item: str, parameters: float, flops: float) -> tuple[float, float]:
    """Of a network's parameters and FLOPs from the paper's, in %."""
    return (
        100 * (rows.number(item, "parameters, M", EXACT) / parameters - 1),
        100 * (rows.number(item, "FLOPs, G", EXACT) / flops - 1),
    )


def _hours(rows: Rows, name: str) -> float:
    return rows.number(CONFIGS[name], "hours", TPU_ESTIMATE)


def _known_ratios(rows: Rows, names: Iterable[str]) -> list[float]:
    """Estimated hours over the paper's, of the runs that are compiled, in rising order."""
    ratios = (_hours(rows, name) / PAPER[name].hours for name in names)
    return sorted(ratio for ratio in ratios if not math.isnan(ratio))


def _correlation(rows: Rows, names: Sequence[str]) -> float:
    return rank.correlation(
        [_hours(rows, name) for name in names], [PAPER[name].hours for name in names]
    )


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 7 beside the paper's."""
    networks = {
        name: (_variant(name), size, PAPER[name].parameters, PAPER[name].flops)
        for name, size in SIZES.items()
    }
    networks[FIRST_S] = (FIRST_S, SIZES["EfficientNetV2-S"], *PAPER_FIRST_S[2:])
    exact = []
    for name, (item, size, parameters, flops) in networks.items():
        of_parameters, of_flops = _differences(rows, item, parameters, flops)
        exact.append(
            (
                name.removesuffix(" (21k)"),
                size,
                shown(rows.number(item, "parameters, M", EXACT), ".2f"),
                f"{parameters:g}",
                shown(of_parameters, "+.1f"),
                shown(rows.number(item, "FLOPs, G", EXACT), ".2f"),
                f"{flops:g}",
                shown(of_flops, "+.1f"),
                REASONS.get(name, ""),
            )
        )
    header = (
        *("model", "inference size, px", "parameters, M", "the paper's", "difference, %"),
        *("FLOPs, G", "the paper's", "difference, %", "why, beyond rounding"),
    )
    hours = [
        (
            name,
            f"`{CONFIGS[name]}`",
            # The words of a run that does not fit are its value.
            shown(
                _hours(rows, name),
                ".1f",
                unknown=rows.find(CONFIGS[name], "hours", TPU_ESTIMATE),
            ),
            f"{paper.hours:g}",
            shown(_hours(rows, name) / paper.hours, ".2f"),
            paper.top1,
        )
        for name, paper in PAPER.items()
    ]
    hours_header = (
        *("model", "configuration", "TPUv3 estimate, h", "the paper's, h"),
        *("estimate / the paper's", "the paper's top-1, %"),
    )
    ranks = []
    for group, names in _GROUPS.items():
        ratios = _known_ratios(rows, names) or [math.nan]
        ranks.append(
            (
                group,
                f"{len(_known_ratios(rows, names))} of {len(names)}",
                shown(_correlation(rows, names), ".2f"),
                shown(ratios[0], ".2f"),
                shown(ratios[-1], ".2f"),
            )
        )
    ranks_header = (
        *("rows", "compiled", "rank correlation of hours"),
        *("lowest estimate / the paper's", "highest"),
    )
    return {
        "exact": markdown(header, exact),
        "hours": markdown(hours_header, hours),
        "ranks": markdown(ranks_header, ranks),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """How far counts are from the paper's, and how estimated hours rank."""
    differences = [
        _differences(rows, _variant(name), PAPER[name].parameters, PAPER[name].flops)
        for name in SIZES
    ]
    parts = [
        f"{what} not all counted yet"
        if any(map(math.isnan, column))
        else f"{what} within {max(map(abs, column)):.1f} % of the paper's"
        for what, column in zip(
            ("parameters", "FLOPs"), zip(*differences, strict=True), strict=True
        )
    ]
    names = tuple(PAPER)
    ratios = _known_ratios(rows, names)
    if ratios:
        correlation = shown(_correlation(rows, names), ".2f", "unknown for so few")
        parts.append(
            f"estimated training hours {ratios[0]:.2f} to {ratios[-1]:.2f} times the paper's, rank "
            f"correlation {correlation} ({len(ratios)} of {len(names)} runs compiled)"
        )
    else:
        parts.append("training hours not compiled yet")
    return "; ".join(parts)


def _paper_runs() -> list[tuple[str, str]]:
    runs = []
    for name in PAPER:
        main = "python -m effnetv2_jax.main"
        runs.append((name, f"{main} --config={CONFIGS[name]} --workdir=DIR"))
        if name.endswith("(21k)"):
            # Table 7's accuracy on ImageNet-1k is of the network fine-tuned.
            config = CONFIGS[name].replace(".py", "_ft1k.py")
            flags = f"--config={config} --config.init_from=DIR --workdir=DIR_OF_FINETUNING"
            runs.append((f"{name}, fine-tuning", f"{main} {flags}"))
    return runs


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Are parameters, FLOPs and training hours on ImageNet those of Table 7?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=tuple(_paper_runs()),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
