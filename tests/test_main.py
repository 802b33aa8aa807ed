"""The command line: what it prints and how it exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}


def run_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.main", *arguments],
        cwd=ROOT,
        env=ONE_DEVICE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=configs/digits.py"], "--workdir is missing"),
        (["--config=configs/none.py", "--workdir={tmp}"], "configs/none.py"),
        (["--config=configs/digits.py", "--workdir={tmp}", "--batch=3"], "batch"),
        (["--config=configs/digits.py", "--workdir={tmp}", "stray"], "'stray' is not a flag"),
        (["--config=configs/digits.py", "--workdir={tmp}", "--config.bath_size=3"], "batch_size"),
        (["--config=configs/digits.py", "--workdir={tmp}", "--config.seed=one"], "seed"),
        (["--config=configs/s.py:recipe=relased", "--workdir={tmp}"], "did you mean released"),
        (["--config=configs/s.py:recipes=paper", "--workdir={tmp}"], "did you mean recipe"),
        (["--config=configs/s.py:paper,more", "--workdir={tmp}"], "is one too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    result = run_main(*(a.format(tmp=workdir) for a in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


def test_a_mistake_found_later_is_one_line_too(tmp_path):
    workdir = tmp_path / "run"
    result = run_main(
        "--config=tests/tiny.py", f"--workdir={workdir}", "--config.data.name=folder:/nowhere"
    )
    assert result.returncode == 2
    assert "error: '/nowhere' is not a folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_completes(tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config=tests/tiny.py", f"--workdir={workdir}", "--config.num_epochs=40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "effnetv2_jax.main", *arguments],
        cwd=ROOT,
        env=ONE_DEVICE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "[step 4/" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, "".join(lines)
    text = "".join(lines)
    assert "start again to go on" in text and "Traceback" not in text
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    result = run_main(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"Resuming from the checkpoint of step {saved}." in result.stderr
    assert "is complete" in result.stderr


def test_help_names_the_flags_and_loads_no_tensorflow():
    result = run_main("--help")
    assert "--config" in result.stdout and "--workdir" in result.stdout
    assert "tensorflow" not in result.stderr.lower()
