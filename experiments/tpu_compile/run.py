"""Compiles the steps of the paper's runs for TPUv3, without a TPU, and draws up the tables.

    pip install -e '.[tpu]'
    python experiments/tpu_compile/run.py            # what is missing in results.csv, and tables
    python experiments/tpu_compile/run.py --tables   # README's tables alone

Each command of `tools.tpu_compile` below runs in a process of its own, and its rows are added to
`results.csv` one by one, so that a sweep that is stopped goes on where it was. All of it takes
hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
RESULTS = FOLDER / "results.csv"

POD = "v3:4x4"  # The paper's 32 cores.
# Figure 3 of the paper: one image size, 32 images a core.
FIXED_SIZE = {"progressive.num_stages": 1, "batch_size": 1024}
SMALL = {"model.depth_multiplier": 0.1, "progressive.num_stages": 1}
# Cores of a v3 topology: two a chip.
TOPOLOGIES = {8: "v3:2x2", 32: POD, 128: "v3:8x8", 2048: "v3:32x32"}


def commands() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Configuration, topology and overrides of each compilation, the important ones first."""
    yield "configs/s.py", POD, {**FIXED_SIZE, "progressive.image_size": "(300, 300)"}
    yield "configs/l_21k.py", POD, {**FIXED_SIZE, "progressive.image_size": "(384, 384)"}
    for name in ("s", "m", "l", "s_21k", "l_21k", "xl_21k"):
        yield f"configs/{name}.py", POD, {}
    for name in ("m", "l"):
        yield f"configs/{name}.py", POD, {**FIXED_SIZE, "progressive.image_size": "(380, 380)"}
    for cores, topology in TOPOLOGIES.items():
        size = {"progressive.image_size": "(128, 128)", "batch_size": 32 * cores}
        yield "configs/s.py", topology, {**SMALL, **size, "eval.batch_size": 32 * cores}
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


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", action="store_true", help="compile nothing")
    if not parser.parse_args().tables and compile_all():
        print("error: some commands failed, see above.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
