"""How a process finds out whether it has company; runs of several are in test_processes.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.processes import _recognised_processes, connect

ROOT = Path(__file__).parents[1]


def test_one_process_starts_no_service(monkeypatch):
    connect()
    connect(num_processes=1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    connect(coordinator_address="localhost:1")
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "coordinator_address and process_id must be given too"),
        ({"process_id": 0}, "coordinator_address and num_processes must be given too"),
        ({"coordinator_address": "localhost"}, "'localhost' must be HOST:PORT"),
        ({"coordinator_address": "localhost:port"}, "must be HOST:PORT"),
        ({"num_processes": 0}, "num_processes 0 must be at least 1"),
        ({"num_processes": 2, "process_id": 2}, r"process_id 2 must be in 0 .. 1"),
        ({"process_id": -1}, "process_id -1 must be in 0 .."),
        ({"heartbeat_timeout_seconds": 0}, "heartbeat_timeout_seconds 0 must be at least 1"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        connect(**arguments)


def test_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES 'two' in the environment"):
        connect()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="coordinator_address and process_id must be given too"):
        connect()


def test_a_taken_port_is_told():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot listen at port .* choose another one"):
            connect(address, 2, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}
        | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
        {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4"},
    ],
    ids=["slurm", "ompi"],
)
def test_a_cluster_is_recognised(monkeypatch, environment):
    assert _recognised_processes() == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _recognised_processes() == 4


def test_a_coordinator_at_whom_nobody_answers_is_one_line_and_may_be_tried_again(tmp_path):
    arguments = ["--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
    arguments += ["--process_id=1", "--coordinator_address=localhost:9"]
    result = subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.main", *arguments, "--start_timeout_seconds=2"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == os.EX_TEMPFAIL  # 2 would tell a launcher to give up.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "process 1 has waited 2 s for the other processes at localhost:9" in line
    assert not (tmp_path / "run").exists()
