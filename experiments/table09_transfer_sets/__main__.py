"""Table 9: examples and classes of the transfer sets, and of ImageNet."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from effnetv2_jax.data import datasets
from effnetv2_jax.data.sizes import published_sizes
from effnetv2_jax.recipes import TRANSFER_DATA, imagenet1k, imagenet21k, transfer
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown, shown

_VARIANT = "efficientnetv2-s"  # No number here depends on it.


class Published(NamedTuple):
    """A number of the paper, rounded to a multiple of `unit`."""

    value: int
    unit: int = 1

    @property
    def text(self) -> str:
        """With `about` where it is rounded."""
        return f"{self.value:,}" if self.unit == 1 else f"about {self.value:,}"

    def agrees(self, number: float) -> bool:
        """Whether a number is this one after rounding; an unknown one (NaN) is not."""
        return not math.isnan(number) and round(number / self.unit) * self.unit == self.value


_QUANTITIES = ("train", "eval", "classes")
# Table 9, and sections 5.1 and 5.2: training examples, evaluation examples, classes.
PAPER = {
    "cifar10": (Published(50_000), Published(10_000), Published(10)),
    "cifar100": (Published(50_000), Published(10_000), Published(100)),
    "flowers": (Published(2_040), Published(6_149), Published(102)),
    "cars": (Published(8_144), Published(8_041), Published(196)),
    "imagenet-1k": (Published(1_280_000, 10_000), Published(50_000), Published(1_000)),
    "imagenet-21k": (
        Published(13_000_000, 1_000_000),
        Published(100_000),
        Published(21_841),
    ),
}
# Where a number is not the paper's: why.
_REASONS = {("imagenet-21k", "train"): "fall 2011, the release with the paper's classes, has more"}


def _config(name: str) -> ConfigDict:
    """Of the run on that data by the paper's recipe."""
    if name in TRANSFER_DATA:
        return transfer(_VARIANT, name, "paper")
    return (imagenet1k if name == "imagenet-1k" else imagenet21k)(_VARIANT, "paper")


def _measure(name: str) -> dict[str, str | int]:
    config = _config(name)
    sizes = published_sizes(config.data.name)
    # The splits of a data set of TFDS, of which a release may be named behind a slash.
    train_split, eval_split = datasets.TFDS_SPLITS[config.data.name.partition("/")[0]]
    return {
        "data set": config.data.name,
        "train": sizes.train,
        "eval": sizes.eval,
        "classes": sizes.classes,
        "training split": train_split,
        "evaluation split": eval_split,
        "examples in an epoch of training": plan_of(config).num_train_examples,
    }


def items() -> Sequence[Item]:
    """Each data set."""
    packages = ("tensorflow-datasets", "tensorflow-cpu")
    return [Item(EXACT, n, functools.partial(_measure, n), packages=packages) for n in PAPER]


def _verdict(rows: Rows, name: str, quantity: str, published: Published) -> str:
    """Whether a number is the paper's, or why not."""
    if published.agrees(rows.number(name, quantity)):
        return "yes"
    return f"no: {_REASONS.get((name, quantity), 'unexplained')}"


def tables(rows: Rows) -> Mapping[str, str]:
    """Sizes beside the paper's, and what a run makes of them."""
    sizes = [
        (
            rows.find(name, "data set"),
            quantity,
            shown(rows.number(name, quantity), ",.0f"),
            number.text,
            _verdict(rows, name, quantity, number),
        )
        for name, published in PAPER.items()
        for quantity, number in zip(_QUANTITIES, published, strict=True)
    ]
    quantities = ("training split", "evaluation split")
    splits = [
        (
            rows.find(name, "data set"),
            *(rows.find(name, quantity) for quantity in quantities),
            shown(rows.number(name, "examples in an epoch of training"), ",.0f"),
        )
        for name in PAPER
    ]
    return {
        "conclusion": f"{answer(rows)}.",
        "sizes": markdown(("data set", "of", "here", "the paper's", "equal"), sizes),
        "splits": markdown(("data set", *quantities, "examples in an epoch of training"), splits),
    }


def answer(rows: Rows) -> str:
    """How many numbers agree."""

    def count(names: Sequence[str]) -> str:
        found = [
            number.agrees(rows.number(name, quantity))
            for name in names
            for quantity, number in zip(_QUANTITIES, PAPER[name], strict=True)
        ]
        return f"{sum(found)} of {len(found)}"

    transferred = [name for name in PAPER if name in TRANSFER_DATA]
    others = [name for name in PAPER if name not in TRANSFER_DATA]
    return (
        f"{count(transferred)} numbers of Table 9 are the same, and {count(others)} of sections "
        "5.1 and 5.2 on ImageNet"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Are the transfer sets split as in Table 9?",
    items=items,
    tables=tables,
    answer=answer,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
