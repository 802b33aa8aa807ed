"""Figure 5: accuracy against parameters, FLOPs and latency."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from effnetv2_jax.models.specs import get_spec
from experiments import counts, paper_figures, rank
from experiments.experiment import (
    CPU,
    EXACT,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    read_rows,
    shown,
)

_FOLDER = Path(__file__).resolve().parent
# Where latency is measured; here it is drawn only.
_LATENCY = _FOLDER.parent / "latency" / "results.csv"
_V1, _V2 = "EffNet (B3..B7)", "EffNetV2 (S,M,L)"
# Panel -> series -> (x, top-1 in %): Figure 5. x: parameters in M, FLOPs in G, ms of 16 images on
# a V100.
PAPER = {panel: paper_figures.read(f"fig5{panel}") for panel in "abc"}
# Table 7: ms of 16 images on a V100, and hours of training on 32 cores of TPUv3.
TABLE_7 = {
    "efficientnet-b3": (19, 10),
    "efficientnet-b4": (30, 21),
    "efficientnet-b5": (60, 43),
    "efficientnet-b6": (97, 75),
    "efficientnet-b7": (170, 139),
    "efficientnetv2-s": (24, 7.1),
    "efficientnetv2-m": (57, 13),
    "efficientnetv2-l": (98, 24),
}
SERIES = {
    _V1: tuple(variant for variant in TABLE_7 if "v2" not in variant),
    _V2: tuple(variant for variant in TABLE_7 if "v2" in variant),
}


def _points(panel: str) -> Iterator[tuple[str, float, float]]:
    """Variant, the figure's x and top-1."""
    for series, variants in SERIES.items():
        for variant, (x, top1) in zip(variants, PAPER[panel][series], strict=True):
            yield variant, x, top1


def items() -> Sequence[Item]:
    """Each network at its inference size."""
    return [
        Item(EXACT, v, functools.partial(counts.quantities, v, get_spec(v).eval_size))
        for v in TABLE_7
    ]


def _latency(variant: str) -> float:
    """Milliseconds on a CPU, by `experiments/latency`."""
    return read_rows(_LATENCY).number(variant, "ms", CPU)


def tables(rows: Rows) -> Mapping[str, str]:
    """The points of both families beside the figure's."""
    sizes = []
    latency = []
    for (variant, millions, top1), (_, flops, _), (_, ms, _) in zip(
        *(_points(panel) for panel in "abc"), strict=True
    ):
        sizes.append(
            (
                variant,
                rows.find(variant, "image size, px"),
                shown(rows.number(variant, "parameters, M"), ".2f"),
                f"{millions:.1f}",
                shown(rows.number(variant, "FLOPs, G"), ".2f"),
                f"{flops:.2f}",
                f"{top1:.1f}",
            )
        )
        table_ms, hours = TABLE_7[variant]
        latency.append((variant, f"{ms:g}", table_ms, hours, shown(_latency(variant), ".0f")))
    return {
        "sizes": markdown(
            (
                *("network", "px", "parameters, M", "the figure's", "FLOPs, G", "the figure's"),
                "top-1 in the figure, %",
            ),
            sizes,
        ),
        "latency": markdown(
            (
                *("network", "Figure 5c, ms", "Table 7, inference, ms", "Table 7, training, h"),
                "CPU, ms",
            ),
            latency,
        ),
    }


def answer(rows: Rows) -> str:
    """How far the figure's points are from what is counted."""
    parts = []
    for panel, quantity, what in (
        ("a", "parameters, M", "parameters"),
        ("b", "FLOPs, G", "FLOPs"),
    ):
        off = [x / rows.number(variant, quantity) - 1 for variant, x, _ in _points(panel)]
        low, high = (shown(100 * end, "+.1f", "unknown") for end in (min(off), max(off)))
        parts.append(f"the figure's {what} are {low} to {high} % from those counted")
    v1 = [(variant, ms) for variant, ms, _ in _points("c") if variant in SERIES[_V1]]
    same = sum(ms == TABLE_7[variant][1] for variant, ms in v1)
    parts.append(
        f"{same} of {len(v1)} of its EfficientNet latencies are Table 7's training hours instead"
    )
    ours = [_latency(variant) for variant in TABLE_7]
    correlation = rank.correlation(ours, [ms for ms, _ in TABLE_7.values()])
    parts.append(
        "rank correlation of latency on a CPU with Table 7's: "
        f"{shown(correlation, '.2f', 'not measured yet')}"
    )
    return "; ".join(parts)


def plot(rows: Rows, folder: Path) -> None:
    """Writes `model_size.png`: the three panels, with what is counted and measured here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 5.2), sharey=True, layout="constrained")
    # Of each panel: label, ticks, our number of a variant, its name.
    meanings = (
        ("parameters, M", (10, 20, 50, 100, 200), functools.partial(_counted, rows, "a")),
        ("FLOPs, G", (2, 5, 10, 20, 50, 100, 200), functools.partial(_counted, rows, "b")),
        (
            "latency of 16 images, ms\n(the paper: V100; this project: CPU)",
            (10, 30, 100, 300, 1000, 10_000),
            _latency,
        ),
    )
    for panel, axes, (label, ticks, number) in zip("abc", panels, meanings, strict=True):
        for series, points in PAPER[panel].items():
            paper_figures.draw_paper(axes, series, points)
        for series, variants in SERIES.items():
            known = [
                (variant.rpartition("-")[2].upper(), (number(variant), top1))
                for variant, _, top1 in _points(panel)
                if variant in variants and math.isfinite(number(variant))
            ]
            name = series.partition(" ")[0]
            paper_figures.draw_ours(
                axes, series, [p for _, p in known], [n for n, _ in known], f"this project: {name}"
            )
        if panel == "c":
            corrected = [
                (TABLE_7[variant][0], top1)
                for variant, _, top1 in _points(panel)
                if variant in SERIES[_V1]
            ]
            axes.plot(
                *zip(*corrected, strict=True),
                "D",
                fillstyle="none",
                color=paper_figures.color(_V1),
                label="paper: EffNet (B3..B7), latency of Table 7",
            )
        paper_figures.scale_x(axes, label, ticks)
    for axes in panels[1:]:
        axes.set_ylabel("")
    figures = dict(
        pair[::-1]
        for axes in panels
        for pair in zip(*axes.get_legend_handles_labels(), strict=True)
    )
    figure.legend(figures.values(), figures.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(folder / "model_size.png", dpi=90)
    pyplot.close(figure)


def _counted(rows: Rows, panel: str, variant: str) -> float:
    return rows.number(variant, {"a": "parameters, M", "b": "FLOPs, G"}[panel], EXACT)


EXPERIMENT = Experiment(
    folder=_FOLDER,
    question="What does accuracy cost in parameters, FLOPs and latency?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
