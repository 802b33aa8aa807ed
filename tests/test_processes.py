"""Runs of several processes against runs of one, and what signals and deaths do to them.

How far two runs agree depends on the order in which numbers are added, nothing else. Two replicas
add a + b or b + a, so two processes of one device train as one process of two, bit for bit. From
four replicas on a process adds those of its own devices in turn, while several processes go round
a ring: gradients and batch statistics differ in their last bit, which each step passes on. The
first three losses differ by 4e-7 at most and their gradients' norms by 9e-7; in nine steps that
grows to 1.1e-5 (and as much between 4 and 8 devices of one process). Evaluation adds the same
examples in other batches: 1.3e-7.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from effnetv2_jax.tools.launch import _free_port as free_port
from tests.test_train import assert_same_bits, lasting_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
LAST_STEP = 9  # 2 epochs of 72 examples in batches of 16.
# Training mixes, crops and augments; evaluation counts 13 examples over batches of 8.
RUN = [
    "--config=tests/tiny.py",
    "--config.num_epochs=2.0",
    "--config.progressive.num_stages=1",
    "--config.progressive.image_size=16,16",
    "--config.eval.image_size=16",
    "--config.log_every_steps=1",
]


def start(processes, devices, workdir, *more, launcher=()):
    command = [sys.executable, "-m", "effnetv2_jax.tools.launch", *launcher]
    command += [f"--processes={processes}", f"--devices_per_process={devices}", "--", *RUN]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )


def child(launcher, index):
    """The process id of a launcher's process."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"--process_id={index}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no process {index}")


def finish(launcher, *, at_step=None, then=None):
    """Waits for the end, calling `then` once when process 0 reports a step."""
    lines = []
    for line in launcher.stderr:
        lines.append(line)
        if then is not None and f"[step {at_step}/" in line:
            then()
            then = None
    return launcher.wait(), "".join(lines)


def complete(*arguments, **options):
    status, errors = finish(start(*arguments, **options))
    assert status == 0, errors
    return errors


def last_arrays(workdir):
    path = workdir / "checkpoints" / str(LAST_STEP) / "default"
    return ocp.StandardCheckpointer().restore(path)


def steps_saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def assert_same_but_for_order(ours, theirs, first_step=1):
    ours = [row for row in lasting_rows(ours) if row["step"] >= first_step]
    theirs = [row for row in lasting_rows(theirs) if row["step"] >= first_step]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    counts = 0
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for name in our:
            counts += name.endswith("num_examples")
            tolerance = 2e-6 if name == "train/grad_norm" else 1e-6
            if our["step"] >= first_step + 3:
                # Each step multiplies what rounding left of the one before.
                tolerance = 1e-4
            assert our[name] == pytest.approx(their[name], rel=tolerance), (our["step"], name)
            assert not name.endswith("num_examples") or our[name] == 13
    assert counts >= 4


@pytest.fixture(scope="module")
def one_by_two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_by_two")
    complete(1, 2, workdir)
    return workdir


@pytest.fixture(scope="module")
def one_by_four(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_by_four")
    complete(1, 4, workdir)
    return workdir


def without_evaluation(rows):
    return [{k: v for k, v in row.items() if not k.startswith("eval")} for row in rows]


def test_killed_and_started_again_ends_as_one_process_of_as_many_devices(one_by_two, tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, 1, workdir, launcher=("--restarts=1", "--pause_seconds=0"))
    status, errors = finish(
        launcher, at_step=5, then=lambda: os.kill(child(launcher, 1), signal.SIGKILL)
    )
    assert status == 0, errors
    assert "launch: process 1 of 2 was killed by signal 9 (SIGKILL), ending the others" in errors
    assert "Resuming from the checkpoint of step" in errors
    assert_same_bits(last_arrays(workdir), last_arrays(one_by_two))
    ours, theirs = lasting_rows(workdir), lasting_rows(one_by_two)
    assert without_evaluation(ours) == without_evaluation(theirs)
    assert_same_but_for_order(workdir, one_by_two)
    # Process 0 alone reports: each step once, and no line of progress behind a prefix.
    assert len([row for row in ours if "train/loss" in row]) == LAST_STEP
    progress = [line for line in errors.splitlines() if f"/{LAST_STEP}] epoch" in line]
    assert len(progress) >= LAST_STEP and not any(line.startswith("[") for line in progress)
    assert len(list((workdir / "tensorboard").glob("events.*"))) == 2  # One for each start.


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(one_by_two, tmp_path, signum):
    workdir = tmp_path / "run"
    launcher = start(2, 1, workdir, launcher=("--restarts=3",))
    status, errors = finish(launcher, at_step=2, then=lambda: os.kill(child(launcher, 1), signum))
    assert status == 128 + signum, errors
    assert "start again to go on" in errors and "launch:" not in errors
    stopped_at = steps_saved(workdir)[-1]
    assert f"stopped at step {stopped_at};" in errors and 2 < stopped_at < LAST_STEP
    errors = complete(1, 2, workdir, "--config.parallel=shard_map")
    assert f"Resuming from the checkpoint of step {stopped_at}." in errors
    assert_same_bits(last_arrays(workdir), last_arrays(one_by_two))


def test_a_cluster_starts_two_processes_of_shard_map(one_by_four, tmp_path):
    """SLURM tells each process who it is; nothing is passed."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "effnetv2_jax.main", *RUN, "--config.parallel=shard_map"]
    shared = {
        **ENVIRONMENT,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    processes = [
        subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env={**shared, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert_same_but_for_order(workdir, one_by_four)
    assert len(list((workdir / "tensorboard").glob("events.*"))) == 1


def test_four_processes_go_on_where_one_was(one_by_four, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one_by_four, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(LAST_STEP))
    errors = complete(4, 1, workdir)
    assert "Resuming from the checkpoint of step 6." in errors
    assert_same_but_for_order(workdir, one_by_four, first_step=7)


def test_four_processes_share_batch_statistics_in_groups_and_stop_together(tmp_path):
    """Groups of four replicas, each over two processes."""
    one, four = tmp_path / "one", tmp_path / "four"
    groups = "--config.model.bn_group_size=4"
    complete(1, 8, one, groups)
    launcher = start(4, 2, four, groups)
    status, errors = finish(
        launcher, at_step=1, then=lambda: os.kill(child(launcher, 3), signal.SIGTERM)
    )
    assert status == 128 + signal.SIGTERM, errors
    complete(4, 2, four, groups)
    assert_same_but_for_order(four, one)
