"""What a run tells people: metric files, TensorBoard, progress, parameters, profiles.

The only file that knows clu. `metrics.jsonl` holds the same numbers as TensorBoard's events,
one JSON object a line, and needs no tool to read.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from etils import epath

from effnetv2_jax.config import Plan
from effnetv2_jax.paths import is_remote

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and TensorBoard, on host 0 alone.

    Call `flush` before a checkpoint, so that it never knows more steps than the file. On a disk a
    row is there when `write` returns. Objects in a bucket cannot be added to and take about one
    write a second, so there the whole file is written anew at each flush, and once a minute.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / METRICS
        self._file: Any = None
        self._events: Any = None
        if jax.process_index() == 0:
            if is_remote(workdir):
                self._file = io.StringIO()
                self._file.write(self._path.read_text() if self._path.exists() else "")
            else:
                self._file = self._path.open("a")
            self._written_at = time.monotonic()
            events = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
            self._events = metric_writers.AsyncWriter(events)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one row for the state after `step` completed steps."""
        if self._file is None:
            return
        row = {"step": step, **{name: _plain(value) for name, value in scalars.items()}}
        self._file.write(json.dumps(row) + "\n")
        if not is_remote(self._path) or time.monotonic() - self._written_at > 60:
            self.flush()
        self._events.write_scalars(step, dict(scalars))

    def flush(self) -> None:
        """Returns once every row is where a resumed run will read it."""
        if self._file is None:
            return
        if is_remote(self._path):
            self._path.write_text(self._file.getvalue())
            self._written_at = time.monotonic()
        else:
            self._file.flush()

    def close(self) -> None:
        """Flushes both files."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._events.close()


def _plain(value: float) -> float | int | None:
    """A number that JSON has: NaN and the infinities become null."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a line that a kill tore is left out."""
    path = workdir / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rewind_metrics(workdir: epath.Path, step: int) -> list[dict[str, Any]]:
    """Drops the rows past `step`, which training is about to write again, and torn lines.

    Returns:
      The rows that stay.
    """
    path = workdir / METRICS
    rows = [row for row in read_metrics(workdir) if row["step"] <= step]
    if path.exists() and jax.process_index() == 0:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
    return rows


class Progress:
    """Rates and the time to go, from the wall clock."""

    def __init__(self, plan: Plan, batch_size: int, first_step: int):
        self._plan = plan
        self._batch_size = batch_size
        self._step = first_step
        self._since = time.monotonic()
        self._input_wait = 0.0
        self._paused = 0.0
        self._seconds_per_cost: float | None = None

    def waited_for_input(self, seconds: float) -> None:
        """Adds time that the loop spent waiting for a batch."""
        self._input_wait += seconds

    def paused(self, seconds: float) -> None:
        """Takes out time that was not training: compiling, evaluating, writing."""
        self._paused += seconds

    def rates(self, step: int) -> dict[str, float]:
        """`perf/*` metrics since the last call, which ended at the last step."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._since - self._paused)
        images = (step - self._step) * self._batch_size
        cost = self._plan.remaining_cost(self._step) - self._plan.remaining_cost(step)
        if cost > 0:
            self._seconds_per_cost = (now - self._since) / cost
        rates = {
            "perf/images_per_sec": images / seconds,
            "perf/images_per_sec_per_device": images / seconds / jax.device_count(),
            "perf/input_wait": min(1.0, self._input_wait / seconds),
        }
        self._step, self._since = step, now
        self._input_wait = self._paused = 0.0
        return rates

    def time_to_go(self, step: int) -> str:
        """Remaining time as text, larger images counted by their area."""
        if self._seconds_per_cost is None:
            return "?"
        seconds = int(self._seconds_per_cost * self._plan.remaining_cost(step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"

    def log(self, step: int, scalars: Mapping[str, float], stage_index: int) -> None:
        """Writes the line that a person watches."""
        plan = self._plan
        logging.info(
            "[step %d/%d] epoch %.2f, stage %d/%d at %d px: loss %.4f, top1 %.2f %%, lr %.3g, "
            "%.0f images/s, input wait %.1f %%, %s to go",
            step,
            plan.total_steps,
            step / plan.steps_per_epoch,
            stage_index + 1,
            len(plan.stages),
            scalars["progressive/image_size"],
            scalars["train/loss"],
            100 * scalars["train/top1"],
            scalars["train/learning_rate"],
            scalars["perf/images_per_sec"],
            100 * scalars["perf/input_wait"],
            self.time_to_go(step),
        )


def log_parameters(params: Any) -> None:
    """Logs a table of all parameters with their shapes and sizes."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    # Statistics would compile and, in clu 0.0.12, fail on shapes.
    parameter_overview.log_parameter_overview(shapes, include_stats=False, msg="Parameters:")


def make_profiler(workdir: epath.Path, num_steps: int) -> Any:
    """A hook to call with each step, which traces `num_steps` steps early in the run."""
    if num_steps == 0 or jax.process_index() != 0:
        return lambda step: None
    return periodic_actions.Profile(
        logdir=str(workdir / "tensorboard"),
        num_profile_steps=num_steps,
        profile_duration_ms=None,
        first_profile=10,
    )
