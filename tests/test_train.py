"""Whole runs, cut down: what they leave, how they resume, how they refuse."""

from __future__ import annotations

import json
import os
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from ml_collections import ConfigDict

import effnetv2_jax.train as train_module
import effnetv2_jax.workdir as workdir_module
from effnetv2_jax import train_and_evaluate
from effnetv2_jax.checkpoint import CHECKSUMS
from effnetv2_jax.errors import InputError
from effnetv2_jax.reporting import read_metrics
from effnetv2_jax.train import Interrupted, TrainingDiverged
from tests.data.miniature_21k import encode
from tests.tiny import get_config

TOTAL_STEPS = 27  # 6 epochs of 72 examples in batches of 16.
STAGE_ENDS = (9, 18, 27)


def lasting_rows(workdir):
    """The rows of metrics.jsonl without the values that depend on the clock."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(workdir)
    ]
    return [row for row in rows if set(row) != {"step"}]


def final_arrays(workdir):
    path = workdir / "checkpoints" / str(TOTAL_STEPS) / "default"
    return ocp.StandardCheckpointer().restore(path)


def assert_same_bits(ours, theirs):
    ours, theirs = (jax.tree_util.tree_leaves_with_path(t) for t in (ours, theirs))
    assert [p for p, _ in ours] == [p for p, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), path


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory):
    """A run that nothing interrupts: its workdir and its result."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, train_and_evaluate(get_config(), workdir)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_before_step(monkeypatch, step):
    """Makes the next run die between step - 1 and `step`."""
    original = train_module.staged_batches

    def dying(config, plan, dataset, first_step):
        batches = original(config, plan, dataset, first_step)
        for number, batch in enumerate(batches, first_step):
            if number == step:
                raise Killed
            yield batch

    monkeypatch.setattr(train_module, "staged_batches", dying)


def test_a_run_leaves_what_the_readme_promises(straight_run):
    workdir, result = straight_run
    assert (workdir / "checkpoints" / str(TOTAL_STEPS) / CHECKSUMS).exists()
    assert len(list((workdir / "checkpoints").iterdir())) == 3  # config.checkpoint.keep
    assert len(list((workdir / "best").iterdir())) == 1
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (workdir / "progress.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["variant"] == "efficientnetv2-b0"
    plan = json.loads((workdir / "plan.json").read_text())
    assert plan["total_steps"] == TOTAL_STEPS
    assert [s["last_step"] for s in plan["stages"]] == list(STAGE_ENDS)
    assert result["eval/num_examples"] == result["eval_ema/num_examples"] == 13
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert all("step" in json.loads(line) for line in lines)


def test_a_run_learns(straight_run):
    workdir, result = straight_run
    losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert result["eval/top1"] > 0.4  # Chance is 0.2.


def test_metrics_cover_every_step_once(straight_run):
    workdir, _ = straight_run
    rows = read_metrics(workdir)
    train_steps = [row["step"] for row in rows if "train/loss" in row]
    assert train_steps == [4, 8, 12, 16, 20, 24, 27]
    eval_steps = [row["step"] for row in rows if "eval/top1" in row]
    assert eval_steps == [7, 9, 14, 18, 21, 27]  # Every 7 steps and after each stage.
    by_step = {row["step"]: row for row in rows if "train/loss" in row}
    assert [by_step[s]["progressive/image_size"] for s in (8, 16, 24)] == [16, 24, 32]
    assert by_step[8]["progressive/dropout_rate"] < by_step[24]["progressive/dropout_rate"]


def test_one_deliberate_compilation_for_each_image_size(straight_run):
    workdir, _ = straight_run
    rows = [row for row in read_metrics(workdir) if "perf/compile_seconds" in row]
    assert [row["step"] for row in rows] == [1, 10, 19]
    hidden = [row["perf/compile_hidden_seconds"] for row in rows]
    # Nothing trains before the first stage. This run is shorter than its compilations.
    assert hidden[0] < 0.1 < min(hidden[1:])
    assert all(h <= row["perf/compile_seconds"] for h, row in zip(hidden, rows, strict=True))
    assert {row["perf/micro_batches"] for row in rows} == {1}


def test_evaluation_at_the_stage_size_is_apart(straight_run):
    workdir, _ = straight_run
    rows = {row["step"]: row for row in read_metrics(workdir) if "eval/top1" in row}
    assert rows[7]["eval_stage/loss"] != rows[7]["eval/loss"]
    assert rows[27]["eval_stage/loss"] == rows[27]["eval/loss"]


@pytest.mark.parametrize("steps", [(5, 9), (18,)], ids=str)
def test_killed_and_resumed_equals_the_straight_run_bit_for_bit(
    straight_run, tmp_path, monkeypatch, steps
):
    workdir = tmp_path / "run"
    for step in steps:
        with monkeypatch.context() as patch:
            kill_before_step(patch, step)
            with pytest.raises(Killed):
                train_and_evaluate(get_config(), workdir)
    # A torn last line, as a kill leaves it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')
    train_and_evaluate(get_config(), workdir)
    assert_same_bits(final_arrays(workdir), final_arrays(straight_run[0]))
    assert lasting_rows(workdir) == lasting_rows(straight_run[0])


def test_a_complete_run_says_so_and_changes_nothing(straight_run, caplog):
    workdir, result = straight_run
    before = (workdir / "metrics.jsonl").read_text()
    logging.set_verbosity(logging.INFO)
    again = train_and_evaluate(get_config(), workdir)
    assert "is complete" in caplog.text
    assert (workdir / "metrics.jsonl").read_text() == before
    assert again["eval_ema/top1"] == result["eval_ema/top1"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(straight_run, tmp_path, monkeypatch, signum):
    workdir = tmp_path / "run"
    original = train_module.staged_batches

    def signalling(config, plan, dataset, first_step):
        for number, batch in enumerate(original(config, plan, dataset, first_step)):
            if number == 4:
                os.kill(os.getpid(), signum)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "staged_batches", signalling)
        with pytest.raises(Interrupted) as interruption:
            train_and_evaluate(get_config(), workdir)
    assert interruption.value.signum == signum
    assert (workdir / "checkpoints" / "5" / CHECKSUMS).exists()
    train_and_evaluate(get_config(), workdir)
    assert_same_bits(final_arrays(workdir), final_arrays(straight_run[0]))
    assert lasting_rows(workdir) == lasting_rows(straight_run[0])


def test_a_diverged_run_stops_and_saves_no_bad_state(tmp_path):
    config = get_config()
    config.learning_rate.per_256_images = 1e30
    config.learning_rate.warmup_epochs = 1.5  # Steps of rate 0 first, so that one is good.
    with pytest.raises(TrainingDiverged, match=r"step [0-9]+ is not finite"):
        train_and_evaluate(config, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("*"):
        state = ocp.StandardCheckpointer().restore(folder / "default")
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(state["params"]))


def test_another_config_is_refused_with_the_difference(straight_run):
    workdir, _ = straight_run
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    config = get_config()
    config.optimizer.weight_decay = 0.5
    with pytest.raises(InputError, match=r"optimizer.weight_decay: 1e-05 -> 0.5"):
        train_and_evaluate(config, workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_harmless_changes_are_accepted(straight_run):
    config = get_config()
    config.checkpoint.keep = 5
    config.log_every_steps = 1
    config.memory.micro_batches = "1"  # As one does when a stage did not fit.
    train_and_evaluate(config, straight_run[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.variant", "efficientnetv2-q", "unknown variant 'efficientnetv2-q'"),
        ("data.name", "imagnet2012", "did you mean imagenet2012"),
        ("batch_size", 12, "batch_size 12 cannot be split over 8 devices"),
        ("batch_size", 8, "mix pairs"),
        ("progressive.image_size", (8, 32), "8 px, below the network's total stride of 16"),
        ("eval.image_size", 8, "eval.image_size gives images of 8 px"),
        ("num_epochs", 0.3, "cannot be cut into 3 stages"),
        ("progressive.dropout_rate", (0.1, 1.5), "progressive.dropout_rate"),
        ("learning_rate.schedule", "cosin", "did you mean cosine"),
        ("augment.crop_area", (0.5, 2.0), "crop_area"),
        ("augment.randaug_layers", -1, "randaug_layers -1"),
        ("eval.crop", "squish", "did you mean squash"),
        ("model.dtype", "float8", "dtype"),
        ("memory.micro_batches", "7", "memory.micro_batches 7 does not divide"),
        ("memory.remat_groups", "1,2", "names 2 stages of 3"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_workdir(tmp_path, key, value, message):
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message) as error:
        train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train_and_evaluate(get_config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_it_runs_outside_the_main_thread(straight_run):
    """Signals cannot be caught there; notebooks and services still train."""
    failures = []

    def run():
        try:
            train_and_evaluate(get_config(), straight_run[0])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def test_every_leaf_of_the_configuration_is_read(tmp_path, monkeypatch):
    """Reads are recorded during a short run, those of the file `config.json` excepted."""
    read = set()

    class Recorder(ConfigDict):
        def __init__(self, values, prefix=""):
            super().__init__()
            object.__setattr__(self, "_prefix", prefix)
            for name, value in values.items():
                nested = isinstance(value, dict)
                self[name] = Recorder(value, f"{prefix}{name}.") if nested else value

        def __getitem__(self, key):
            read.add(f"{object.__getattribute__(self, '_prefix')}{key}")
            return super().__getitem__(key)

    plain = get_config().to_dict()
    monkeypatch.setattr(workdir_module, "to_plain", lambda _: {})
    config = Recorder(plain | {"min_steps": 2, "num_epochs": 1e-3})
    config.progressive["num_stages"] = 1
    read.clear()
    train_and_evaluate(config, tmp_path / "run")
    leaves = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in plain.items()
        for key in (value if isinstance(value, dict) else [None])
    }
    # Only a run that starts from another one reads how its head starts.
    assert leaves - read == {"init_head"}


def test_minival_selects_and_stops_early(tmp_path):
    config = get_config()
    config.data.minival_examples = 8
    config.num_epochs = 60.0
    config.progressive.update(num_stages=1, image_size=(16, 16))
    config.learning_rate.per_256_images = 1e-9  # No evaluation is better than the first.
    config.ema_decay = 0.0
    config.eval.update(every_epochs=1.0, patience_epochs=3.0, at_stage_size=False, image_size=16)
    train_and_evaluate(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    evaluations = [row for row in rows if "minival_ema/top1" in row]
    assert evaluations[0]["minival/num_examples"] == 8
    assert evaluations[0]["eval/num_examples"] == 13
    # 64 examples are four steps an epoch: best after 4, stale at 16.
    assert [row["step"] for row in evaluations] == [4, 8, 12, 16]
    assert [p.name for p in (tmp_path / "run" / "best").iterdir()] == ["4"]
    assert (tmp_path / "run" / "checkpoints" / "16").is_dir()
    # The next call finds the run complete.
    again = train_and_evaluate(config, tmp_path / "run")
    assert again["minival/num_examples"] == 8
    assert len(read_metrics(tmp_path / "run")) == len(rows)


@pytest.fixture
def folder_with_a_corrupt_image(tmp_path):
    """Two classes, 16 training and 8 evaluation images, one of which is cut short in each."""
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                content = encode(100 * number + i)
                broken = name == "dog" and i == 0
                (folder / f"{i}.jpg").write_bytes(content[:-200] if broken else content)
    return tmp_path / "images"


def test_corrupt_images_are_fatal_or_skipped_by_choice(tmp_path, folder_with_a_corrupt_image):
    config = get_config()
    config.data.name = f"folder:{folder_with_a_corrupt_image}"
    config.num_epochs = 3.0
    config.progressive.update(num_stages=1, image_size=(16, 16))
    config.eval.update(image_size=16, at_stage_size=False)
    with pytest.raises(InputError, match=r"dog/0\.jpg' cannot be decoded"):
        train_and_evaluate(config, tmp_path / "run")
    config.on_corrupt = "skip"  # And the run goes on in the same workdir.
    results = train_and_evaluate(config, tmp_path / "run")
    assert results["eval/num_examples"] == 7
