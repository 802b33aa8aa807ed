"""What the launcher does when a process ends; `tests/launched.py` stands for the main job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.launch import Launcher

ROOT = Path(__file__).parents[2]


def launch(*arguments, restarts=0, processes=2, grace_seconds=0.3):
    launcher = Launcher(
        arguments, num_processes=processes, grace_seconds=grace_seconds, module="tests.launched"
    )
    return launcher.run(restarts=restarts, pause_seconds=0.0)


@pytest.mark.parametrize(
    ("what", "status", "sentence"),
    [
        ("exit:1", 1, "process 1 of 2 ended with exit status 1, ending the others."),
        ("die:9", 137, "process 1 of 2 was killed by signal 9 (SIGKILL), ending the others."),
    ],
)
def test_a_death_is_told_and_ends_the_others(capfd, what, status, sentence):
    begun = time.monotonic()
    assert launch(what) == status
    assert time.monotonic() - begun < 20
    assert f"launch: {sentence}" in capfd.readouterr().err


def test_a_death_is_followed_by_a_restart(capfd, tmp_path):
    assert launch(f"once:{tmp_path / 'file'}", restarts=1) == 0
    errors = capfd.readouterr().err
    assert "process 1 of 2 ended with exit status 3" in errors and "starting again" in errors


def test_restarts_are_counted(capfd):
    assert launch("exit:1", restarts=2) == 1
    errors = capfd.readouterr().err
    assert errors.count("ended with exit status 1") == 3 and errors.count("starting again") == 2


@pytest.mark.parametrize("status", [2, 143])
def test_bad_input_and_a_stop_by_signal_are_final(capfd, status):
    # Of a stop by signal the others know; here process 0 has to be told.
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if status == 143:
        timer.start()
    assert launch(f"exit:{status}", restarts=2) == status
    assert "starting again" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("signum", "passed_on"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),  # The terminal was closed.
    ],
)
def test_a_signal_reaches_every_process_once(signum, passed_on):
    """As a terminal's Ctrl-C does, it goes to the launcher's whole process group."""
    program = (
        # Whoever runs the tests may ignore it, as nohup does.
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "import sys; from effnetv2_jax.tools.launch import Launcher; "
        "launcher = Launcher(['wait'], num_processes=2, module='tests.launched'); "
        "sys.exit(launcher.run(restarts=2, pause_seconds=0.0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = [process.stderr.readline(), process.stderr.readline()]
    os.killpg(process.pid, signum)
    lines += process.stderr.readlines()
    assert process.wait() == 128 + passed_on
    received = f"received [{int(passed_on)}]"
    said = sorted(line.strip() for line in lines)
    assert said == [f"[1] {received}", "[1] waiting", received, "waiting"]


def test_a_signal_before_a_process_starts_reaches_it(monkeypatch):
    launcher = Launcher(["wait"], module="tests.launched")
    start = subprocess.Popen

    def start_late(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", start_late)
    begun = time.monotonic()
    assert launcher.run(restarts=2, pause_seconds=0.0) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("arguments", [{"num_processes": 0}, {"devices_per_process": 0}])
def test_values_that_start_nothing_are_refused(arguments):
    with pytest.raises(InputError, match="0 must be at least 1"):
        Launcher([], **arguments)
