"""How long the demo waits for the compiler: with an empty cache, and with all programs in it.

    python -m experiments.digits.compilation

Each row of `compilation.csv` is one run of `configs/digits.py` from the start, in a process of its
own; both use one cache of compiled programs, which is empty before the first.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
RESULTS = FOLDER / "compilation.csv"

_SUMMARY = re.compile(
    r"stood still for compilation ([\d.]+) s of ([\d.]+) s \(([\d.]+) %\); "
    r"of (\d+) programs (\d+) were in the cache"
)
_STAGE = re.compile(r"compiled the train step for (\d+) px in ([\d.]+) s, ([\d.]+) s of them")


def measure(config: Sequence[str], cache: str, workdir: str) -> dict[str, str]:
    """Runs `main` once on the CPU and reads its log.

    Args:
      config: the flags that name the configuration and change it.
      cache: folder of compiled programs.
      workdir: of the run.
    """
    command = [sys.executable, "-m", "effnetv2_jax.main", *config, f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    begun = time.monotonic()
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, check=True
    )
    seconds = time.monotonic() - begun
    summary = _SUMMARY.search(run.stderr)
    assert summary is not None
    waited, after_first, share, programs, from_cache = summary.groups()
    stages = [f"{size} px {took} ({hidden})" for size, took, hidden in _STAGE.findall(run.stderr)]
    return {
        "total_seconds": f"{seconds:.0f}",
        "seconds_after_first_step": after_first,
        "waited_seconds": waited,
        "waited_percent": share,
        "programs": programs,
        "programs_in_cache": from_cache,
        "train_steps_compiled_seconds_hidden": "; ".join(stages),
        "cpu_cores": str(os.cpu_count()),
    }


def main() -> None:
    """Writes both rows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in ("empty cache", "full cache"):
            workdir = f"{folder}/{name.partition(' ')[0]}"
            row = measure(["--config=configs/digits.py"], f"{folder}/cache", workdir)
            rows.append({"run": name, **row})
            print(rows[-1], flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
