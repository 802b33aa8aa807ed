"""The curve points of the paper's figures, and how they are drawn beside this project's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_POINTS = Path(__file__).with_suffix(".json")

Points = list[tuple[float, float]]

# Of a series, by how its name begins; the first that fits.
_COLORS = (
    ("EffNetV2 21k", "tab:orange"),
    ("EffNetV2", "tab:red"),
    # As EfficientNetV2 is trained: at smaller sizes than the baseline, or progressively.
    ("EffNet(reprod)", "tab:blue"),
    ("EffNet-B7(repro)", "tab:blue"),
    ("EffNet progressive", "tab:blue"),
    ("EffNet", "black"),
    ("NFNet", "tab:green"),
    ("ViT", "tab:purple"),
    ("DeiT", "tab:cyan"),
    ("ResNeSt", "tab:brown"),
    ("RegNetY", "tab:pink"),
    ("ResNet-RS", "tab:olive"),
    ("botnet", "tan"),
    ("BoTNet", "tan"),
    ("", "tab:gray"),
)


def read(figure: str) -> dict[str, Points]:
    """The paper's series of a figure, as (x, top-1 in %), by their names in the file."""
    series = json.loads(_POINTS.read_text(encoding="utf-8"))[figure]["series"]
    return {name: [(x, y) for x, y in points] for name, points in series.items()}


def color(series: str) -> str:
    """Of a series in every figure."""
    return next(color for beginning, color in _COLORS if series.startswith(beginning))


def draw_paper(axes: Any, series: str, points: Points) -> None:
    """A series of the paper: dashed, hollow markers."""
    axes.plot(
        *zip(*points, strict=True),
        *("--o",),
        fillstyle="none",
        linewidth=1,
        color=color(series),
        label=f"paper: {series}",
    )


def draw_ours(axes: Any, series: str, points: Points, names: Iterable[str], label: str) -> None:
    """This project's points of a series: solid, filled markers, each with its name."""
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True),
        *("-o",),
        markersize=4,
        linewidth=1.5,
        color=color(series),
        label=label,
    )
    # V2's curves lie above V1's, so their names do not meet.
    is_above = series.startswith("EffNetV2")
    for name, point in zip(names, points, strict=True):
        axes.annotate(
            name,
            point,
            xytext=(-4, 5) if is_above else (4, -13),
            textcoords="offset points",
            ha="right" if is_above else "left",
            fontsize=7,
            color=color(series),
        )


def scale_x(axes: Any, label: str, ticks: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, and the accuracy on the other."""
    axes.set_xscale("log")
    axes.margins(x=0.08)
    limits = axes.get_xlim()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(limits)  # Ticks widen them.
    axes.set_xlabel(label)
    axes.set_ylabel("ImageNet top-1, % (as published)")
    axes.grid(alpha=0.3)
