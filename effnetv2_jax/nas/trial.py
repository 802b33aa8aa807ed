"""One sample of a search: trained briefly, timed, counted, rewarded (section 3.3 of the paper)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from etils import epath
from ml_collections import ConfigDict

from effnetv2_jax.benchmark.train_step import make_step_runner
from effnetv2_jax.config import make_plan
from effnetv2_jax.data.datasets import MINIVAL, load_dataset
from effnetv2_jax.data.pipeline import check_augmentation, check_evaluation
from effnetv2_jax.data.sizes import published_sizes
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.losses import Loss
from effnetv2_jax.memory import DoesNotFit, NoRoom
from effnetv2_jax.mixing import check_mixing
from effnetv2_jax.models.create import count_parameters, create_model
from effnetv2_jax.optimizers import make_optimizer
from effnetv2_jax.parallel import check_batch_size, check_form
from effnetv2_jax.train import (
    TrainingDiverged,
    check_sizes,
    planned_fits,
    planned_schedule,
    train_and_evaluate,
)

ON_DEVICE = "device"
_TPU = "tpu:"
# Rounds of timing, in each of which the baseline runs as well, and what a turn lasts at least.
_ROUNDS, _SECONDS = 5, 0.5
# How XLA says that a device's memory is full.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


def reward(
    accuracy: float,
    step_time: float,
    parameters: float,
    *,
    time_exponent: float,
    parameters_exponent: float,
) -> float:
    """A * S^w * P^v (section 3.3 of the paper).

    Args:
      accuracy: A, a fraction.
      step_time: S, of a training step, as a ratio to the study's baseline.
      parameters: P, likewise.
      time_exponent: w.
      parameters_exponent: v.
    """
    return float(accuracy * step_time**time_exponent * parameters**parameters_exponent)


class TrialFailed(Exception):
    """A sample could not be trained to the end; the search goes on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial found; ratios are to the study's baseline.

    Attributes:
      accuracy: top-1 on the held-out training examples, of the averaged weights, a fraction.
      step_milliseconds: of a training step, on the device or by the compiler's estimate.
      step_time: the same as a ratio.
      parameters: how many are trained.
      parameters_ratio: the same as a ratio.
    """

    accuracy: float
    step_milliseconds: float
    step_time: float
    parameters: int
    parameters_ratio: float


class StepTimer(Protocol):
    """Times training steps, whole ones: what only fits in micro-batches fails.

    Attributes:
      device: what for; a study has one.
    """

    device: str

    def prepare(self) -> None:
        """Times the baseline for the first time.

        Raises:
          InputError: it cannot be timed, so nothing can.
        """

    def __call__(self, variant: str) -> tuple[float, float]:
        """Milliseconds of a step, and as a ratio to the baseline's."""


def make_timer(where: str, config: ConfigDict, baseline: str) -> StepTimer:
    """How a study gets its step times.

    Args:
      where: `device`: measured on the devices of this process; `tpu:TOPOLOGY`, as `tpu:v3:4x4`:
        the TPU compiler's estimate, which needs no TPU.
      config: of a trial.
      baseline: the variant with the ratio 1.

    Raises:
      InputError: neither of the two, or no such topology.
    """
    if where == ON_DEVICE:
        return _DeviceTimer(config, baseline)
    if where.startswith(_TPU):
        return _CompilerTimer(where.removeprefix(_TPU), config, baseline)
    raise unknown_name("step time", where, (ON_DEVICE, f"{_TPU}v3:4x4"))


class _DeviceTimer:
    """Both networks take turns, so that the ratio does not depend on how the machine drifts."""

    def __init__(self, config: ConfigDict, baseline: str):
        devices = jax.local_devices()
        kind = devices[0].device_kind
        self.device = f"{len(devices)} x {_processor() if kind == 'cpu' else kind}"
        self._config = config
        self._baseline = baseline
        self._baseline_turn: Callable[[], float] | None = None

    def prepare(self) -> None:
        """See `StepTimer`."""
        with _fails_as_bad_input(self._baseline):
            self._baseline_turn = self._turn(self._baseline)

    def __call__(self, variant: str) -> tuple[float, float]:
        """See `StepTimer`."""
        baseline_turn = self._baseline_turn or self._turn(self._baseline)
        # A step that fails takes its state with it: after an error the baseline begins anew.
        self._baseline_turn = None
        turn = self._turn(variant)
        pairs = [(turn(), baseline_turn()) for _ in range(_ROUNDS)]
        self._baseline_turn = baseline_turn
        seconds = statistics.median(taken for taken, _ in pairs)
        return 1e3 * seconds, statistics.median(taken / beside for taken, beside in pairs)

    def _turn(self, variant: str) -> Callable[[], float]:
        """Gives seconds a step."""
        config = trial_config(self._config, variant)
        dataset, plan = _plan(config)
        run = make_step_runner(
            config,
            num_classes=dataset.num_classes,
            image_size=max(stage.image_size for stage in plan.stages),
            batch_size=config.batch_size,
        )
        run(2)
        begun = time.perf_counter()
        run(1)
        repetitions = max(1, round(_SECONDS / (time.perf_counter() - begun)))

        def turn() -> float:
            begun = time.perf_counter()
            run(repetitions)
            return (time.perf_counter() - begun) / repetitions

        return turn


def _processor() -> str:
    """The model of the CPU, as Linux names it."""
    cpuinfo = epath.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else "cpu"


@contextlib.contextmanager
def _fails_as_bad_input(baseline: str) -> Iterator[None]:
    try:
        yield
    except (TrialFailed, DoesNotFit, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the baseline {baseline} cannot be timed ({reason}): use a smaller batch_size of the "
            "trials or a smaller backbone."
        ) from error


class _CompilerTimer:
    """All by the TPU compiler, as `tools.tpu_compile`."""

    def __init__(self, topology: str, config: ConfigDict, baseline: str):
        from effnetv2_jax.tools.tpu_compile import topology_devices

        check_batch_size(config.batch_size, len(topology_devices(topology)))
        published_sizes(config.data.name)  # Raises for a data set that it cannot plan with.
        self.device = f"{_TPU}{topology}"
        self._topology = topology
        self._config = config
        self._baseline = baseline
        self._baseline_milliseconds = math.nan

    def prepare(self) -> None:
        """See `StepTimer`."""
        with _fails_as_bad_input(self._baseline):
            self._baseline_milliseconds = self._milliseconds(self._baseline)

    def __call__(self, variant: str) -> tuple[float, float]:
        """See `StepTimer`."""
        taken = self._milliseconds(variant)
        return taken, taken / self._baseline_milliseconds

    def _milliseconds(self, variant: str) -> float:
        from effnetv2_jax.tools.tpu_compile import chosen_rows, compile_steps

        config = trial_config(self._config, variant)
        largest = max(stage.image_size for stage in _plan(config)[1].stages)
        config.progressive.num_stages = 1
        config.progressive.order = "rising"
        config.progressive.image_size = (largest, largest)
        config.memory.update(micro_batches="1", remat_groups="0")  # Whole steps, see `StepTimer`.
        (row,) = chosen_rows(list(compile_steps(config, self._topology, steps=("train",))))
        if not row.fits:
            raise TrialFailed(f"a step does not fit into a core of {self._topology}: {row.error}")
        return row.estimated_ms


def trial_config(config: ConfigDict, variant: str) -> ConfigDict:
    """The training of one network."""
    copy = config.copy_and_resolve_references()  # `ConfigDict(config)` would share its fields.
    copy.model.variant = variant
    return copy


def _plan(config: ConfigDict) -> tuple[Any, Any]:
    dataset = load_dataset(**config.data)
    plan = make_plan(
        config,
        num_train_examples=dataset.train.num_examples,
        num_eval_examples=dataset.eval.num_examples,
        num_classes=dataset.num_classes,
    )
    return dataset, plan


def num_parameters(config: ConfigDict, variant: str) -> int:
    """Trained parameters of a network on the data of a trial."""
    classes = load_dataset(**config.data).num_classes
    model = create_model(**trial_config(config, variant).model, num_classes=classes)
    return count_parameters(model)


def run_trial(
    config: ConfigDict, variant: str, workdir: epath.Path, *, timer: StepTimer, baseline: str
) -> Outcome:
    """Trains, times and counts a network; training goes on where it was stopped.

    Args:
      config: of a trial; its evaluation split is not that of the data set but held out of the
        training split, see `check_trial_config`.
      variant: what is tried.
      workdir: of its training.
      timer: of its steps.
      baseline: the variant with the ratio 1.

    Raises:
      TrialFailed: the loss or the accuracy is not finite, or there is no memory for it.
      Interrupted: as `train_and_evaluate`.
      InputError: bad input, that no other network would mend.
    """
    try:
        # The time first: it is short, and what does not fit is found out before it is trained.
        milliseconds, step_time = timer(variant)
        results = train_and_evaluate(trial_config(config, variant), workdir)
    except (TrainingDiverged, DoesNotFit, NoRoom, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and _NO_MEMORY not in str(error):
            raise  # A broken device is no network's fault.
        raise TrialFailed(" ".join(str(error).split())[:300]) from error
    finally:
        # The next network has other programs.
        jax.clear_caches()
    accuracy = results["eval_ema/top1"]
    if not math.isfinite(accuracy * step_time):
        raise TrialFailed(f"its accuracy is {accuracy} and its step time {step_time}")
    parameters = num_parameters(config, variant)
    return Outcome(
        accuracy=accuracy,
        step_milliseconds=milliseconds,
        step_time=step_time,
        parameters=parameters,
        parameters_ratio=parameters / num_parameters(config, baseline),
    )


def check_trial_config(config: ConfigDict, backbone: str) -> None:
    """Refuses before anything is recorded what would fail in every trial.

    Raises:
      InputError: as `train_and_evaluate`; or a trial would be scored on the test set.
    """
    if config.data.eval_split != MINIVAL:
        raise InputError(
            f"data.eval_split of the trials is {config.data.eval_split}: a search is scored on "
            f"held-out training examples, set it to {MINIVAL!r} and data.minival_examples."
        )
    if config.init_from is not None:
        raise InputError(
            f"init_from of the trials is {config.init_from!r}: networks of a search have no common "
            "weights, leave it out."
        )
    if config.model.depth_multiplier != 1.0:
        raise InputError(
            f"model.depth_multiplier of the trials is {config.model.depth_multiplier:g}: it must "
            "be 1, since a network of the space says how many layers it has."
        )
    if jax.process_count() > 1:
        raise InputError(
            f"this machine is one of {jax.process_count()} of a slice: every machine of a search "
            "trains networks of its own, so use machines whose devices are theirs alone."
        )
    check_form(config.parallel)
    check_batch_size(config.batch_size, jax.device_count())
    check_augmentation(**config.augment)
    check_mixing(config.mixing)
    check_evaluation(**{name: config.eval[name] for name in ("crop", "crop_fraction", "resize")})
    Loss(**config.loss)
    dataset, plan = _plan(config)
    make_optimizer(planned_schedule(config, plan), **config.optimizer)
    model = create_model(**trial_config(config, backbone).model, num_classes=dataset.num_classes)
    check_sizes(config, plan, model.total_stride)
    planned_fits(config, plan, model, jax.device_count(), limit=None)
