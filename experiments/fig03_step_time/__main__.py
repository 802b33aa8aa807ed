"""Figure 3: the time of a training step at a fixed size, 32 images a core of TPUv3."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments import counts, estimates, paper_figures, rank
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

_PER_CORE = 32
# Figure 3: series -> (ms of a step, top-1 in %).
PAPER = paper_figures.read("fig3")
# Series -> configuration, variant and training size in pixels of each of its points. Sizes of V2:
# Table 6; the baseline trains at its inference size, `reprod` about 30 % below (the paper has
# no numbers).
POINTS = {
    "EffNetV2 (S,M,L)": (
        ("configs/s.py", "efficientnetv2-s", 300),
        ("configs/m.py", "efficientnetv2-m", 380),
        ("configs/l.py", "efficientnetv2-l", 380),
    ),
    "EffNet(baseline)": (
        ("configs/v1.py:b4", "efficientnet-b4", 380),
        ("configs/v1.py:b5", "efficientnet-b5", 456),
        ("configs/v1.py:b6", "efficientnet-b6", 528),
    ),
    "EffNet(reprod)": (
        ("configs/v1.py:b4", "efficientnet-b4", 266),
        ("configs/v1.py:b5", "efficientnet-b5", 319),
        ("configs/v1.py:b6", "efficientnet-b6", 370),
        ("configs/v1.py:b7", "efficientnet-b7", 420),
    ),
}


def _name(variant: str, size: int) -> str:
    """Of an item."""
    return f"{variant}, {size} px"


def _points() -> Iterator[tuple[str, str, str, int, float, float]]:
    """Series, configuration, variant, size, the paper's ms and its top-1."""
    for series, points in POINTS.items():
        for point, paper in zip(points, PAPER[series], strict=True):
            yield series, *point, *paper


def items() -> Sequence[Item]:
    """Each network at each size."""
    found = []
    for _, _, variant, size, *_ in _points():
        measure = functools.partial(counts.quantities, variant, size)
        found.append(Item(EXACT, _name(variant, size), measure))
    for _, config, variant, size, *_ in _points():
        run = estimates.train_step(config, size, _PER_CORE)
        measure = functools.partial(estimates.step_quantities, run)
        name = _name(variant, size)
        found.append(Item(TPU_ESTIMATE, name, measure, estimates.POD, packages=estimates.PACKAGES))
    return found


def tables(rows: Rows) -> Mapping[str, str]:
    """Figure 3's points beside the paper's."""
    lines = []
    for series, _, variant, size, paper, top1 in _points():
        item = _name(variant, size)
        ms = rows.number(item, "ms", TPU_ESTIMATE)
        lines.append(
            (
                series.partition("(")[2].rstrip(")") if "V2" not in series else "EffNetV2",
                variant,
                size,
                shown(rows.number(item, "FLOPs, G"), ".1f"),
                shown(ms, ".1f") or rows.find(item, "images/s/core", TPU_ESTIMATE),
                f"{paper:.1f}",
                shown(paper / ms, ".2f"),
                f"{top1:.1f}",
            )
        )
    header = (
        *("series", "network", "training px", "FLOPs, G", "estimate, ms", "the paper's, ms"),
        *("the paper's / estimate", "top-1 in the figure, %"),
    )
    return {"steps": markdown(header, lines)}


def answer(rows: Rows) -> str:
    """How the ranking compares."""
    paper = [ms for *_, ms, _ in _points()]
    names = [_name(variant, size) for _, _, variant, size, *_ in _points()]
    flops = rank.correlation([rows.number(name, "FLOPs, G") for name in names], paper)
    estimated = [rows.number(name, "ms", TPU_ESTIMATE) for name in names]
    ratios = [p / ms for p, ms in zip(paper, estimated, strict=True) if math.isfinite(ms)]
    text = (
        f"the paper's ms / estimate: {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} of "
        f"{len(names)} steps"
        if ratios
        else "estimate not compiled yet"
    )
    correlation = shown(rank.correlation(estimated, paper), ".2f", "none")
    return (
        f"{text}; rank correlation with the paper's ms: {correlation} (FLOPs alone: "
        f"{shown(flops, '.2f', 'none')})"
    )


def plot(rows: Rows, folder: Path) -> None:
    """Writes `step_time.png`: the paper's points and our estimated times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.8), layout="constrained")
    for series, points in PAPER.items():
        paper_figures.draw_paper(axes, series, points)
    for series in POINTS:
        ours, names = [], []
        for other, _, variant, size, _, top1 in _points():
            ms = rows.number(_name(variant, size), "ms", TPU_ESTIMATE)
            if other == series and math.isfinite(ms):
                ours.append((ms, top1))
                names.append(variant.rpartition("-")[2].upper())
        paper_figures.draw_ours(axes, series, ours, names, f"estimate: {series}")
    paper_figures.scale_x(
        axes, "train step, 32 images a core of TPUv3, ms", (50, 100, 200, 400, 800)
    )
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(folder / "step_time.png", dpi=90)
    pyplot.close(figure)


def _fixed(config: str, size: int) -> str:
    flags = f'--config.progressive.num_stages=1 --config.progressive.image_size="({size},{size})"'
    batch = estimates.CORES * _PER_CORE
    return f"python -m effnetv2_jax.main --config={config} {flags} --config.batch_size={batch}"


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="How long does a training step at a fixed size take?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (_name(variant, size), f"{_fixed(config, size)} --workdir=DIR")
        for _, config, variant, size, *_ in _points()
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
