"""Starts the processes of a run on this machine, watches them and starts them again.

    python -m effnetv2_jax.tools.launch --restarts=10 -- --config=configs/s.py --workdir=DIR
    python -m effnetv2_jax.tools.launch --processes=2 --devices_per_process=2 -- --config=...

What follows `--` goes to `effnetv2_jax.main`. One process drives all devices of a machine, so on
each machine of a pod the first form is enough. When a process dies the others end within seconds;
then all are started again, or the launcher ends with the same exit status. SIGTERM, SIGINT and the
end of the terminal are passed on once: the run saves a checkpoint and stops. Exit status: 0
complete, 2 bad input, 128 + N stopped by signal N, else the status of the process that died.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError

FLAGS = flags.FLAGS

# What JAX's abort of a process gives, which follows the death of another one.
_ABORTED = -signal.SIGABRT
# A run that a signal stopped has saved a checkpoint and ended by agreement.
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
_POLL_SECONDS = 0.1


class Launcher:
    """Runs `python -m MODULE ARGUMENTS` as several processes.

    Args:
      arguments: of the module, but for what tells the processes from each other.
      num_processes: how many.
      devices_per_process: simulated CPU devices of each; None: the devices that are there.
      grace_seconds: once a process has died, the others are killed after this time.
      module: what to run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        num_processes: int = 1,
        devices_per_process: int | None = None,
        grace_seconds: float = 15.0,
        module: str = "effnetv2_jax.main",
    ):
        if num_processes < 1:
            raise InputError(f"processes {num_processes} must be at least 1.")
        if devices_per_process is not None and devices_per_process < 1:
            raise InputError(f"devices_per_process {devices_per_process} must be at least 1.")
        if grace_seconds < 0:
            raise InputError(f"grace_seconds {grace_seconds} must be 0 or more.")
        self._command = [sys.executable, "-m", module, *arguments]
        self._num_processes = num_processes
        self._environment = _environment(devices_per_process)
        self._grace_seconds = grace_seconds
        self._processes: list[subprocess.Popen[str]] = []
        self._signals = 0

    def run(self, *, restarts: int, pause_seconds: float) -> int:
        """Runs to the end, starting all processes again when one has died.

        Args:
          restarts: how often, at most. Bad input and a stop by a signal are final.
          pause_seconds: before each restart.

        Returns:
          The exit status.
        """
        if restarts < 0 or pause_seconds < 0:
            raise InputError(
                f"restarts {restarts} and pause_seconds {pause_seconds} must be 0 or more."
            )
        with self._signals_passed_on():
            for left in range(restarts, -1, -1):
                status = self._run_once()
                if status in (0, 2, *_STOPPED) or self._signals or not left:
                    return status
                _say(f"starting again in {pause_seconds:g} s; restarts left after this: {left - 1}")
                self._sleep(pause_seconds)
                if self._signals:
                    return status
        raise AssertionError("the last round returns")

    def _run_once(self) -> int:
        flags_of_process: list[list[str]] = [[]]
        if self._num_processes > 1:
            shared = [
                f"--coordinator_address=localhost:{_free_port()}",
                f"--num_processes={self._num_processes}",
            ]
            flags_of_process = [[*shared, f"--process_id={i}"] for i in range(self._num_processes)]
        printers = []
        try:
            for index, more in enumerate(flags_of_process):
                process = subprocess.Popen(
                    [*self._command, *more],
                    env=self._environment,
                    stderr=None if index == 0 else subprocess.PIPE,
                    text=True,
                    errors="replace",
                    # A terminal's Ctrl-C comes here alone, and is passed on.
                    start_new_session=True,
                )
                self._processes.append(process)
                if self._signals:  # It came before this process could hear it.
                    process.terminate()
                if index:
                    assert process.stderr is not None
                    printers.append(_print_with_prefix(f"[{index}] ", process.stderr))
            return self._watch()
        finally:
            for process in self._processes:
                process.kill()  # Does nothing to one that has ended.
                process.wait()
            for printer in printers:
                printer.join()
            self._processes = []

    def _watch(self) -> int:
        """Waits until all have ended, or one has died and the others were given their time."""
        while True:
            statuses = [process.poll() for process in self._processes]
            dead = {i: s for i, s in enumerate(statuses) if s not in (None, 0, *_STOPPED)}
            if dead or None not in statuses:
                break
            time.sleep(_POLL_SECONDS)
        if not dead:
            return max(s for s in statuses if s is not None)
        # Those that JAX aborted are not the cause.
        index, status = min(dead.items(), key=lambda item: item[1] == _ABORTED)
        others = ", ending the others" if self._num_processes > 1 else ""
        _say(f"process {index} of {self._num_processes} {_describe(status)}{others}")
        deadline = time.monotonic() + self._grace_seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in self._processes):
            time.sleep(_POLL_SECONDS)
        return status if status > 0 else 128 - status

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signals:
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(signum: int, frame: Any) -> None:
            del frame
            self._signals += 1
            # A closed terminal stops a run as SIGTERM does.
            first = signal.SIGTERM if signum == signal.SIGHUP else signum
            for process in self._processes:
                # Whoever asks twice does not want to wait for a checkpoint.
                process.send_signal(first if self._signals == 1 else signal.SIGKILL)

        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As under nohup.
            signals.append(signal.SIGHUP)
        earlier = {s: signal.signal(s, pass_on) for s in signals}
        try:
            yield
        finally:
            for signum, handler in earlier.items():
                signal.signal(signum, handler)


def _environment(devices_per_process: int | None) -> Mapping[str, str]:
    if devices_per_process is None:
        return os.environ
    simulated = f"--xla_force_host_platform_device_count={devices_per_process}"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The last one of a flag counts.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {simulated}".strip(),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _print_with_prefix(prefix: str, lines: IO[str]) -> threading.Thread:
    def copy() -> None:
        for line in lines:
            sys.stderr.write(prefix + line)
            sys.stderr.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return f"ended with exit status {status}"


def _say(sentence: str) -> None:
    print(f"launch: {sentence}.", file=sys.stderr, flush=True)


def _define_flags() -> None:
    flags.DEFINE_integer("processes", 1, "How many to start on this machine.")
    flags.DEFINE_integer("devices_per_process", None, "Simulated CPU devices of each.")
    flags.DEFINE_integer("restarts", 0, "How often to start again after a process has died.")
    flags.DEFINE_float("pause_seconds", 5.0, "Pause before a restart.")
    flags.DEFINE_float("grace_seconds", 15.0, "After a death the others are killed by then.")


def main(arguments: list[str]) -> int:
    """The command line."""
    launcher = Launcher(
        arguments,
        num_processes=FLAGS.processes,
        devices_per_process=FLAGS.devices_per_process,
        grace_seconds=FLAGS.grace_seconds,
    )
    return launcher.run(restarts=FLAGS.restarts, pause_seconds=FLAGS.pause_seconds)


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        num_arguments=(1, None),
        usage="python -m effnetv2_jax.tools.launch --restarts=10 -- --config=configs/s.py "
        "--workdir=DIR",
    )
