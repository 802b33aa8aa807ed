"""Two processes of two devices against one process of four."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from effnetv2_jax.reporting import read_metrics

ROOT = Path(__file__).parents[1]
# Evaluation counts 13 examples over batches of 8; training mixes, crops and augments.
OVERRIDES = {"num_epochs": 2.0, "progressive.num_stages": 2, "progressive.image_size": [16, 24]}


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(num_processes, devices_each, workdir):
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}",
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "tests/process_run.py",
                str(index),
                str(num_processes),
                str(port),
                json.dumps(OVERRIDES),
                str(workdir),
            ],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return read_metrics(workdir)


@pytest.mark.slow
def test_two_processes_see_each_image_once_and_train_as_one_does(tmp_path):
    one = run(1, 4, tmp_path / "one")
    two = run(2, 2, tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    counts = 0
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name.startswith("perf/"):
                continue
            counts += name.endswith("num_examples")
            if name.endswith("num_examples"):
                assert ours[name] == 13
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert counts
