"""Table 14 (appendix of the first arXiv version): the number of stages and the first size."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import training
from experiments.experiment import Experiment, Item, Rows, command, markdown
from experiments.training import Arm, spread

# The first size as a share of the last one, and the number of stages -> the paper's hours and
# top-1 in %. Its sizes begin at 128 and 256 px; that they end at 300 px is a guess by the 83.2 %.
PAPER_STARTS = (128, 256)
STARTS = (18, 23)
NUM_STAGES = (4, 8, 16)
PAPER = {
    (128, 4): (6.2, 83.24),
    (128, 8): (6.3, 83.11),
    (128, 16): (7.0, 83.20),
    (256, 4): (8.1, 83.15),
    (256, 8): (8.5, 83.07),
    (256, 16): (9.4, 83.23),
}


def _name(start: int, num_stages: int) -> str:
    return f"from {start} px, {num_stages} stages"


def _arm(start: int, num_stages: int) -> Arm:
    return Arm(
        training.CONFIG,
        {
            "progressive.image_size": (start, training.IMAGE_SIZE[1]),
            "progressive.num_stages": num_stages,
        },
    )


def _keys() -> list[tuple[int, int]]:
    return [(start, num_stages) for start in STARTS for num_stages in NUM_STAGES]


def items() -> Sequence[Item]:
    """Every first size with every number of stages."""
    return training.items({_name(*key): _arm(*key) for key in _keys()})


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 14, the paper's beside it."""
    columns = ("first size", "stages", training.TEST, training.SECONDS, training.WHOLE)
    lines = []
    for (start, num_stages), ((paper_start, _), (hours, top1)) in zip(
        _keys(), PAPER.items(), strict=True
    ):
        arm = _name(start, num_stages)
        lines.append(
            (
                *(f"{start} px", num_stages),
                *(str(spread(rows, arm, q)) for q in columns[2:]),
                *(f"{paper_start} px", f"{top1}", f"{hours} h"),
            )
        )
    return {
        "ours": markdown((*columns, "the paper's first size", "its top-1, %", "its time"), lines),
        "contrasts": markdown(
            ("points of top-1", "here", "the paper's"),
            [(what, ours, f"{his:+.2f}") for what, ours, his in _contrasts(rows)],
        ),
        "answer": f"{answer(rows)}.",
    }


def _contrasts(rows: Rows) -> list[tuple[str, str, float]]:
    """What is compared, the difference over the seeds, and the paper's."""
    found = []
    most, least = NUM_STAGES[-1], NUM_STAGES[0]
    late, early = STARTS[-1], STARTS[0]
    for what, better, worse in (
        (
            f"{most} stages over {least}",
            [(start, most) for start in STARTS],
            [(start, least) for start in STARTS],
        ),
        (
            f"a first size of {late} px over {early} px",
            [(late, number) for number in NUM_STAGES],
            [(early, number) for number in NUM_STAGES],
        ),
    ):
        weighted = [
            (1 / len(keys) * sign, key) for sign, keys in ((1, better), (-1, worse)) for key in keys
        ]
        difference = training.contrast([(w, spread(rows, _name(*key))) for w, key in weighted])
        paper = dict(zip(_keys(), PAPER.values(), strict=True))
        found.append((what, difference, sum(w * paper[key][1] for w, key in weighted)))
    return found


def answer(rows: Rows) -> str:
    """What more stages and a larger first size gain, and what they cost."""
    found = _contrasts(rows)
    if not all(difference for _, difference, _ in found):
        return "not trained yet"
    seconds = [spread(rows, _name(*key), training.SECONDS).mean for key in _keys()]
    gains = "; ".join(f"{what}: {ours} points (the paper {his:+.2f})" for what, ours, his in found)
    return f"{gains}; training steps take {min(seconds):.0f} to {max(seconds):.0f} s"


def plot(rows: Rows, folder: Path) -> None:
    """Accuracy of all seeds against the number of stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for start, color in zip(STARTS, ("tab:blue", "tab:orange"), strict=True):
        found = [spread(rows, _name(start, n)) for n in NUM_STAGES]
        label = f"from {start} px (mean, all seeds)"
        axes.plot(NUM_STAGES, [each.mean for each in found], "-", color=color, label=label)
        for num_stages, each in zip(NUM_STAGES, found, strict=True):
            axes.plot([num_stages] * len(each.values), each.values, "o", color=color, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUM_STAGES, [str(n) for n in NUM_STAGES])
    axes.set(xlabel="stages", ylabel=training.TEST)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "stages.png", dpi=100)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Do the number of stages and the first image size matter?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (
            f"from {start} px, {num_stages} stages",
            "python -m effnetv2_jax.main "
            f"--config=configs/schedules.py:s,start={start},stages={num_stages} --workdir=DIR",
        )
        for start, num_stages in PAPER
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
