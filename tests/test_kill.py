"""SIGKILL at ten moments, some of them random: the end is the same, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import STAGE_ENDS, assert_same_bits, final_arrays, lasting_rows

ROOT = Path(__file__).parents[1]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def start(moment, workdir):
    command = [sys.executable, "tests/killable_run.py", moment]
    command += ["--config=tests/tiny.py", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


@pytest.mark.slow
def test_ten_kills_end_bit_for_bit_where_the_straight_run_ends(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    status, errors = finish(start("never", straight))
    assert status == 0, errors

    rng = random.Random(0)
    first, second, _ = STAGE_ENDS
    moments = [
        "step:2",  # Before anything is saved.
        "saving:4",
        "sealing:4",
        f"step:{first - 1}",
        f"step:{first}",  # Just before the first step at the second size,
        f"step:{first + 1}",  # and just after it.
        f"saving:{second}",
        f"step:{second}",
        f"step:{second + 1}",
    ]
    for moment in moments:
        status, errors = finish(start(moment, killed))
        assert status == -signal.SIGKILL, (moment, errors)
    # One from outside, at a random time after training began again.
    process = start("never", killed)
    for line in process.stderr:
        if "Stages of progressive learning" in line:
            break
    time.sleep(rng.uniform(2.0, 6.0))
    process.kill()
    process.communicate()

    status, errors = finish(start("never", killed))
    assert status == 0, errors
    # Everything that the last start needed, one of the others had compiled.
    counted = re.search(r"of (\d+) programs (\d+) were in the cache", errors)
    assert counted and counted[1] == counted[2] and int(counted[1]) > 3, errors
    assert_same_bits(final_arrays(killed), final_arrays(straight))
    assert lasting_rows(killed) == lasting_rows(straight)
