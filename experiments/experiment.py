"""What every experiment is: rows that are measured once, and a page drawn from them.

An experiment is a folder with a `__main__.py` that defines `EXPERIMENT`. Its rows stand in
`results.csv`, one number each with where it comes from; its tables stand in `README.md` between
marks, `<!-- name -->` and `<!-- /name -->`. A sweep that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from effnetv2_jax.errors import InputError
from effnetv2_jax.progressive import format_stages
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments.estimates import Run
from experiments.provenance import commit, host, versions

ROOT = Path(__file__).resolve().parents[1]

# How a number was come by. `exact` ones are counted and belong to every scale.
EXACT, TPU_ESTIMATE, CPU, PROXY, PAPER = "exact", "tpu-estimate", "cpu", "proxy", "paper"
SCALES = {
    EXACT: "counted from the network or the recipe, in seconds",
    TPU_ESTIMATE: "the TPU compiler's estimate for 32 cores of TPUv3, without a TPU",
    CPU: "measured on this machine's processor",
    PROXY: "really trained, small enough for two CPU cores",
    PAPER: "full size: prints the commands, which need a pod, and their stages",
}
NOT_RUN = "not run at this scale"

Value = float | int | str


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      scale: of `SCALES`.
      item: what it is of.
      quantity: its name with its unit, as `FLOPs, G`.
      value: a number, or words such as `out of memory`.
      seconds: that the item took, all of its quantities together.
      seed: of random numbers, if there are any.
      device: what the number is for: `cpu`, or a topology.
      host: processor and Python that computed it.
      versions: of the libraries that matter.
      commit: of this project.
      date: of the computation.
    """

    scale: str
    item: str
    quantity: str
    value: str
    seconds: str = ""
    seed: str = ""
    device: str = ""
    host: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


_COLUMNS = [field.name for field in dataclasses.fields(Row)]


class Rows(tuple[Row, ...]):
    """Rows by what they are of."""

    def find(self, item: str, quantity: str, scale: str | None = None) -> str:
        """The value as it is written, or an empty string; of several the last."""
        found = [
            row.value
            for row in self
            if (row.item, row.quantity) == (item, quantity) and scale in (None, row.scale)
        ]
        return found[-1] if found else ""

    def numbers(self, item: str, quantity: str, scale: str) -> list[float]:
        """The values of all seeds."""
        return [
            float(row.value)
            for row in self
            if (row.scale, row.item, row.quantity) == (scale, item, quantity)
        ]

    def number(self, item: str, quantity: str, scale: str | None = None) -> float:
        """The value, or NaN where there is none or where it is words."""
        try:
            return float(self.find(item, quantity, scale))
        except ValueError:
            return math.nan


@dataclasses.dataclass(frozen=True)
class Item:
    """What is measured together and takes a while.

    Attributes:
      scale: of `SCALES`.
      name: of what is measured.
      measure: gives the quantities.
      device: see `Row`.
      seed: see `Row`.
      packages: whose versions matter.
    """

    scale: str
    name: str
    measure: Callable[[], Mapping[str, Value]]
    device: str = "cpu"
    seed: int | None = None
    packages: tuple[str, ...] = ("jax", "flax")

    @property
    def seed_text(self) -> str:
        """As a row has it."""
        return "" if self.seed is None else str(self.seed)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
      folder: where its rows and its page are.
      question: one sentence.
      items: what is to be measured, cheap things first.
      tables: the marks of the page -> Markdown, from the rows.
      answer: one line from the rows, for the index.
      plot: writes the page's pictures into a folder, from the rows.
      paper_runs: what is run on a pod, as (what, command).
    """

    folder: Path
    question: str
    items: Callable[[], Sequence[Item]]
    tables: Callable[[Rows], Mapping[str, str]]
    answer: Callable[[Rows], str]
    plot: Callable[[Rows, Path], None] | None = None
    paper_runs: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @property
    def results(self) -> Path:
        """The file of the rows."""
        return self.folder / "results.csv"

    def rows(self) -> Rows:
        """All rows so far."""
        return read_rows(self.results)

    def missing(self, scales: Iterable[str]) -> list[Item]:
        """What these scales still lack."""
        known = {(row.scale, row.item, row.seed) for row in self.rows()}
        return [
            item
            for item in self.items()
            if item.scale in set(scales) and (item.scale, item.name, item.seed_text) not in known
        ]

    def run(self, scale: str) -> None:
        """Measures what a scale lacks, row by row; what is measured may call for more."""
        done = 0
        while missing := self.missing({EXACT, scale}):
            item = missing[0]
            seed = item.seed_text and f", seed {item.seed}"
            place = f"[{done + 1}/{done + len(missing)}] {self.name}, {item.scale}"
            print(f"{place}: {item.name}{seed}", flush=True)
            begun = time.monotonic()
            quantities = item.measure()
            assert quantities, item  # Otherwise it would be missing for ever.
            self._append(item, quantities, time.monotonic() - begun)
            print(f"  {', '.join(f'{n}: {_text(v)}' for n, v in quantities.items())}", flush=True)
            done += 1

    def draw(self) -> None:
        """Tables and pictures anew, from the rows."""
        rows = self.rows()
        write_tables(self.folder / "README.md", self.tables(rows))
        if self.plot is not None:
            self.plot(rows, self.folder)

    def state(self) -> str:
        """Done, partly or not run, by scale."""
        items = self.items()
        parts = []
        for scale in SCALES:
            total = sum(item.scale == scale for item in items)
            if total:
                done = total - len(self.missing({scale}))
                parts.append(f"{scale} {'done' if done == total else f'{done} of {total}'}")
        if self.paper_runs:
            parts.append(f"{PAPER} {NOT_RUN}")
        return ", ".join(parts)

    def paper_plan(self) -> str:
        """The commands of the full size, each with the stages that follow from it."""
        if not self.paper_runs:
            return f"{self.name} has nothing to run on a pod."
        lines = [f"{self.name} on 32 cores of TPUv3, not run by this project:"]
        for what, line in self.paper_runs:
            lines += ["", f"{what}: {line}"]
            flags = dict(re.findall(r"^--(config[\w.]*)=(.*)$", "\n".join(shlex.split(line)), re.M))
            if "config" in flags:
                config = flags.pop("config")
                overrides = {key.removeprefix("config."): value for key, value in flags.items()}
                plan = plan_of(Run(config, overrides).load())
                lines += [f"{plan.total_steps:,} steps", format_stages(plan.stages)]
        return "\n".join(lines)

    def _append(self, item: Item, quantities: Mapping[str, Value], seconds: float) -> None:
        is_new = not self.results.exists()
        with self.results.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            for quantity, value in quantities.items():
                row = Row(
                    item.scale,
                    item.name,
                    quantity,
                    _text(value),
                    seconds=f"{seconds:.3g}",
                    seed=item.seed_text,
                    device=item.device,
                    host=host(),
                    versions=versions(item.packages),
                    commit=commit(),
                    date=str(datetime.date.today()),
                )
                writer.writerow(dataclasses.asdict(row))


def _text(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> Rows:
    """The rows of a file; none if there is no file."""
    if not path.is_file():
        return Rows()
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != _COLUMNS:
            raise InputError(
                f"{str(path)!r} has other columns than these experiments write: move it away."
            )
        return Rows(Row(**line) for line in reader)


def markdown(header: Sequence[str], lines: Iterable[Sequence[Value]]) -> str:
    """A table of Markdown; a missing number (NaN) is an empty cell."""

    def cell(value: Value) -> str:
        return "" if isinstance(value, float) and math.isnan(value) else str(value)

    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows)


def shown(value: float, spec: str = ".3g", unknown: str = "") -> str:
    """A number for a cell, or `unknown` where there is none."""
    return unknown if math.isnan(value) else format(value, spec)


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Puts tables between their marks in a page.

    Raises:
      InputError: a table has no marks there.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise InputError(f"{str(page)!r} has no marks <!-- {name} --> and <!-- /{name} -->.")
        text = f"{before}{begin}{table}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def command(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """The command line of one experiment."""
    items = experiment.items()
    scales = [s for s in SCALES if s in (EXACT, PAPER) or any(i.scale == s for i in items)]
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=experiment.question,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scales:\n" + "\n".join(f"  {name:<12} {what}" for name, what in SCALES.items()),
    )
    parser.add_argument("--scale", choices=scales, default=EXACT)
    chosen = parser.parse_args(arguments).scale
    if chosen == PAPER:
        print(experiment.paper_plan())
        return 0
    try:
        try:
            experiment.run(chosen)
        finally:  # What was measured until then is shown.
            experiment.draw()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{experiment.name}: {experiment.answer(experiment.rows())}")
    return 0
