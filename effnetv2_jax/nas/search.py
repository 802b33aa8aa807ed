"""Searches for a network: `python -m effnetv2_jax.nas.search --config=FILE --workdir=DIR`.

    pip install effnetv2_jax[nas]
    python -m effnetv2_jax.nas.search --config=configs/nas_fashion_mnist.py --workdir=runs/nas

Stopped at any time, it goes on where it was; the same command on several machines that share
`--storage` (and the working directory, to go on with each other's trials) works on one study.
Exit status: 0 complete, 2 bad input, 128 + N stopped by signal N.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from effnetv2_jax import command_line
from effnetv2_jax.config import RESUMABLE_CHANGES, base_config, to_plain
from effnetv2_jax.errors import InputError
from effnetv2_jax.nas.space import (
    EXPANSIONS,
    EXTRA_LAYERS,
    KERNEL_SIZES,
    OPERATIONS,
    Space,
    make_space,
)
from effnetv2_jax.paths import absolute, is_remote

FLAGS = flags.FLAGS

# Samples in a row that were all tried before end a search: the space, or the policy, is exhausted.
_MAX_REPEATED = 200
# So many failures in a row are no fault of the networks: before the first success, and after it.
_MAX_FAILURES, _MAX_LATER_FAILURES = 5, 20
_MEND = "mend the trials' configuration, and search in another workdir."
_WAITING_SECONDS = 2.0
# Of compiled programs: a network that was tried has no further use for its own.
_CACHE_BYTES = 2 << 30
_REPORT_SECONDS = 60.0


def base_search_config() -> ConfigDict:
    """Every key with its default: the paper's search, section 3.3, on ImageNet.

    The paper gives the numbers of samples and epochs, the size of the network and that images
    are smaller, not how much smaller.
    """
    config = ConfigDict()
    config.seed = 0
    config.num_trials = 1000  # "up to 1000 models".

    # nas.space.make_space
    config.space = ConfigDict()
    config.space.backbone = "efficientnet-b4"
    config.space.operations = OPERATIONS
    config.space.kernel_sizes = KERNEL_SIZES
    config.space.expansions = EXPANSIONS
    config.space.extra_layers = EXTRA_LAYERS

    # nas.sampler.make_sampler
    config.sampler = ConfigDict()
    config.sampler.name = "random"
    config.sampler.learning_rate = 0.1

    # nas.trial.reward: section 3.3's exponents of training step time and parameters.
    config.reward = ConfigDict()
    config.reward.time_exponent = -0.07
    config.reward.parameters_exponent = -0.05

    # The training of one network.
    config.trial = base_config()
    config.trial.num_epochs = 10.0  # "about 10 epochs".
    config.trial.data.eval_split = "minival"
    config.trial.data.minival_examples = 25_000
    return config.lock()


def search(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    storage: str | None = None,
    step_time: str = "device",
) -> Any:
    """Tries networks until the study has `config.num_trials` of them.

    Args:
      config: as `base_search_config` has it.
      workdir: gets the study, the trials' runs and the results, see `nas.report`.
      storage: see `open_study`.
      step_time: see `trial.make_timer`.

    Returns:
      Optuna's study.

    Raises:
      InputError: bad input.
      Interrupted: SIGTERM or SIGINT; the trial goes on with the next start.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("the search needs Optuna: run `pip install effnetv2_jax[nas]`.") from error
    from effnetv2_jax.compilation import keep_compilations
    from effnetv2_jax.nas import report
    from effnetv2_jax.nas.sampler import make_sampler
    from effnetv2_jax.nas.study import (
        begin_trial,
        give_back,
        give_back_lost_trials,
        heartbeat,
        num_running,
        num_tried,
        open_study,
        repeat,
        trained_trials,
        tried_before,
    )
    from effnetv2_jax.nas.trial import (
        TrialFailed,
        check_trial_config,
        make_timer,
        reward,
        run_trial,
    )
    from effnetv2_jax.processes import stop_signals
    from effnetv2_jax.train import Interrupted

    if config.num_trials < 1:
        raise InputError(f"num_trials is {config.num_trials}: it must be at least 1.")
    space = make_space(**config.space)
    sampler = make_sampler(**config.sampler, parameters=space.parameters, seed=config.seed)
    baseline = space.backbone
    check_trial_config(config.trial, baseline)
    timer = make_timer(step_time, config.trial, baseline)
    path = _open_workdir(workdir)
    programs = path / "compilation_cache"
    keep_compilations(str(programs))
    study = open_study(
        storage or str(path / "study.journal"), sampler, _identity(config, space, timer.device)
    )
    logging.info(
        "%s networks around %s; step times: %s; %d of %d trials are done.",
        f"{space.size:,}",
        baseline,
        timer.device,
        num_tried(study),
        config.num_trials,
    )
    repeated, failures = 0, 0
    has_trained = bool(trained_trials(study))
    begun, trained = time.monotonic(), 0
    reported = begun
    is_prepared, is_waiting = False, False
    with stop_signals() as stop, _told_if_storage_is_lost():
        while repeated < _MAX_REPEATED:
            if stop.signum:
                raise Interrupted(stop.signum, num_tried(study))
            give_back_lost_trials(study)
            if num_tried(study) >= config.num_trials:
                break
            if num_tried(study) + num_running(study) >= config.num_trials:
                # If another worker dies, its trial is left to this one.
                if not is_waiting:
                    logging.info("Other workers have begun the last trials: waiting for them.")
                is_waiting = True
                time.sleep(_WAITING_SECONDS)
                continue
            if not is_prepared:
                with _quiet():
                    timer.prepare()
                is_prepared = True
            trial = begin_trial(study, space.parameters)
            variant = space.variant(trial.params)
            trial.set_user_attr("variant", variant)
            same = tried_before(study, trial.number, variant)
            if same is not None:
                repeat(study, trial, same)
                repeated += 1
                continue
            repeated = 0
            folder = path / "trials" / hashlib.sha256(variant.encode()).hexdigest()[:16]
            try:
                with heartbeat(trial), _quiet():
                    outcome = run_trial(
                        config.trial, variant, folder, timer=timer, baseline=baseline
                    )
            except TrialFailed as error:
                with _unless_taken_for_dead(trial.number):
                    trial.set_user_attr("error", str(error))
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    _remove_states(folder)
                logging.warning("Trial %d, %s, failed: %s", trial.number, variant, error)
                failures += 1
                if failures >= (_MAX_LATER_FAILURES if has_trained else _MAX_FAILURES):
                    raise InputError(
                        f"the last {failures} networks failed, at last by {error}: "
                        + ("see to the device, and start again to go on." if has_trained else _MEND)
                    ) from error
                continue
            except BaseException as error:
                # A stop and bad input are no fault of the network.
                is_stop = isinstance(error, Interrupted | InputError)
                give_back(study, trial, is_loss=isinstance(error, Exception) and not is_stop)
                raise
            failures, has_trained = 0, True
            trained += 1
            value = reward(
                outcome.accuracy, outcome.step_time, outcome.parameters_ratio, **config.reward
            )
            with _unless_taken_for_dead(trial.number):
                for name, found in dataclasses.asdict(outcome).items():
                    trial.set_user_attr(name, found)
                study.tell(trial, value)
                _remove_states(folder)
            _drop_oldest(programs, _CACHE_BYTES)
            done = num_tried(study)
            left = (config.num_trials - done) * (time.monotonic() - begun) / trained
            logging.info(
                "[trial %d/%d] %s: reward %.4f (accuracy %.2f %%, step %.1f ms = %.2f x, "
                "parameters %.2f M = %.2f x); best %.4f; about %.0f min to go with one worker",
                done,
                config.num_trials,
                variant,
                value,
                100 * outcome.accuracy,
                outcome.step_milliseconds,
                outcome.step_time,
                outcome.parameters / 1e6,
                outcome.parameters_ratio,
                max([value, *(known.values[0] for known in trained_trials(study))]),
                left / 60,
            )
            if time.monotonic() - reported > _REPORT_SECONDS:
                report.write(study, path, config)
                reported = time.monotonic()
    if repeated >= _MAX_REPEATED:
        logging.warning("%d samples in a row were tried before: the search ends.", repeated)
    report.write(study, path, config)
    return study


def _identity(config: ConfigDict, space: Space, device: str) -> dict[str, Any]:
    """What all workers and all starts must have in common."""
    trial = to_plain(config.trial)
    for key in RESUMABLE_CHANGES:
        *sections, name = key.split(".")
        section = trial
        for each in sections:
            section = section[each]
        del section[name]
    return {
        "space": space.describe(),
        "reward": config.reward.to_dict(),
        "trial": trial,
        "device": device,
    }


def _open_workdir(workdir: str | os.PathLike[str]) -> epath.Path:
    path = absolute(workdir)
    if is_remote(path):
        raise InputError(
            f"workdir {path} is in a bucket: name a folder on a disk, and --storage for what "
            "machines share."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"workdir {path} cannot be used ({error.strerror}): name another."
        ) from error
    return path


def _remove_states(folder: epath.Path) -> None:
    """What stays of a trial is its metrics."""
    for name in ("checkpoints", "best", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _drop_oldest(folder: epath.Path, max_bytes: int) -> None:
    """Removes files until the rest has so many bytes; other workers may do the same meanwhile."""
    found = []
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            status = os.stat(file)
            found.append((status.st_mtime, status.st_size, file))
    kept = 0
    for _, size, file in sorted(found, reverse=True):
        kept += size
        if kept > max_bytes:
            file.unlink(missing_ok=True)


@contextmanager
def _unless_taken_for_dead(number: int) -> Iterator[None]:
    """Of a trial that others gave back meanwhile, only they may tell the result.

    They may be training in the same folder, too.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        yield
    except UpdateFinishedTrialError:
        logging.warning("Trial %d was given back while it ran: its result is not counted.", number)


@contextmanager
def _told_if_storage_is_lost() -> Iterator[None]:
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise InputError(
            "the storage of the study cannot be reached any more: start again to go on when it is "
            "back."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of the training."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Configuration file, for instance configs/nas_fashion_mnist.py."
    )
    flags.DEFINE_string("workdir", None, "Folder of the search: it goes on there.")
    flags.DEFINE_string(
        "storage",
        None,
        "Journal file or database that workers share, as sqlite:///study.db; by default "
        "WORKDIR/study.journal.",
    )
    flags.DEFINE_string(
        "step_time",
        "device",
        "device: measured here; tpu:TOPOLOGY, as tpu:v3:4x4: the TPU compiler's estimate.",
    )


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    del arguments
    logging.set_verbosity(logging.INFO)
    from effnetv2_jax.train import Interrupted

    try:
        search(FLAGS.config, FLAGS.workdir, storage=FLAGS.storage, step_time=FLAGS.step_time)
    except Interrupted as interruption:
        print("The search was stopped; start again to go on.", file=sys.stderr)
        return 128 + interruption.signum
    return 0


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        required=("config", "workdir"),
        usage="python -m effnetv2_jax.nas.search --config=configs/nas_imagenet.py --workdir=DIR",
    )
