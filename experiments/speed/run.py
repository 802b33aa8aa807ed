"""This project beside the libraries that one could use instead, on the CPU.

    make .venv-peers/installed-peers
    .venv-peers/bin/python -m experiments.speed.run            # what is missing, then the tables
    .venv-peers/bin/python -m experiments.speed.run --tables   # README's tables alone

Each row of `results.csv` is one program on one piece of work (`tools.benchmark`): all programs of
one piece run in turn, so only rows of the same piece may be compared. `progressive.csv` and
`startup.csv` have the rows of whole runs. A sweep that is stopped goes on where it was, and
measures anew on another processor; `--again=NAME` measures a piece of work once more. Leave the
machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effnetv2_jax.benchmark.protocol import WITHOUT_SPLIT, Work
from effnetv2_jax.tools.benchmark import PEERS, Result, compare, format_results, startup
from experiments.experiment import write_tables
from experiments.provenance import commit, host
from experiments.speed import progressive
from experiments.speed.photographs import make_photographs

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.csv"
STARTUP = FOLDER / "startup.csv"
TPU_RESULTS = FOLDER.parent / "tpu_compile" / "results.csv"
OPERATIONS = FOLDER / "operations.csv"
LAYERS = FOLDER / "layers.csv"
GROWTH_PLOT = FOLDER / "growth.png"
PHOTOGRAPHS = FOLDER.parents[1] / ".cache" / "photographs"

TOPICS = ("train", "inference", "optimisations", "predict", "input", "generation", "growth")
RUNS = ("startup", "progressive")
_PYTORCH = ("timm", "torchvision")
# Faster at equal accuracy, by the paper (Table 11), and by how much on its V100.
PAPER_PAIRS = {
    ("efficientnetv2-b0", "efficientnet-b1"): 2.1,
    ("efficientnetv2-b1", "efficientnet-b2"): 2.0,
    ("efficientnetv2-b3", "efficientnet-b4"): 2.7,
    ("efficientnetv2-s", "efficientnet-b5"): 3.1,
}
# Inference sizes of those (Table 11; Tan & Le 2019 for V1).
_SIZES = {
    "efficientnetv2-b0": 224,
    "efficientnetv2-b1": 240,
    "efficientnetv2-b3": 300,
    "efficientnetv2-s": 384,
    "efficientnet-b1": 240,
    "efficientnet-b2": 260,
    "efficientnet-b4": 380,
    "efficientnet-b5": 456,
}
_STAGE_SIZES = (128, 185, 243, 300)
# What a step grows with, one at a time from B0 at 128 px with 8 images.
_GROWTH_SIZE, _GROWTH_BATCH = 128, 8
GROWTH = {
    "batch_size": (4.0, 8.0, 16.0, 32.0),
    "image_size": (64.0, 128.0, 192.0, 256.0),
    "depth_multiplier": (1.0, 2.0, 4.0),
}
_S, _M, _B0 = "efficientnetv2-s", "efficientnetv2-m", "efficientnetv2-b0"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of work and who does it.

    Attributes:
      topic: which table it belongs to.
      goal: how many times faster than timm it should be; 0: nothing was promised.
      work: what is done.
      others: besides this project.
    """

    topic: str
    goal: float
    work: Work
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tells pieces apart."""
        work = self.work
        more = f" magnitude {work.randaug_magnitude}" if work.kind == "input" else ""
        if work.depth_multiplier != 1.0:
            more = f" depth {work.depth_multiplier:g}"
        return f"{self.topic} {work.variant} {work.image_size} px x {work.batch_size}{more}"


def pieces(threads: int) -> Iterator[Piece]:
    """Everything that is measured, the goals first."""

    def work(kind: str, variant: str, size: int, batch: int, **more: Any) -> Work:
        return Work(kind, variant, size, batch, threads=threads, **more)

    for variant, size, batch, others in (
        (_S, 128, 8, (*_PYTORCH, "keras-tf", "flax")),
        (_B0, 192, 16, ("timm", "keras-tf", "keras-jax", "flax")),
        (_S, 224, 4, ("timm", "flax")),
    ):
        yield Piece("train", 1.0, work("train", variant, size, batch), others)
    for variant, size, batch, others in (
        (_B0, 224, 16, ("timm", "timm-compile", "keras-tf", "keras-jax", "flax")),
        (_S, 384, 1, (*_PYTORCH, "flax")),
        (_S, 384, 16, _PYTORCH),
        (_M, 480, 1, _PYTORCH),
    ):
        yield Piece("inference", 1.2, work("inference", variant, size, batch), others)
    for kind, variant, size, batch in (
        ("train", _B0, 192, 16),
        ("inference", _B0, 224, 16),
        ("inference", _S, 384, 1),
    ):
        without = tuple(name for name in PEERS if name.startswith("without-"))
        if kind == "train" or batch == 1:  # Which are on one device anyway.
            without = tuple(name for name in without if name != WITHOUT_SPLIT)
        yield Piece("optimisations", 0.0, work(kind, variant, size, batch), without)
    for magnitude in (15.0, None):
        for size in _STAGE_SIZES if magnitude else (300,):
            images = work(
                "input", "", size, 64, folder=str(PHOTOGRAPHS), randaug_magnitude=magnitude
            )
            yield Piece("input", 1.5 if magnitude else 0.0, images, _PYTORCH)
    images = work("predict", _B0, 224, 32, folder=str(PHOTOGRAPHS))
    yield Piece("predict", 0.0, images, _PYTORCH)
    for pair in PAPER_PAIRS:
        for variant in pair:
            yield Piece("generation", 0.0, work("inference", variant, _SIZES[variant], 8))
    for batch in GROWTH["batch_size"]:
        yield Piece("growth", 0.0, work("train", _B0, _GROWTH_SIZE, int(batch)))
    for size in GROWTH["image_size"]:
        if size != _GROWTH_SIZE:
            yield Piece("growth", 0.0, work("train", _B0, int(size), _GROWTH_BATCH))
    for depth in GROWTH["depth_multiplier"]:
        if depth != 1.0:
            shape = ("train", _B0, _GROWTH_SIZE, _GROWTH_BATCH)
            yield Piece("growth", 0.0, work(*shape, depth_multiplier=depth))
    # Shapes that no goal names.
    for variant, size, batch in (("efficientnet-b0", 160, 8), ("efficientnetv2-b1", 96, 32)):
        yield Piece("train", 0.0, work("train", variant, size, batch), ("timm",))
        yield Piece("inference", 0.0, work("inference", variant, size, batch), ("timm",))


_COLUMNS = (
    *("name", "topic", "goal", "kind", "variant", "image_size", "batch_size", "dtype"),
    "depth_multiplier",
    *(field.name for field in dataclasses.fields(Result)),
    *("host", "commit", "date"),
)


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _append(piece: Piece, results: Sequence[Result]) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        if is_new:
            writer.writeheader()
        for result in results:
            values = {
                **dataclasses.asdict(piece.work),
                **dataclasses.asdict(result),
                "name": piece.name,
                "topic": piece.topic,
                "goal": piece.goal,
                "host": host(),
                "commit": commit(),
                "date": str(datetime.date.today()),
            }
            row = {name: values[name] for name in _COLUMNS}
            writer.writerow(
                {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()}
            )


def measure(topics: Sequence[str], again: str, runs: int, seconds: float) -> int:
    """Measures what is missing; returns how many programs could not run."""
    make_photographs(PHOTOGRAPHS)
    known = {row["name"] for row in read() if row["host"] == host()}
    wanted = list(pieces(len(os.sched_getaffinity(0))))
    refused = 0

    def refuse(name: str, reason: str) -> None:
        nonlocal refused
        refused += 1
        print(f"  {name} is left out: {reason}.", flush=True)

    for position, piece in enumerate(wanted, 1):
        if piece.topic not in topics or (piece.name in known and piece.name != again):
            continue
        print(f"[{position}/{len(wanted)}] {piece.name}", flush=True)
        results = compare(piece.work, piece.others, runs=runs, seconds=seconds, on_refusal=refuse)
        print(format_results(results), flush=True)
        if piece.name == again:
            _remove(again)
        _append(piece, results)
    return refused


def _remove(name: str) -> None:
    rows = [row for row in read() if row["name"] != name or row["host"] != host()]
    with RESULTS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def measure_startup() -> None:
    """Writes `startup.csv` anew."""
    rows = [
        {**dataclasses.asdict(found), "host": host(), "commit": commit()} for found in startup()
    ]
    with STARTUP.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _pieces_of(rows: Sequence[dict[str, str]], topic: str) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["topic"] == topic:
            found.setdefault(row["name"], []).append(row)
    return found


def comparison_table(rows: Sequence[dict[str, str]], topic: str) -> str:
    """Images a second of every program, and how many times as fast this project is."""
    hosts = {row["host"]: None for row in rows if row["topic"] == topic}
    lines = [
        f"On {' and '.join(hosts)}:",
        "",
        "| work | program | images/s (lowest to highest) | ours is | goal | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group in _pieces_of(rows, topic).values():
        for row in group:
            what = f"{row['variant'] or 'JPEG files'}, {row['image_size']} px, {row['batch_size']}"
            if topic == "optimisations":
                what = f"{row['kind']}, {what}"
            if topic == "input":
                what += " RandAugment" if "magnitude 15" in row["name"] else " without RandAugment"
            is_ours = row["program"] == "ours"
            goal = {"timm": float(row["goal"]), "flax": 5.0 if topic == "train" else 0.0}
            wanted = goal.get(row["program"], 0.0) if float(row["goal"]) else 0.0
            lines.append(
                f"| {what if is_ours else ''} | {row['program']} | "
                f"{float(row['images_per_second']):.4g} ({float(row['lowest']):.4g} to "
                f"{float(row['highest']):.4g}) | "
                f"{'' if is_ours else format(float(row['ratio']), '.2f') + ' x'} | "
                f"{format(wanted, '.1f') + ' x' if wanted else ''} | "
                f"{float(row['peak_mib']):.0f} |"
            )
    return "\n".join(lines)


def _generation_ratios(
    rows: Sequence[dict[str, str]],
) -> Iterator[tuple[float, tuple[str, str, float, float]]]:
    """V2 over V1, and names and images a second of both."""
    rates = {
        row["variant"]: float(row["images_per_second"])
        for row in rows
        if row["topic"] == "generation"
    }
    for new, old in PAPER_PAIRS:
        if new in rates and old in rates:
            yield rates[new] / rates[old], (new, old, rates[new], rates[old])


def generation_table(rows: Sequence[dict[str, str]]) -> str:
    """V2 against V1 at equal accuracy."""
    lines = [
        "| V2 | V1 of equal accuracy | V2, images/s | V1, images/s | ratio | the paper's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ratio, (new, old, new_rate, old_rate) in _generation_ratios(rows):
        lines.append(
            f"| {new}, {_SIZES[new]} px | {old}, {_SIZES[old]} px | {new_rate:.4g} | "
            f"{old_rate:.4g} | {ratio:.1f} | {PAPER_PAIRS[new, old]} |"
        )
    return "\n".join(lines)


def growth_table(rows: Sequence[dict[str, str]]) -> str:
    """Milliseconds and memory of a step against one number at a time."""
    lines = [
        "| varied | value | ms a step | ms relative to its multiply-adds | peak MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for axis in GROWTH:
        points = _growth(rows, axis)
        for value, seconds, gflop, peak in points:
            reference = points[-1][1] / points[-1][2]
            lines.append(
                f"| {axis} | {value:g} | {1e3 * seconds:.0f} | {seconds / gflop / reference:.2f} "
                f"| {peak:.0f} |"
            )
    return "\n".join(lines)


def _growth(rows: Sequence[dict[str, str]], axis: str) -> list[tuple[float, float, float, float]]:
    """Value, seconds of a step, its arithmetic in GFLOP and peak memory in MiB, sorted."""
    base = {
        "image_size": float(_GROWTH_SIZE),
        "batch_size": float(_GROWTH_BATCH),
        "depth_multiplier": 1.0,
    }
    points = []
    for row in rows:
        here = {name: float(row[name] or 1.0) for name in base}
        if row["topic"] == "growth" and here == {**base, axis: here[axis]}:
            seconds = here["batch_size"] / float(row["images_per_second"])
            gflop = seconds * float(row["gflops_per_second"])
            points.append((here[axis], seconds, gflop, float(row["peak_mib"])))
    return sorted(points)


def plot_growth(rows: Sequence[dict[str, str]]) -> None:
    """Writes `growth.png`: time and memory against what they should be linear in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.5), sharey="row", layout="constrained")
    labels = {
        "batch_size": ("images", 1),
        "image_size": ("pixels of an image / 1000", 2),
        "depth_multiplier": ("depth multiplier", 1),
    }
    for column, (axis, (label, power)) in enumerate(labels.items()):
        points = _growth(rows, axis)
        x = [value**power / (1000 if power == 2 else 1) for value, *_ in points]
        panels[0, column].plot(x, [1e3 * seconds for _, seconds, *_ in points], "o-")
        panels[1, column].plot(x, [peak for *_, peak in points], "o-", color="tab:orange")
        panels[1, column].set_xlabel(label)
    # Rows share their scale: a limit that is set before all is drawn would cut the rest off.
    for panel in panels.flat:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("peak MiB")
    figure.suptitle("A training step of EfficientNetV2-B0, 128 px, 8 images, one number varied")
    figure.savefig(GROWTH_PLOT, dpi=90)
    pyplot.close(figure)


def host_table(rows: Sequence[dict[str, str]]) -> str:
    """How many cores of a TPU's host the input takes, by the TPU compiler's estimate of a step."""
    made = {
        int(row["image_size"]): float(row["images_per_second"]) / int(row["threads"])
        for row in rows
        if row["topic"] == "input" and row["program"] == "ours" and "magnitude 15" in row["name"]
    }
    lines = [
        "| image size, px | images/s that 8 TPUv3 cores take | images/s that a host core makes "
        "| host cores |",
        "| --- | --- | --- | --- |",
    ]
    for row in read(TPU_RESULTS):
        size = int(row["image_size"])
        what = (row["step"], row["run"], row["batch_per_core"])
        if what == ("train", "efficientnetv2-s on imagenet2012", "128") and size in made:
            taken = 8 * float(row["images_per_second_per_core"])
            lines.append(
                f"| {size} | {taken:.0f} | {made[size]:.0f} | {math.ceil(taken / made[size])} |"
            )
    return "\n".join(lines)


def startup_table() -> str:
    """Seconds until something happens, with the goals."""
    goals = {"main --help": "1", "import effnetv2_jax": "2", "first step": "30"}
    lines = ["| | s (lowest to highest) | goal, s |", "| --- | --- | --- |"]
    for row in read(STARTUP):
        goal = next((goal for begin, goal in goals.items() if row["what"].startswith(begin)), "")
        seconds, lowest, highest = (float(row[name]) for name in ("seconds", "lowest", "highest"))
        lines.append(f"| {row['what']} | {seconds:.2f} ({lowest:.2f} to {highest:.2f}) | {goal} |")
    return "\n".join(lines)


def operations_table() -> str:
    """`operations.csv`."""
    lines = ["| work | kind | ms a step |", "| --- | --- | --- |"]
    lines += [f"| {row['work']} | {row['kind']} | {row['ms']} |" for row in read(OPERATIONS)]
    return "\n".join(lines)


def layers_table() -> str:
    """`layers.csv`, both lowerings side by side."""
    lines = [
        "| layer | direction | XLA, ms (of all cores) | ours, ms (of all cores) | ours, GFLOP/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = read(LAYERS)
    for xla in rows:
        if xla["lowering"] == "xla":
            key = (xla["layer"], xla["direction"], "ours")
            (own,) = [r for r in rows if (r["layer"], r["direction"], r["lowering"]) == key]
            lines.append(
                f"| {xla['layer']} | {xla['direction']} | {xla['ms']} ({xla['ms_of_all_cores']}) | "
                f"{own['ms']} ({own['ms_of_all_cores']}) | {own['gflops_per_second']} |"
            )
    return "\n".join(lines)


def other_hosts_table(rows: Sequence[dict[str, str]]) -> str:
    """What other processors gave, at earlier commits."""
    lines = ["| processor | commit | work | program | ours is |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['host']} | {row['commit'].removesuffix('-dirty')} | {row['name']} | "
        f"{row['program']} | {float(row['ratio']):.2f} x |"
        for row in rows
        if row["program"] != "ours"
    ]
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    """The lowest and the highest, if they differ."""
    lowest, highest = (f"{value:.2f}" for value in (min(values), max(values)))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def summary(rows: Sequence[dict[str, str]]) -> str:
    """What was aimed at and what came out, where there are goals."""

    def against(topic: str, program: str, quantity: str = "ratio") -> list[float]:
        """Of every piece of work with a goal: this project's number, as a multiple of another's."""
        found = []
        for group in _pieces_of(rows, topic).values():
            by_program = {row["program"]: row for row in group}
            if program in by_program and float(group[0]["goal"]):
                own, other = by_program["ours"], by_program[program]
                found.append(
                    float(other["ratio"])
                    if quantity == "ratio"
                    else float(own[quantity]) / float(other[quantity])
                )
        return found

    lines = []
    for what, topic, program, quantity, goal in (
        ("a training step: speed", "train", "timm", "ratio", "at least 1"),
        ("a training step: speed", "train", "flax", "ratio", "at least 5"),
        ("a training step: peak memory", "train", "timm", "peak_mib", "at most 1"),
        ("inference: speed", "inference", "timm", "ratio", "at least 1.2"),
        ("input: speed", "input", "timm", "ratio", "at least 1.5"),
    ):
        if values := against(topic, program, quantity):
            other = "plain Flax" if program == "flax" else program
            lines.append(f"| {what} | {_span(values)} x {other} | {goal} |")
    ratios = [ours for ours, _ in _generation_ratios(rows)]
    if ratios:
        lines.append(f"| V2 against V1 of equal accuracy: speed | {_span(ratios)} x V1 | above 1 |")
    if gains := progressive.speed_ups():
        lines.append(
            f"| progressive sizes: a whole run | {_span(gains)} x as fast as one size | "
            f"{progressive.PAPER} |"
        )
    return "\n".join(["| work | reached | goal |", "| --- | --- | --- |", *lines])


def tables(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Each table of README by the name of its marks; each topic's last host is shown."""
    last = {row["topic"]: row["host"] for row in rows}
    here = [row for row in rows if row["host"] == last[row["topic"]]]
    others = [row for row in rows if row["host"] != last[row["topic"]]]
    compared = ("train", "inference", "optimisations", "predict", "input")
    found = {
        "summary": summary(here),
        **{topic: comparison_table(here, topic) for topic in compared},
        "generation": generation_table(here),
        "host": host_table(here),
        "growth": growth_table(here),
        "startup": startup_table(),
        "progressive": progressive.table(),
        "other-hosts": other_hosts_table(others),
        "operations": operations_table(),
        "layers": layers_table(),
    }
    is_empty = {name: table.endswith("| --- |") for name, table in found.items()}
    return {name: "Not measured yet." if is_empty[name] else found[name] for name in found}


def draw() -> None:
    """Tables, here and in the front page, and the plot anew from the rows."""
    rows = read()
    found = tables(rows)
    write_tables(FOLDER / "README.md", found)
    write_tables(FOLDER.parents[1] / "README.md", {"speed": found["summary"]})
    if any(row["topic"] == "growth" for row in rows):
        plot_growth(rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", action="store_true", help="only write README's tables")
    everything = (*TOPICS, *RUNS)
    parser.add_argument("--topics", nargs="+", choices=everything, default=everything)
    parser.add_argument("--again", default="", help="name of a piece of work to measure again")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each program")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a run, about")
    arguments = parser.parse_args()
    refused = 0
    if not arguments.tables:
        refused = measure(arguments.topics, arguments.again, arguments.runs, arguments.seconds)
        if "startup" in arguments.topics and not STARTUP.is_file():
            measure_startup()
        if "progressive" in arguments.topics:
            progressive.run_missing()
    draw()
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
