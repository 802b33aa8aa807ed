"""The TPU compiler's estimates of a run's steps, compiled once for all experiments.

They are rows of `experiments/tpu_compile/results.csv`, written by `tools.tpu_compile`, which
compiles for TPUv3 on any machine. What is there already is not compiled again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.tpu_compile import (
    STEPS,
    Row,
    estimated_hours,
    num_eval_steps,
    plan_of,
    read_rows,
    title,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "tpu_compile" / "results.csv"
POD = "v3:4x4"  # The paper's 32 cores.
CORES = 32
# Of the items that rest on it, for `experiment.Item.packages`.
PACKAGES = ("jax", "libtpu")

# A step that is compiled as it is, as the paper timed it: neither micro-batches nor
# rematerialisation.
_AS_IT_IS = {"memory.micro_batches": "1", "memory.remat_groups": "0"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration whose steps are compiled.

    Attributes:
      config: file and argument, as `configs/v1.py:b4`.
      overrides: key -> value, as `--config.KEY=VALUE` would have them.
      steps: of `tpu_compile.STEPS`.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[str, ...] = STEPS

    def load(self) -> ConfigDict:
        """The configuration."""
        name, _, argument = self.config.partition(":")
        spec = importlib.util.spec_from_file_location("config", ROOT / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config: ConfigDict = module.get_config(argument or None)
        values = {}
        for key, value in self.overrides.items():
            current = functools.reduce(lambda section, name: section[name], key.split("."), config)
            is_text = isinstance(value, str) and not isinstance(current, str)
            values[key] = ast.literal_eval(value) if is_text else value
        config.update_from_flattened_dict(values)
        return config

    def known_rows(self) -> list[Row] | None:
        """The rows of every step, in order; None if one was not compiled yet.

        A step that is compiled as it is may be one that does not fit.
        """
        config = self.load()
        memory = (config.memory.micro_batches, config.memory.remat_groups)
        return self._find(as_it_is=memory == ("1", "0"), fitting=memory != ("1", "0"))

    def rows(self) -> list[Row]:
        """The rows of every step, compiled now where they are missing.

        Raises:
          InputError: the compiler is not there, or failed.
        """
        rows = self.known_rows()
        if rows is not None:
            return rows
        flags = [f"--config={self.config}", f"--topology={POD}", f"--results={RESULTS}"]
        flags += [f"--steps={','.join(self.steps)}"]
        flags += [f"--config.{name}={value}" for name, value in self.overrides.items()]
        command = [sys.executable, "-m", "effnetv2_jax.tools.tpu_compile", *flags]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        # Status 1: a step does not fit however it is cut down.
        rows = self._find(as_it_is=False, fitting=False) if done.returncode == 1 else None
        rows = self.known_rows() or rows
        if rows is None:
            raise InputError(
                f"`{' '.join(command[1:])}` ended with status {done.returncode} and without a row "
                "for every step: see above."
            )
        return rows

    def _find(self, *, as_it_is: bool, fitting: bool) -> list[Row] | None:
        config = self.load()
        plan = plan_of(config)
        rows = [
            row
            for row in read_rows(RESULTS)
            if (row.run, row.topology) == (title(config), POD)
            and (row.fits or not fitting)
            and (row.micro_batches + row.remat_groups == 1 or not as_it_is)
        ]

        def find(step: str, size: int, per_core: int) -> Row | None:
            key = (step, size, per_core)
            found = [r for r in rows if (r.step, r.image_size, r.batch_per_core) == key]
            return found[-1] if found else None

        wanted: list[Row | None] = []
        if "train" in self.steps:
            for stage in plan.stages:
                row = find("train", stage.image_size, config.batch_size // CORES)
                wanted.append(row and dataclasses.replace(row, steps=stage.num_steps))
        if "eval" in self.steps:
            per_core = -(-config.eval.batch_size // CORES)
            row = find("eval", config.eval.image_size, per_core)
            steps = num_eval_steps(config, plan, per_core * CORES)
            wanted.append(row and dataclasses.replace(row, steps=steps))
        return None if None in wanted else [row for row in wanted if row is not None]

    def hours(self) -> float:
        """Of the whole run on 32 cores, without input and compilation; NaN if a step is missing."""
        rows = self.known_rows()
        if not rows or not all(row.fits for row in rows):
            return math.nan
        return estimated_hours(rows)


def train_step(config: str, image_size: int, batch_per_core: int) -> Run:
    """The train step of one image size as it is, without micro-batches or rematerialisation."""
    overrides = {
        "progressive.num_stages": 1,
        "progressive.order": "rising",
        "progressive.image_size": (image_size, image_size),
        "batch_size": CORES * batch_per_core,
        **_AS_IT_IS,
    }
    return Run(config, overrides, steps=("train",))


def eval_step(config: str, image_size: int, batch_per_core: int) -> Run:
    """The evaluation step of one image size."""
    overrides = {"eval.image_size": image_size, "eval.batch_size": CORES * batch_per_core}
    return Run(config, overrides, steps=("eval",))


def step_quantities(run: Run) -> dict[str, float | str]:
    """What an experiment's rows say of a run of one step."""
    (row,) = run.rows()
    if not row.fits:
        return {"images/s/core": "out of memory", "memory, GiB": row.memory_gib}
    return {
        "images/s/core": row.images_per_second_per_core,
        "ms": row.estimated_ms,
        "memory, GiB": row.memory_gib,
    }


def hours_quantities(run: Run) -> dict[str, float | str]:
    """What an experiment's rows say of a whole run."""
    rows = run.rows()
    if not all(row.fits for row in rows):
        return {"hours": "out of memory"}
    return {"hours": estimated_hours(rows)}
