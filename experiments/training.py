"""Networks that are really trained, small enough for two CPU cores: the scale `proxy`.

An arm is a configuration file with changes; each arm is trained with several seeds by `main`
itself, in a process of its own. The test pictures are looked at once, after the last step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effnetv2_jax.errors import InputError
from experiments.experiment import PROXY, Item, Rows, Value

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs") / "experiments"  # Below `ROOT`, where the runs are started.
SEEDS = (0, 1, 2)

# What all arms but those of transfer start from, and what it says of its last and first stage.
CONFIG = "configs/fashion_mnist_subset.py"
IMAGE_SIZE, DROPOUT, MAGNITUDE = (18, 28), (0.1, 0.3), (2.0, 8.0)

TEST, VALIDATION = "test top-1, %", "validation top-1, %"
TRAINING = "training top-1, %"
SECONDS, WHOLE = "training steps, s", "whole run, s"
_CURVE = "epoch {:g}: validation top-1, %"


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared with others.

    Attributes:
      config: file and argument, as `configs/resnet.py:50`.
      overrides: key -> value, as `--config.KEY=VALUE` would have them.
      is_tested: whether the test pictures are looked at, which tuning must not do.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_tested: bool = True

    def flags(self) -> list[str]:
        """Of `main`."""
        return [
            f"--config={self.config}",
            *(f"--config.{key}={value}" for key, value in self.overrides.items()),
        ]


def items(arms: Mapping[str, Arm], seeds: Sequence[int] = SEEDS) -> list[Item]:
    """Every arm with every seed, all arms of a seed before the next seed."""
    return [
        Item(PROXY, name, functools.partial(train, arm, seed), seed=seed)
        for seed in seeds
        for name, arm in arms.items()
    ]


def train(arm: Arm, seed: int) -> dict[str, Value]:
    """Trains an arm from the start to the end.

    The seed is also that of the order of random sizes, which is a part of what varies.

    Returns:
      Accuracy of the averaged weights on the test pictures and on those held out for validation,
      of the last epoch on the training pictures as they were augmented; the seconds of all
      training steps without evaluation and compilation, and of the whole process.

    Raises:
      InputError: the run ended with an error.
    """
    from etils import epath

    from effnetv2_jax.reporting import read_metrics
    from effnetv2_jax.tools.evaluate import evaluate_model

    seeds = [f"--config.seed={seed}", f"--config.progressive.draw_seed={seed}"]
    flags = [*arm.flags(), *seeds]
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]
    folder = ROOT / RUNS / digest
    # Minutes of training are not worth times that are the sum of two processes'.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workdir, log = folder / "run", folder / "log.txt"
    command = [sys.executable, "-m", "effnetv2_jax.main", *flags, f"--workdir={workdir}"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "experiments"),
    }
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, cwd=ROOT, env=environment, stderr=stream).returncode
    seconds = time.monotonic() - begun
    if status:
        raise InputError(f"{' '.join(command[1:])} ended with status {status}: see {log}.")
    rows = read_metrics(epath.Path(workdir))
    evaluations = [row for row in rows if "eval_ema/top1" in row]
    windows = _windows(rows)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    epochs, steps = windows[-1].epoch, windows[-1].step
    tested = {}
    if arm.is_tested:
        results = evaluate_model(workdir, config["data"]["name"], batch_size=500)
        tested[TEST] = 100 * results["top1"]
    last_epoch = [window for window in windows if window.epoch > epochs - 1]
    shutil.rmtree(folder)
    return {
        **tested,
        VALIDATION: 100 * evaluations[-1]["eval_ema/top1"],
        TRAINING: 100
        * sum(window.top1 * window.num_steps for window in last_epoch)
        / sum(window.num_steps for window in last_epoch),
        SECONDS: sum(w.num_steps * config["batch_size"] / w.images_per_second for w in windows),
        WHOLE: seconds,
        "steps": steps,
        "epochs": epochs,
        **{
            _CURVE.format(round(row["step"] * epochs / steps, 2)): 100 * row["eval_ema/top1"]
            for row in evaluations
        },
    }


class _Window(NamedTuple):
    """What a run logs of the steps since the row before."""

    step: int
    num_steps: int
    epoch: float
    top1: float
    images_per_second: float


def _windows(rows: Sequence[Mapping[str, Any]]) -> list[_Window]:
    found: list[_Window] = []
    for row in rows:
        if "train/top1" in row:
            num_steps = row["step"] - (found[-1].step if found else 0)
            values = (row[n] for n in ("train/epoch", "train/top1", "perf/images_per_sec"))
            found.append(_Window(row["step"], num_steps, *values))
    return found


@dataclasses.dataclass(frozen=True)
class Spread:
    """One quantity of an arm over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """NaN without values."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Of a single run, NaN for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not self.values:
            return ""
        return f"{self.mean:.2f}" + (
            f" ± {self.deviation:.2f}" if len(self.values) > 1 else " (one seed)"
        )

    def minus(self, other: Spread) -> str:
        """The difference of the means, see `contrast`; empty before two seeds of both."""
        return contrast([(1, self), (-1, other)])


def contrast(terms: Sequence[tuple[float, Spread]]) -> str:
    """A weighted sum of means with its 95 % confidence interval, and whether that excludes 0.

    Welch's interval: the seeds of different arms are independent, and the arms need not vary
    alike. Of three seeds it is 2.3 to 3.5 standard deviations of a run wide to either side.
    """
    from scipy import stats

    if any(len(spread.values) < 2 for _, spread in terms):
        return ""
    value = sum(weight * spread.mean for weight, spread in terms)
    variances = [w**2 * s.deviation**2 / len(s.values) for w, s in terms]
    total = sum(variances)
    if total == 0:
        return f"{value:+.2f} (no spread)"
    freedom = total**2 / sum(
        v**2 / (len(s.values) - 1) for v, (_, s) in zip(variances, terms, strict=True)
    )
    half_width = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    verdict = "seen" if abs(value) > half_width else "not seen"
    return f"{value:+.2f} ± {half_width:.2f} ({verdict})"


def spread(rows: Rows, item: str, quantity: str = TEST) -> Spread:
    """A quantity of an arm over the seeds that are done."""
    return Spread(tuple(rows.numbers(item, quantity, PROXY)))


def curves(rows: Rows, item: str) -> dict[str, tuple[list[float], list[float]]]:
    """Seed -> epochs and validation accuracy in %."""
    pattern = re.compile(re.escape(_CURVE).replace(r"\{:g\}", r"([\d.]+)"))
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        match = pattern.fullmatch(row.quantity)
        if (row.scale, row.item) == (PROXY, item) and match:
            epochs, values = found.setdefault(row.seed, ([], []))
            epochs.append(float(match[1]))
            values.append(float(row.value))
    return found
