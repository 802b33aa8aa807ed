"""Compiles the steps of the paper's runs for TPUv3, without a TPU, and draws up the tables.

    pip install -e '.[tpu]'
    python -m experiments.tpu_compile.run            # what is missing in results.csv, and tables
    python -m experiments.tpu_compile.run --tables   # README's tables alone

Each command of `tools.tpu_compile` below runs in a process of its own, and its rows are added to
`results.csv` one by one, so that a sweep that is stopped goes on where it was. All of it takes
hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from effnetv2_jax.tools.tpu_compile import (
    DEVICE_KINDS,
    PAPER_HOURS,
    Row,
    estimated_hours,
    read_rows,
    title,
)
from experiments.estimates import POD, RESULTS, Run
from experiments.experiment import write_tables

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]

# Of a v3 chip, which has two cores: 340 TB/s of all-reduce bandwidth in a pod of 1,024 chips ("TPU
# v3", Cloud TPU's page of that name).
_EXCHANGED_BYTES_PER_SECOND = 340e12 / 1024
POD_RUNS = ("s", "m", "l", "s_21k", "l_21k", "xl_21k")
# Figure 3 of the paper: one image size, 32 images a core.
FIXED_SIZE = {"progressive.num_stages": 1, "batch_size": 1024}
SMALL = {"model.depth_multiplier": 0.1, "progressive.num_stages": 1}
# Cores of a v3 topology: two a chip.
TOPOLOGIES = {8: "v3:2x2", 32: POD, 128: "v3:8x8", 2048: "v3:32x32"}


def commands() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Configuration, topology and overrides of each compilation, the important ones first."""
    yield "configs/s.py", POD, {**FIXED_SIZE, "progressive.image_size": "(300, 300)"}
    yield "configs/l_21k.py", POD, {**FIXED_SIZE, "progressive.image_size": "(384, 384)"}
    for name in POD_RUNS:
        yield f"configs/{name}.py", POD, {}
    for name in ("m", "l"):
        yield f"configs/{name}.py", POD, {**FIXED_SIZE, "progressive.image_size": "(380, 380)"}
    for cores, topology in TOPOLOGIES.items():
        size = {"progressive.image_size": "(128, 128)", "batch_size": 32 * cores}
        evaluation = {"eval.image_size": 128, "eval.batch_size": 32 * cores}
        yield "configs/s.py", topology, {**SMALL, **size, **evaluation}
    for cores, topology in TOPOLOGIES.items():
        if cores <= 128 and topology != POD:
            size = {"progressive.image_size": "(300, 300)", "batch_size": 32 * cores}
            yield "configs/s.py", topology, {**FIXED_SIZE, **size, "eval.batch_size": 32 * cores}


def compile_all() -> int:
    """Runs every command; returns how many failed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    failed = 0
    listed = list(commands())
    for position, (config, topology, overrides) in enumerate(listed, 1):
        flags = [f"--config={config}", f"--topology={topology}", f"--results={RESULTS}"]
        flags += [f"--config.{name}={value}" for name, value in overrides.items()]
        print(f"[{position}/{len(listed)}] {' '.join(flags)}", flush=True)
        command = [sys.executable, "-m", "effnetv2_jax.tools.tpu_compile", *flags]
        status = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
        failed += status != 0
    return failed


# Estimates of a plain Flax build of the same networks (without moving averages), and the goals that
# they set: milliseconds by run and image size, 32 images a core.
PLAIN_MS = {("efficientnetv2-s", 300): (56.2, 45.0), ("efficientnetv2-l", 384): (262.0, 195.0)}
# Step times that the paper measured, milliseconds (Figure 3; its image sizes are not given).
FIGURE_3_MS = {"efficientnetv2-s": 73.0, "efficientnetv2-m": 192.0, "efficientnetv2-l": 443.0}


def _variant(row: Row) -> str:
    return row.run.partition(" ")[0]


def _fixed_size(rows: Sequence[Row]) -> list[Row]:
    """The train steps of 32 images a core on the pod, at full depth."""
    return [
        row
        for row in rows
        if (row.step, row.topology, row.batch_per_core) == ("train", POD, 32)
        and row.image_size >= 300
    ]


def goals_table(rows: Sequence[Row]) -> str:
    """The steps that have goals."""
    lines = [
        "| train step, 32 images a core | plain Flax, ms | goal, ms | ours, ms | GB moved | "
        "TFLOP | limit by arithmetic, ms | memory, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in _fixed_size(rows):
        known = PLAIN_MS.get((_variant(row), row.image_size))
        if known is None:
            continue
        tflop = row.gflops_per_image * row.batch_per_core / 1e3
        lines.append(
            f"| {row.run}, {row.image_size} px | {known[0]:g} | {known[1]:g} | "
            f"{row.estimated_ms:.1f} | {row.mbytes_per_image * row.batch_per_core / 1e3:.1f} | "
            f"{tflop:.2f} | {tflop / DEVICE_KINDS['v3'].peak_flops * 1e15:.0f} | "
            f"{row.memory_gib:.1f} of {row.limit_gib:.0f} |"
        )
    return "\n".join(lines)


def _pod_run(name: str) -> tuple[str, list[Row]]:
    """A run's title and the rows of its stages and evaluation; none if one is missing."""
    run = Run(f"configs/{name}.py")
    return title(run.load()), run.known_rows() or []


def fit_table(rows: Sequence[Row]) -> str:
    """Global batches of 4096 on 32 cores, in the settings that `auto` found."""
    lines = [
        "| run | image size, px | micro-batches | block groups rematerialised | "
        "memory, GiB of 16 | estimate, ms a step | images/s/core | MXU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in POD_RUNS:
        run, of_run = _pod_run(name)
        if not of_run:
            lines.append(f"| {run} | not compiled | | | | | | |")
        for row in of_run[:-1]:
            lines.append(
                f"| {run} | {row.image_size} | {row.micro_batches} | {row.remat_groups} | "
                f"{row.memory_gib:.1f} | {row.estimated_ms:.0f} | "
                f"{row.images_per_second_per_core:.0f} | {row.utilisation:.0%} |"
            )
    return "\n".join(lines)


def hours_table(rows: Sequence[Row]) -> str:
    """Whole runs against the paper."""
    lines = [
        "| run on 32 cores of TPUv3, batch 4096 | estimate, h | the paper measured, h | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name in POD_RUNS:
        run, of_run = _pod_run(name)
        paper = PAPER_HOURS[run]
        if of_run:
            hours = estimated_hours(of_run)
            lines.append(f"| {run} | {hours:.1f} | {paper:g} | {hours / paper:.2f} |")
        else:
            lines.append(f"| {run} | not compiled | {paper:g} | |")
    return "\n".join(lines)


def trust_table(rows: Sequence[Row]) -> str:
    """Estimates of steps that the paper measured."""
    lines = [
        "| network, 32 images a core | size compiled, px | estimate, ms | the paper measured, ms | "
        "measured / estimate |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in _fixed_size(rows):
        measured = FIGURE_3_MS.get(_variant(row))
        if measured is not None and row.run.endswith("imagenet2012"):
            lines.append(
                f"| {_variant(row)} | {row.image_size} | {row.estimated_ms:.1f} | {measured:g} | "
                f"{measured / row.estimated_ms:.2f} |"
            )
    return "\n".join(lines)


def cores_table(rows: Sequence[Row]) -> str:
    """How exchanging data grows with the number of cores."""
    lines = [
        "| network, 32 images a core | cores | collectives | MB a core exchanges in a step | "
        "exchange at full bandwidth, ms | estimate, ms | compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, network in ((128, "S with a tenth of its depth, 128 px"), (300, "S, 300 px")):
        for cores, topology in TOPOLOGIES.items():
            for row in rows:
                if (
                    (row.step, row.topology, row.batch_per_core) == ("train", topology, 32)
                    and row.image_size == size
                    and _variant(row) == "efficientnetv2-s"
                ):
                    exchange_ms = 2 * row.collective_mbytes * 1e9 / _EXCHANGED_BYTES_PER_SECOND
                    lines.append(
                        f"| {network} | {cores} | {row.collectives} | "
                        f"{row.collective_mbytes:.1f} | {exchange_ms:.2f} | "
                        f"{row.estimated_ms:.2f} | "
                        f"{row.compile_seconds:.0f} |"
                    )
    return "\n".join(lines)


def levers_table() -> str:
    """`levers.csv` with what each lever is."""
    with (FOLDER / "levers.csv").open(newline="", encoding="utf-8") as stream:
        levers = list(csv.DictReader(stream))
    lines = [
        "| change | estimate, ms | GB moved | TFLOP | memory, GiB | by cycles, ms | compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['what']} | {row['estimated_ms']} | {row['gb_moved']} | {row['tflop']} | "
        f"{row['memory_gib']} | {row['cycles_ms']} | {row['compile_seconds']} |"
        for row in levers
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The tables of README.md by the marks around them."""
    rows = read_rows(RESULTS)
    return {
        "goals": goals_table(rows),
        "fit": fit_table(rows),
        "hours": hours_table(rows),
        "trust": trust_table(rows),
        "cores": cores_table(rows),
        "levers": levers_table(),
    }


def draw() -> None:
    """The tables anew from the rows."""
    write_tables(FOLDER / "README.md", tables())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", action="store_true", help="compile nothing")
    failed = 0 if parser.parse_args().tables else compile_all()
    draw()
    if failed:
        print(f"error: {failed} commands failed, see above.", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
