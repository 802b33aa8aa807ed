"""Table 13 and Figure 6: regularisation that rises with the image size, and that does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import paper_figures, training
from experiments.experiment import Experiment, Item, Rows, command, markdown
from experiments.training import Arm, spread

# (order of sizes, whether strengths rise with them) -> the paper's top-1 in % and its standard
# deviation over three runs.
PAPER = {
    ("rising", False): (84.3, 0.14),
    ("rising", True): (85.1, 0.07),
    ("random", False): (83.5, 0.11),
    ("random", True): (84.2, 0.10),
}
_ORDERS = {"rising": "progressive resize", "random": "random resize"}
# The paper draws a new size every 8 of 350 epochs, 44 times; at 90 epochs ten draws.
NUM_DRAWS = 10


def name(order: str, adaptive: bool) -> str:
    """Of an arm."""
    return f"{_ORDERS[order]}, {'adaptive' if adaptive else 'fixed'} regularisation"


def _arm(order: str, adaptive: bool) -> Arm:
    """As `recipes.schedule_ablation`: fixed strengths are those of the last stage."""
    overrides: dict[str, object] = {"progressive.order": order}
    if order == "random":
        overrides["progressive.num_draws"] = NUM_DRAWS
    if not adaptive:
        overrides["progressive.dropout_rate"] = (training.DROPOUT[1],) * 2
        overrides["progressive.randaug_magnitude"] = (training.MAGNITUDE[1],) * 2
    return Arm(training.CONFIG, overrides)


def items() -> Sequence[Item]:
    """The four arms."""
    return training.items({name(*key): _arm(*key) for key in PAPER})


def _differences() -> list[tuple[str, tuple[str, bool], tuple[str, bool]]]:
    return [
        ("adaptive - fixed, progressive resize", ("rising", True), ("rising", False)),
        ("adaptive - fixed, random resize", ("random", True), ("random", False)),
        ("progressive - random resize, adaptive", ("rising", True), ("random", True)),
        ("progressive - random resize, fixed", ("rising", False), ("random", False)),
    ]


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 13, and its differences."""
    arms = [
        (
            name(*key),
            *(str(spread(rows, name(*key), q)) for q in (training.TEST, training.TRAINING)),
            f"{mean} ± {deviation}",
        )
        for key, (mean, deviation) in PAPER.items()
    ]
    differences = [
        (
            what,
            spread(rows, name(*one)).minus(spread(rows, name(*other))),
            f"{PAPER[one][0] - PAPER[other][0]:+.1f}",
        )
        for what, one, other in _differences()
    ]
    return {
        "ours": markdown(("schedule", training.TEST, training.TRAINING, "the paper's"), arms),
        "differences": markdown(("points", "here", "the paper's"), differences),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """The differences."""
    found = [
        f"{what}: {spread(rows, name(*one)).minus(spread(rows, name(*other))) or 'not trained yet'}"
        f" [the paper {PAPER[one][0] - PAPER[other][0]:+.1f}]"
        for what, one, other in _differences()[:3]
    ]
    return "; ".join(found)


def plot(rows: Rows, folder: Path) -> None:
    """Figure 6: validation accuracy over epochs, all seeds; the paper's curves beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = ("tab:orange", "tab:green", "tab:purple", "tab:blue")
    for key, color in zip(PAPER, colors, strict=True):
        for number, (epochs, values) in enumerate(training.curves(rows, name(*key)).values()):
            label = name(*key) if number == 0 else None
            left.plot(epochs, values, "-o", color=color, ms=2.5, lw=1, label=label)
    left.set(title="Fashion-MNIST, 1,000 pictures (all seeds)", ylabel=training.VALIDATION)
    for (series, points), color in zip(paper_figures.read("fig6").items(), colors, strict=False):
        right.plot(*zip(*points, strict=True), color=color, label=series)
    right.set(title="the paper's Figure 6: ImageNet", ylabel="top-1, %", ylim=(40, 87))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8, loc="lower right")
    figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Does it help that regularisation rises with the image size?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (
            name(order, adaptive),
            "python -m effnetv2_jax.main --config=configs/schedules.py:m,"
            f"order={order},adaptive={'yes' if adaptive else 'no'} --workdir=DIR",
        )
        for order, adaptive in PAPER
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
