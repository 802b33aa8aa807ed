"""Figure 1: accuracy against training time, and the small table of parameters beside it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from effnetv2_jax.models.specs import get_spec
from experiments import counts, paper_figures, rank
from experiments.experiment import (
    EXACT,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    read_rows,
    shown,
)

_FOLDER = Path(__file__).resolve().parent
# Where the hours of whole runs are estimated; here they are drawn only.
_SOURCES = ("table07_imagenet", "table10_same_training", "table12_other_networks")
# Not in Figure 1, but of Table 12: series -> (hours / 24, top-1 in %).
_PROGRESSIVE = "EffNet progressive (B4,B5; Table 12)"
# Series -> (TPU days of 32 cores, top-1 in %): Figure 1a and Table 12.
PAPER = {
    **paper_figures.read("fig1a"),
    _PROGRESSIVE: [(9.4 / 24, 83.1), (15.2 / 24, 84.0)],
}
# Series -> name and configuration of each of its points.
POINTS = {
    "EffNetV2 (S,M,L)": (
        ("S", "configs/s.py"),
        ("M", "configs/m.py"),
        ("L", "configs/l.py"),
    ),
    "EffNetV2 21k (S,M,L,XL)": (
        ("S", "configs/s_21k.py"),
        ("M", "configs/m_21k.py"),
        ("L", "configs/l_21k.py"),
        ("XL", "configs/xl_21k.py"),
    ),
    "EffNet (B4,B5,B6,B7)": (
        ("B4", "configs/v1.py:b4"),
        ("B5", "configs/v1.py:b5"),
        ("B6", "configs/v1.py:b6"),
        ("B7", "configs/v1.py:b7"),
    ),
    "EffNet-B7(repro)": (("B7", "configs/v1.py:b7,progressive=yes"),),
    _PROGRESSIVE: (
        ("B4", "configs/v1.py:b4,progressive=yes"),
        ("B5", "configs/v1.py:b5,progressive=yes"),
    ),
}
# Figure 1b: network -> this project's variant, top-1 in % and parameters in M.
PARAMETERS = {
    "EfficientNet (2019)": ("efficientnet-b6", 84.3, 43),
    "ResNet-RS (2021)": (None, 84.0, 164),
    "DeiT/ViT (2021)": (None, 83.1, 86),
    "EfficientNetV2": ("efficientnetv2-s", 83.9, 24),
}


def items() -> Sequence[Item]:
    """The parameters of Figure 1b; Figure 1a has no rows of its own."""
    variants = [variant for variant, *_ in PARAMETERS.values() if variant is not None]
    return [
        Item(EXACT, v, functools.partial(counts.quantities, v, get_spec(v).eval_size))
        for v in variants
    ]


def _points() -> Iterator[tuple[str, str, float, float, float]]:
    """Series, name, the paper's days and top-1, and the estimated days (NaN: not compiled)."""
    sources = [read_rows(_FOLDER.parent / name / "results.csv") for name in _SOURCES]
    for series, points in POINTS.items():
        for (name, config), (days, top1) in zip(points, PAPER[series], strict=True):
            hours = [rows.number(config, "hours", TPU_ESTIMATE) for rows in sources]
            known = [value for value in hours if math.isfinite(value)]
            yield series, name, days, top1, known[0] / 24 if known else math.nan


def tables(rows: Rows) -> Mapping[str, str]:
    """Both halves of Figure 1 beside the paper's."""
    time = [
        (
            series.partition(" (")[0],
            name,
            f"{top1:.1f}",
            shown(24 * estimated, ".1f"),
            f"{24 * days:.1f}",
            shown(days / estimated, ".2f"),
        )
        for series, name, days, top1, estimated in _points()
    ]
    parameters = [
        (
            name,
            "" if variant is None else variant,
            f"{top1:.1f}",
            "" if variant is None else shown(rows.number(variant, "parameters, M"), ".2f"),
            paper,
        )
        for name, (variant, top1, paper) in PARAMETERS.items()
    ]
    return {
        "time": markdown(
            (
                *("series", "network", "top-1 as published, %", "estimate, h"),
                *("the paper's, h", "the paper's / estimate"),
            ),
            time,
        ),
        "parameters": markdown(
            (
                *("network", "counted", "top-1 as published, %", "parameters, M"),
                "the paper's",
            ),
            parameters,
        ),
    }


def answer(rows: Rows) -> str:
    """How the times compare."""
    points = list(_points())
    estimated = [point[-1] for point in points]
    paper = [days for _, _, days, _, _ in points]
    ratios = [p / e for p, e in zip(paper, estimated, strict=True) if math.isfinite(e)]
    time = (
        f"the paper's hours / estimate: {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} "
        f"of {len(points)} runs, rank correlation "
        f"{shown(rank.correlation(estimated, paper), '.2f', 'none')}"
        if ratios
        else "estimated hours not compiled yet"
    )
    parameters = [
        f"{name} {shown(rows.number(variant, 'parameters, M'), '.1f', 'unknown')} ({paper})"
        for name, (variant, _, paper) in PARAMETERS.items()
        if variant is not None
    ]
    return f"{time}; parameters in M (the paper's): {', '.join(parameters)}"


def plot(rows: Rows, folder: Path) -> None:
    """Writes `training_efficiency.png`: the paper's points and our estimated times."""
    del rows  # Figure 1a has none of its own.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for series, points in PAPER.items():
        paper_figures.draw_paper(axes, series, points)
    for series in POINTS:
        known = [
            (name, (estimated, top1))
            for other, name, _, top1, estimated in _points()
            if other == series and math.isfinite(estimated)
        ]
        paper_figures.draw_ours(
            axes, series, [p for _, p in known], [n for n, _ in known], f"estimate: {series}"
        )
    label = "training time, days on 32 cores of TPUv3"
    paper_figures.scale_x(axes, label, (0.125, 0.25, 0.5, 1, 2, 4))
    axes.set_title("accuracy as published, time estimated", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(folder / "training_efficiency.png", dpi=90)
    pyplot.close(figure)


EXPERIMENT = Experiment(
    folder=_FOLDER,
    question="Which accuracy does which training time buy?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (f"{name}, {series}", f"python -m effnetv2_jax.main --config={config} --workdir=DIR")
        for series, points in POINTS.items()
        for name, config in points
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
