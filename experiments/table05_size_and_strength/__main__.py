"""Table 5: small images want weak augmentation, large images strong augmentation."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import training
from experiments.experiment import Experiment, Item, Rows, command, markdown
from experiments.training import Arm, Spread, spread

SIZES = (18, 23, 28)
MAGNITUDES = (2, 5, 8)
# Magnitude -> top-1 in % and its standard deviation over three runs, at 128, 192 and 300 px.
PAPER_SIZES = (128, 192, 300)
PAPER = {
    5: ((78.3, 0.16), (81.2, 0.06), (82.5, 0.05)),
    10: ((78.0, 0.08), (81.6, 0.08), (82.7, 0.08)),
    15: ((77.7, 0.15), (81.5, 0.05), (83.2, 0.09)),
}
# The strongest augmentation's gain over the weakest.
_WEAK, _STRONG = min(MAGNITUDES), max(MAGNITUDES)
_PAPER_WEAK, _PAPER_STRONG = min(PAPER), max(PAPER)


def _name(size: int, magnitude: int) -> str:
    return f"{size} px, magnitude {magnitude}"


def _arm(size: int, magnitude: int) -> Arm:
    return Arm(
        training.CONFIG,
        {
            "progressive.num_stages": 1,
            "progressive.image_size": (size, size),
            "progressive.randaug_magnitude": (float(magnitude),) * 2,
            "eval.image_size": size,
        },
    )


def items() -> Sequence[Item]:
    """Every size with every magnitude."""
    return training.items({_name(s, m): _arm(s, m) for m in MAGNITUDES for s in SIZES})


def _gain(rows: Rows, size: int) -> tuple[Spread, Spread]:
    return spread(rows, _name(size, _STRONG)), spread(rows, _name(size, _WEAK))


def _best(rows: Rows, size: int) -> int | None:
    """The magnitude of the highest mean; None before all are trained."""
    means = {m: spread(rows, _name(size, m)).mean for m in MAGNITUDES}
    if any(map(math.isnan, means.values())):
        return None
    return max(means, key=means.__getitem__)


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 5, the paper's beside it, and what strong augmentation gains at each size."""
    ours = [(m, *(str(spread(rows, _name(s, m))) for s in SIZES)) for m in MAGNITUDES]
    paper = [(m, *(f"{mean} ± {sd}" for mean, sd in line)) for m, line in PAPER.items()]
    gains = [
        (f"{size} px", strong.minus(weak), f"{paper_size} px", f"{high[0] - low[0]:+.1f}")
        for size, (strong, weak), paper_size, high, low in zip(
            SIZES,
            (_gain(rows, size) for size in SIZES),
            PAPER_SIZES,
            PAPER[_PAPER_STRONG],
            PAPER[_PAPER_WEAK],
            strict=True,
        )
    ]
    return {
        "ours": markdown(("RandAugment magnitude", *(f"{s} px" for s in SIZES)), ours),
        "paper": markdown(("RandAugment magnitude", *(f"{s} px" for s in PAPER_SIZES)), paper),
        "gain": markdown(
            (
                *("size", f"magnitude {_STRONG} over {_WEAK}, points", "the paper's size"),
                f"magnitude {_PAPER_STRONG} over {_PAPER_WEAK}, points",
            ),
            gains,
        ),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """Whether the gain of strong augmentation grows with the size."""
    small, large = _gain(rows, SIZES[0]), _gain(rows, SIZES[-1])
    change = training.contrast([(1, large[0]), (-1, large[1]), (-1, small[0]), (1, small[1])])
    if not change:
        return "not trained yet"
    best = ", ".join(f"{_best(rows, size)} at {size} px" for size in SIZES)
    return (
        f"from {SIZES[0]} to {SIZES[-1]} px magnitude {_STRONG} gains over {_WEAK} "
        f"{change} points more (the paper +1.3); best magnitude {best} (the paper 5, 10, 15)"
    )


def plot(rows: Rows, folder: Path) -> None:
    """All seeds, and the paper's means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")

    def line(
        axes: Any, label: str, xs: Sequence[float], means: Sequence[float], color: str
    ) -> None:
        axes.plot(xs, means, "-", color=color, label=label)

    for index, color in enumerate(("tab:blue", "tab:orange", "tab:green")):
        found = [spread(rows, _name(SIZES[index], m)) for m in MAGNITUDES]
        line(left, f"{SIZES[index]} px", MAGNITUDES, [s.mean for s in found], color)
        for magnitude, each in zip(MAGNITUDES, found, strict=True):
            left.plot([magnitude] * len(each.values), each.values, "o", color=color, ms=4)
        paper = [values[index][0] for values in PAPER.values()]
        line(right, f"{PAPER_SIZES[index]} px", tuple(PAPER), paper, color)
    left.set(title="Fashion-MNIST, 1,000 pictures (all seeds)", ylabel="test top-1, %")
    right.set(title="the paper: ImageNet (means)", ylabel="top-1, %")
    for axes in (left, right):
        axes.set_xlabel("RandAugment magnitude")
        axes.legend(fontsize=8, framealpha=0.3)
        axes.grid(alpha=0.3)
    figure.savefig(folder / "size_and_strength.png", dpi=100)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Do small images want weak and large images strong augmentation?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
