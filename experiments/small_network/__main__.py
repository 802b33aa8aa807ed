"""The small network and its training that stand for the paper's: can they show its effects?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import training
from experiments.experiment import PROXY, Experiment, Item, Rows, command, markdown, shown
from experiments.training import Arm

SEEDS = (0,)
_PLAIN = "without regularisation"
# It has to learn its pictures by heart: otherwise it lacks capacity or steps, not regularisation.
LEAST_TRAINING = 99.0
# (images of a batch, peak learning rate for 256 of them).
CHOSEN = (32, 0.016)
_SETTINGS = (CHOSEN, (64, 0.016), (32, 0.008), (32, 0.032))
_NOTHING = {
    "augment.policy": "none",
    "augment.crop": "squash",
    "augment.flip": False,
    "progressive.num_stages": 1,
    "progressive.dropout_rate": (0.0, 0.0),
    "loss.label_smoothing": 0.0,
}


def _setting(batch_size: int, rate: float) -> str:
    return f"batch {batch_size}, peak rate {rate:g} for 256 pictures"


def _arms() -> dict[str, Arm]:
    tuned = {
        _setting(batch_size, rate): Arm(
            training.CONFIG,
            {"batch_size": batch_size, "learning_rate.per_256_images": rate},
            is_tested=False,
        )
        for batch_size, rate in _SETTINGS
    }
    return {_PLAIN: Arm(training.CONFIG, _NOTHING, is_tested=False), **tuned}


def items() -> Sequence[Item]:
    """Each arm once: only large differences matter here."""
    return training.items(_arms(), SEEDS)


def tables(rows: Rows) -> Mapping[str, str]:
    """Accuracy of each arm, without the test pictures."""
    quantities = (training.TRAINING, training.VALIDATION, training.SECONDS, training.WHOLE)
    lines = [
        (
            name,
            *(shown(rows.number(name, q, PROXY), ".2f") for q in quantities[:2]),
            *(shown(rows.number(name, q, PROXY), ".0f") for q in quantities[2:]),
        )
        for name in _arms()
    ]
    return {"arms": markdown(("arm", *quantities), lines), "answer": f"{answer(rows)}."}


def answer(rows: Rows) -> str:
    """Whether it overfits, and what regularisation gains."""
    plain, chosen = (
        {q: rows.number(name, q, PROXY) for q in (training.TRAINING, training.VALIDATION)}
        for name in (_PLAIN, _setting(*CHOSEN))
    )
    if not plain[training.TRAINING] >= 0 or not chosen[training.TRAINING] >= 0:
        return "not trained yet"
    return (
        f"without regularisation {plain[training.TRAINING]:.2f} % of the training and "
        f"{plain[training.VALIDATION]:.2f} % of the held-out pictures, with it "
        f"{chosen[training.TRAINING]:.2f} and {chosen[training.VALIDATION]:.2f} %"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Can a network for two CPU cores show the paper's effects?",
    items=items,
    tables=tables,
    answer=answer,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
