"""The command that evaluates agrees with the evaluation of the run that trained the weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from effnetv2_jax import save_model, train_and_evaluate
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.evaluate import evaluate_model
from effnetv2_jax.weights.trained import load_trained
from tests.tiny import get_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's workdir and its last evaluation."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    config = get_config()
    config.eval.update(crop="center", crop_fraction=0.9, at_stage_size=False)
    return workdir, train_and_evaluate(config, workdir), config.data.name


def test_it_agrees_with_the_run(run, tmp_path):
    workdir, trained, data = run
    results = evaluate_model(workdir, data, batch_size=5)
    assert results["num_examples"] == trained["eval/num_examples"] == 13
    assert results["top1"] == trained["eval_ema/top1"]
    assert results["top5"] == trained["eval_ema/top5"]
    assert results["loss"] == pytest.approx(trained["eval_ema/loss"], rel=1e-5)
    # A model folder knows how its images are prepared.
    folder = save_model(tmp_path / "model", *load_trained(workdir))
    assert evaluate_model(folder, data, batch_size=5) == results


def test_mistakes(run):
    workdir, _, data = run
    with pytest.raises(InputError, match=r"has 10 classes that are not the 5 of .*fine-tune"):
        evaluate_model(workdir, "digits")
    with pytest.raises(InputError, match="unknown dtype 'float31'"):
        evaluate_model(workdir, data, dtype="float31")


def test_the_command_line(run):
    workdir, trained, data = run
    command = [sys.executable, "-m", "effnetv2_jax.tools.evaluate", f"--model={workdir}"]
    result = subprocess.run([*command, f"--data={data}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["top1"] == trained["eval_ema/top1"]
    result = subprocess.run([*command, "--data=digit"], capture_output=True, text=True)
    # TensorFlow logs a line of its own before.
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean digits" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
