"""All experiments of the paper's tables and figures.

python -m experiments            # the state of each
python -m experiments --draw     # all tables, pictures and the index from the rows
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from effnetv2_jax.errors import InputError
from experiments.experiment import Experiment, markdown, write_tables
from experiments.speed import run as speed
from experiments.tpu_compile import run as tpu_compile

FOLDER = Path(__file__).resolve().parent


def experiments() -> Iterator[Experiment]:
    """Every folder that defines one, by name."""
    for path in sorted(FOLDER.glob("*/__main__.py")):
        module = importlib.import_module(f"experiments.{path.parent.name}.__main__")
        experiment: Experiment = module.EXPERIMENT
        yield experiment


def index_table() -> str:
    """Question and answer of each, for the index."""
    return markdown(
        ("folder", "question", "answer", "state"),
        [
            (f"[{e.name}]({e.name})", e.question, e.answer(e.rows()), e.state())
            for e in experiments()
        ],
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="The paper's tables and figures against this project: the state of each.",
    )
    parser.add_argument(
        "--draw", action="store_true", help="write all tables, pictures and the index anew"
    )
    draw = parser.parse_args().draw
    try:
        for experiment in experiments():
            if draw:
                experiment.draw()
            print(f"{experiment.name:<26} {experiment.state()}")
        if draw:
            speed.draw()
            tpu_compile.draw()
            write_tables(FOLDER / "README.md", {"paper": index_table()})
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
