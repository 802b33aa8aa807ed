"""The study of a search: what was tried, by which worker, and what is to be tried again.

Optuna keeps it, in a journal file or any database that it knows.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from absl import logging
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from effnetv2_jax.errors import InputError

# A worker tells every so often that it is alive; one that was silent for long is dead. Machines
# that share a study have to agree on the time as well as that.
_HEARTBEAT_SECONDS, _SILENT_SECONDS = 30.0, 300.0
# A network whose worker died so often while it was tried does kill them.
_MOST_LOSSES = 5
# What a worker waits at most for another one to say which network it tries.
_NAMING_SECONDS = 10.0
_HEARTBEAT, _GIVEN_BACK = "heartbeat", "given_back"
STUDY = "effnetv2"


def _machine() -> str:
    """Where a process number means the same process: one start of one container or machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


# This process: machine, number, and what tells it from an earlier one with the same number.
WORKER = (_machine(), os.getpid(), uuid.uuid4().hex)


def open_study(where: str, sampler: BaseSampler, identity: Mapping[str, Any]) -> optuna.Study:
    """The study of a search, new or as it was left.

    Args:
      where: the address of a database, as sqlite:///study.db, or a journal file.
      sampler: of the networks.
      identity: what all workers and all starts must have in common, as it stands in JSON.

    Raises:
      InputError: no such storage, or a study of another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=_storage(where),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            sampler=sampler,
        )
    except Exception as error:  # Whatever a database's driver raises.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            _without_password(
                f"storage {where!r} cannot be used ({reason}): give a file, or the address of a "
                "database as sqlite:///study.db."
            )
        ) from error
    for name, value in identity.items():
        text = json.dumps(value, sort_keys=True)
        known = study.user_attrs.get(name)
        if known is None:
            study.set_user_attr(name, text)
        elif known != text:
            raise InputError(
                _without_password(
                    f"the study in {where!r} has another {name} "
                    f"({_first_difference(known, text)}): name another workdir (and storage), or "
                    "search with the same."
                )
            )
    return study


def load_study(where: str) -> optuna.Study:
    """A study to look at; Optuna's own errors where there is none."""
    return optuna.load_study(study_name=STUDY, storage=_storage(where))


def _storage(where: str) -> str | JournalStorage:
    if "://" in where:
        return where
    # NFS below version 3 and some network disks know no symbolic links, the default's means.
    return JournalStorage(JournalFileBackend(where, JournalFileOpenLock(where)))


def _without_password(text: str) -> str:
    """What is told of an address ends in logs."""
    return re.sub(r"(://[^\s:/@]*):[^\s/@]+@", r"\1:***@", text)


def _first_difference(known: str, text: str) -> str:
    """Where two JSON texts part, for people."""
    first = next(
        (i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b),
        min(len(known), len(text)),
    )
    begin = max(0, first - 40)
    return f"...{known[begin : first + 30]}... and not ...{text[begin : first + 30]}..."


def trained_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those with a result of their own."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if "same_as" not in trial.user_attrs]


def num_tried(study: optuna.Study) -> int:
    """Networks that were trained or failed."""
    failed = sum(map(_has_failed, study.get_trials(deepcopy=False)))
    return len(trained_trials(study)) + failed


def num_running(study: optuna.Study) -> int:
    """Networks that are being trained, or whose worker is not known to be dead yet."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def begin_trial(study: optuna.Study, parameters: Mapping[str, tuple[Any, ...]]) -> Trial:
    """A new trial of this worker, with a choice for every parameter."""
    trial = study.ask()
    # First of all, so that the trial is known to be lost if the worker dies.
    trial.set_user_attr(_HEARTBEAT, time.time())
    trial.set_user_attr("worker", WORKER)
    for name, choices in parameters.items():
        trial.suggest_categorical(name, choices)
    return trial


def tried_before(study: optuna.Study, number: int, variant: str) -> FrozenTrial | None:
    """The trial with a lower number that has the same network, unless it was lost.

    Of two workers that draw the same network at the same time, the later trial gives way.
    """
    deadline = time.monotonic() + _NAMING_SECONDS
    while True:
        earlier = [trial for trial in study.get_trials(deepcopy=False) if trial.number < number]
        is_unnamed = any(
            trial.state == TrialState.RUNNING and "variant" not in trial.user_attrs
            for trial in earlier
        )
        if not is_unnamed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for trial in earlier:
        was_lost = trial.state == TrialState.FAIL and not _has_failed(trial)
        if trial.user_attrs.get("variant") == variant and not was_lost:
            return trial
    return None


def repeat(study: optuna.Study, trial: Trial, same: FrozenTrial) -> None:
    """Ends a trial with what is known of its network, so that samplers learn from it."""
    trial.set_user_attr("same_as", same.number)
    if same.state == TrialState.COMPLETE:
        study.tell(trial, same.value)
    else:
        study.tell(trial, state=TrialState.FAIL)


def give_back_lost_trials(study: optuna.Study) -> None:
    """Ends the trials of dead workers; their networks are tried again, unless that kills workers.

    Optuna's own heartbeats are for databases alone.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_lost(trial):
            logging.warning("Trial %d was lost with its worker.", trial.number)
            _try_again(study, trial, trial.user_attrs.get("losses", 0) + 1)


def give_back(study: optuna.Study, trial: Trial, *, is_loss: bool) -> None:
    """Ends a trial of this worker without a result; its network is tried again.

    Args:
      study: that it is of.
      trial: that this worker began.
      is_loss: whether the network may be at fault, so that it is not tried without end.
    """
    try:
        if not is_loss:
            trial.set_user_attr(_GIVEN_BACK, True)
        known = study.get_trials(deepcopy=False)[trial.number]
        _try_again(study, known, known.user_attrs.get("losses", 0) + is_loss)
    except Exception as error:  # The storage may be what ends the search.
        logging.warning("Trial %d could not be given back: %s", trial.number, error)


def _try_again(study: optuna.Study, trial: FrozenTrial, losses: int) -> None:
    """Puts the network in front of the queue unless it was lost too often."""
    choices = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (RuntimeError, ValueError):
        return  # Another worker was faster.
    if choices and losses < _MOST_LOSSES:
        study.enqueue_trial(choices, user_attrs={"losses": losses})


def _has_failed(trial: FrozenTrial) -> bool:
    """Whether a trial's network cannot be trained; not so if only its worker was lost."""
    if trial.state != TrialState.FAIL or {"same_as", _GIVEN_BACK} & trial.user_attrs.keys():
        return False
    is_last_loss = trial.user_attrs.get("losses", 0) >= _MOST_LOSSES - 1
    return "error" in trial.user_attrs or is_last_loss


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial is dead, for all that can be known."""
    machine, pid, _ = worker = tuple(trial.user_attrs.get("worker", ("", 0, "")))
    if worker == WORKER:
        return False
    if machine == WORKER[0] and (pid == WORKER[1] or not _is_alive(pid)):
        return True
    begun = trial.datetime_start
    heard = trial.user_attrs.get(_HEARTBEAT, begun.timestamp() if begun else 0.0)
    return bool(time.time() - heard > _SILENT_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def heartbeat(trial: Trial) -> Iterator[None]:
    """While it lasts, the study knows that this worker is alive."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            try:
                trial.set_user_attr(_HEARTBEAT, time.time())
            except UpdateFinishedTrialError:
                return  # Others took this worker for dead.
            except Exception as error:  # A database that is away for a while.
                logging.warning("The study cannot be told that trial %d runs: %s", number, error)
            done.wait(_HEARTBEAT_SECONDS)

    number = trial.number
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
