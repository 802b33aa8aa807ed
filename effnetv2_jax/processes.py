"""The processes of a run: how they meet, how they agree to stop, how one that fails leaves.

One process drives all devices of its machine. A pod or a cluster has one on each machine, and
`jax.distributed` brings them together; a run on one machine starts no service at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError
from effnetv2_jax.parallel import STOP_SIGNUM

# JAX's own defaults (jax.distributed.initialize).
START_TIMEOUT_SECONDS = 300
HEARTBEAT_TIMEOUT_SECONDS = 100


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout_seconds: int = START_TIMEOUT_SECONDS,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
) -> None:
    """Brings the processes of a run together; call it before anything touches a device.

    What is None is taken from the environment, `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID`, or else from the cluster that JAX recognises (Cloud TPU, SLURM, Open
    MPI, Kubernetes). Where none of them speaks of several processes, nothing happens.

    Args:
      coordinator_address: HOST:PORT at which process 0 will listen.
      num_processes: of the run; 1 turns recognition off.
      process_id: 0 .. num_processes - 1.
      start_timeout_seconds: this process gives up if the others have not come by then.
      heartbeat_timeout_seconds: a process that was silent for so long is dead, and JAX then
        aborts the others (exit status 134).

    Raises:
      InputError: values that do not fit together, or a port that is taken.
    """
    for name, seconds in (
        ("start_timeout_seconds", start_timeout_seconds),
        ("heartbeat_timeout_seconds", heartbeat_timeout_seconds),
    ):
        if seconds < 1:
            raise InputError(f"{name} {seconds} must be at least 1.")
    if coordinator_address is None:
        coordinator_address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _integer_from_environment("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _integer_from_environment("JAX_PROCESS_ID")
    _check(coordinator_address, num_processes, process_id)
    if num_processes == 1:
        return
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and _recognised_processes() == 1:
        if len(missing) == len(given):
            return
        raise InputError(
            f"{' and '.join(missing)} must be given too, as no cluster is recognised here that "
            "would tell: several processes need --coordinator_address=HOST:PORT, "
            "--num_processes=N and --process_id=0 .. N - 1."
        )
    if process_id == 0 and coordinator_address is not None:
        _check_free_port(coordinator_address)
    # Several processes agree on a stop by themselves, see `Stop`; JAX's service would take
    # SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    me = "this one" if process_id is None else f"process {process_id}"
    with _giving_up_after(
        start_timeout_seconds,
        f"{me} has waited {start_timeout_seconds} s for the other processes"
        f"{f' at {coordinator_address}' if coordinator_address else ''}: start all of them with "
        "the same --coordinator_address and --num_processes, each with a --process_id of its own.",
    ):
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # JAX's own way of giving up is to abort with a stack trace.
            initialization_timeout=start_timeout_seconds + 60,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    if jax.default_backend() == "cpu":
        # JAX keeps the compiled programs of process 0, which fit no other one on CPU. It would
        # then wait for the others to compile, and gloo gives up after 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


def check_connected() -> None:
    """Raises `InputError` if there are several processes that `connect` has not met.

    A TPU slice joins the processes on its machines even if nobody recognised it as a cluster;
    checkpoints need them to know each other.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"this machine is one of {jax.process_count()} of a slice that was not recognised as a "
            "cluster: give --coordinator_address, --num_processes and --process_id on each."
        )


def _integer_from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{name} {text!r} in the environment must be an integer.") from error


def _check(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator_address is not None:
        host, _, port = coordinator_address.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 2**16):
            raise InputError(
                f"coordinator_address {coordinator_address!r} must be HOST:PORT, as 10.0.0.2:8476."
            )
    if num_processes is not None and num_processes < 1:
        raise InputError(f"num_processes {num_processes} must be at least 1.")
    if process_id is not None and not 0 <= process_id < (num_processes or 2**31):
        last = " .." if num_processes is None else f" .. {num_processes - 1}"
        raise InputError(
            f"process_id {process_id} must be in 0{last}: number the processes from 0."
        )


def _check_free_port(coordinator_address: str) -> None:
    port = int(coordinator_address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen at port {port} of coordinator_address "
            f"{coordinator_address!r} ({error.strerror}): choose another one for all processes."
        ) from error


def _recognised_processes() -> int:
    """How many processes the cluster around this one has, as JAX recognises it; 1: no cluster.

    JAX has no public way to ask before it connects, and connecting alone would cost every run on
    a single machine a service and the TPU machines among them queries to a server.
    """
    from jax._src.clusters import ClusterEnv

    try:
        for cluster in ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
    except Exception as error:  # Whatever a metadata server or its absence makes JAX raise.
        logging.warning("The cluster is not recognised, so this process goes alone: %s", error)
    return 1


@contextlib.contextmanager
def _giving_up_after(seconds: float, sentence: str) -> Iterator[None]:
    """Ends this process with a sentence if the block takes longer.

    The status says that a later start may succeed (sysexits.h): a host may only be late.
    """

    def give_up() -> None:
        command_line.tell(InputError(sentence))
        os._exit(os.EX_TEMPFAIL)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def leaving_on_failure() -> Iterator[None]:
    """Makes a process that fails end at once, with the message and status it has on its own.

    JAX's exit handler would wait for the others, who wait for this one in the middle of a step;
    after five minutes it would abort them all and the status would be lost.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, InputError):
            command_line.tell(error)
            _leave(2)
        traceback.print_exception(error)
        _leave(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # JAX aborts the others when their coordinator goes; they have often met the same mistake,
        # and get the time to leave by themselves.
        time.sleep(3)
    os._exit(status)


class Stop:
    """A request to stop, by a signal to any process, that all of them follow at the same step.

    The request travels with the batch: each process puts the number of the signal that it got
    into its part, the train step takes the largest over all replicas, and everyone reads the
    same number with the metrics. That is four bytes in an exchange that takes place anyway, no
    waiting, and no second way for processes to disagree. JAX's preemption service, the
    alternative, hears SIGTERM alone, cannot say which signal it was, and if one arrives while a
    resumed run is starting up it agrees on step 1, which such a run never reaches.
    """

    def __init__(self) -> None:
        self.signum = 0

    def mark(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with this process's request in it; the same if there is one process."""
        if jax.process_count() == 1:
            return dict(batch)
        request = np.full(jax.local_device_count(), self.signum, np.int32)
        return {**batch, STOP_SIGNUM: request}

    def agreed(self, metrics: Mapping[str, Any] | None) -> int:
        """The number of the signal to stop by now, or 0.

        Args:
          metrics: of a step that is complete, the same one on every process; None: of none yet.
        """
        if jax.process_count() == 1:
            return self.signum
        return 0 if metrics is None else int(metrics[STOP_SIGNUM])


# Loops that wait for a request, the outermost first.
_waiting: list[Stop] = []


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns SIGTERM and the first SIGINT into a request that the loop reads.

    A loop within another one, as training within a search, reads what came before it began, and
    what comes meanwhile both read. Outside the main thread (notebooks' executors, tests) signals
    stay as they are.
    """
    stop = Stop()
    if _waiting:
        stop.signum = _waiting[-1].signum
    _waiting.append(stop)
    earlier: dict[int, Any] = {}

    def request(signum: int, frame: Any) -> None:
        del frame
        for each in _waiting:
            each.signum = signum
        signal.signal(signum, earlier[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        # Raises outside the main thread.
        with contextlib.suppress(ValueError):
            earlier[signum] = signal.signal(signum, request)
    try:
        yield stop
    finally:
        _waiting.remove(stop)
        for caught, handler in earlier.items():
            signal.signal(caught, handler)
