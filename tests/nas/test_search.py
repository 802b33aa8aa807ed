"""The search: resumes, shares a study, trains nothing twice, and tells mistakes in one sentence.

Most tests put a formula in place of training; the miniature search at the end is real.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from effnetv2_jax.errors import InputError  # noqa: E402
from effnetv2_jax.nas import study as study_module  # noqa: E402
from effnetv2_jax.nas import trial as trial_module  # noqa: E402
from effnetv2_jax.nas.search import base_search_config, search  # noqa: E402
from effnetv2_jax.nas.study import trained_trials  # noqa: E402
from effnetv2_jax.nas.trial import Outcome, TrialFailed, reward  # noqa: E402
from effnetv2_jax.train import Interrupted  # noqa: E402

ROOT = Path(__file__).parents[2]
optuna.logging.set_verbosity(optuna.logging.WARNING)


def small_config(**changes):
    config = base_search_config()
    config.num_trials = 12
    config.space.backbone = "efficientnetv2-b0@f3e1x1.f3e4x1.f3e4x1.m3e4x1.m3e6x1.m3e6x1"
    config.space.extra_layers = (0,)
    trial = config.trial
    trial.data.update(name="synthetic:classes=3,train=48,eval=8,size=32", minival_examples=16)
    trial.batch_size = 8
    trial.num_epochs = 1.0
    trial.model.update(dtype="float32", width_multiplier=0.25)
    trial.progressive.num_stages = 1
    trial.progressive.image_size = (32, 32)
    trial.learning_rate.warmup_epochs = 0.5
    trial.eval.update(image_size=32, batch_size=16, crop="squash")
    trial.checkpoint.keep = 1
    config.update_from_flattened_dict(changes)
    return config


class FakeTimer:
    device = "fake"

    def prepare(self):
        pass

    def __call__(self, variant):
        return 1.0, 1.0


def fake_outcome(variant):
    accuracy = 0.5 + 0.01 * variant.count("f") + 0.003 * variant.count("e6")
    return Outcome(accuracy, 10.0 + len(variant), 1.0, 1000, 1.0)


@pytest.fixture
def fake(monkeypatch):
    """Formulas in place of training; returns the variants that were trained."""
    trained = []

    def run_trial(config, variant, workdir, *, timer, baseline):
        trained.append(variant)
        return fake_outcome(variant)

    monkeypatch.setattr(trial_module, "run_trial", run_trial)
    monkeypatch.setattr(trial_module, "make_timer", lambda *arguments: FakeTimer())
    return trained


def test_the_reward_is_the_papers():
    assert reward(0.8, 1.0, 1.0) == 0.8
    # Twice as slow costs 4.7 %, twice as large 3.4 %.
    assert reward(0.8, 2.0, 1.0) == pytest.approx(0.8 * 2**-0.07)
    assert reward(0.8, 1.0, 2.0) == pytest.approx(0.8 * 2**-0.05)
    assert reward(0.8, 2.0, 2.0, time_exponent=0.0, parameters_exponent=0.0) == 0.8


def test_a_search_from_nothing(fake, tmp_path):
    study = search(small_config(), tmp_path)
    assert len(fake) == len(set(fake)) == len(trained_trials(study)) == 12
    best = max(trained_trials(study), key=lambda trial: trial.value)
    with (tmp_path / "best_networks.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 10 and rows[0]["variant"] == best.user_attrs["variant"]
    values = [float(row["reward"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert (tmp_path / "pareto.png").stat().st_size > 5000


def test_the_best_is_a_configuration_that_main_can_train(fake, tmp_path):
    searched = small_config()
    study = search(searched, tmp_path)
    spec = importlib.util.spec_from_file_location("best_config", tmp_path / "best_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.model.variant == study.best_trial.user_attrs["variant"]
    expected = small_config().trial
    expected.model.variant = config.model.variant
    expected.data.eval_split = None  # The test set, which the search did not see.
    assert config.to_dict() == expected.to_dict()
    # And writing it left the search's own configuration alone.
    assert searched.to_dict() == small_config().to_dict()


def test_it_goes_on_where_it_was(fake, tmp_path):
    search(small_config(num_trials=5), tmp_path)
    assert len(fake) == 5
    study = search(small_config(num_trials=9), tmp_path)
    assert len(fake) == len(set(fake)) == 9 and len(trained_trials(study)) == 9
    search(small_config(num_trials=9), tmp_path)
    assert len(fake) == 9
    # What is tried does not depend on the interruption.
    again: list[str] = []
    at_once = search(small_config(num_trials=9), tmp_path / "at_once")
    again = [trial.user_attrs["variant"] for trial in trained_trials(at_once)]
    assert again == [trial.user_attrs["variant"] for trial in trained_trials(study)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, MemoryError])
def test_a_trial_that_was_broken_off_is_tried_again(fake, monkeypatch, tmp_path, error):
    run_trial = trial_module.run_trial
    calls = []

    def breaks(config, variant, workdir, **rest):
        calls.append(variant)
        if len(calls) == 3:
            raise error("once")
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", breaks)
    with pytest.raises(error):
        search(small_config(), tmp_path)
    # The same process may go on, as in a notebook.
    study = search(small_config(), tmp_path)
    assert calls[3] == calls[2]
    done = [trial.user_attrs["variant"] for trial in trained_trials(study)]
    assert len(done) == len(set(done)) == 12 and calls[2] in done


def _only_lost(give_back):
    """A process that is killed gives nothing back; another one finds what it lost."""
    return lambda study, number, losses=None: losses and give_back(study, number, losses)


def test_a_network_that_kills_its_workers_is_given_up(fake, monkeypatch, tmp_path):
    """As when the system ends the process for its memory."""
    monkeypatch.setattr(study_module, "give_back", _only_lost(study_module.give_back))
    run_trial = trial_module.run_trial
    calls = []

    def kills(config, variant, workdir, **rest):
        calls.append(variant)
        if variant == calls[0]:
            raise KeyboardInterrupt
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", kills)
    for start in range(20):
        # Each start is another process.
        monkeypatch.setattr(study_module, "WORKER", (*study_module.WORKER[:2], str(start)))
        try:
            study = search(small_config(), tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert calls.count(calls[0]) == 5 == start
    assert len(trained_trials(study)) == 11 and calls[0] not in fake


def test_a_signal_between_trials_stops_the_search(fake, monkeypatch, tmp_path):
    run_trial = trial_module.run_trial

    def signalled(config, variant, workdir, **rest):
        if len(fake) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", signalled)
    with pytest.raises(Interrupted) as stopped:
        search(small_config(), tmp_path)
    assert stopped.value.signum == signal.SIGTERM and len(fake) == 3
    monkeypatch.setattr(trial_module, "run_trial", run_trial)
    search(small_config(), tmp_path)
    assert len(fake) == len(set(fake)) == 12


def test_a_failed_trial_is_recorded_and_the_search_goes_on(fake, monkeypatch, tmp_path):
    run_trial = trial_module.run_trial

    def fails(config, variant, workdir, **rest):
        if len(fake) == 4:
            fake.append(variant)
            raise TrialFailed("the loss of step 3 is not finite")
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", fails)
    study = search(small_config(), tmp_path)
    assert len(fake) == 12 and len(trained_trials(study)) == 11
    (failed,) = study.get_trials(states=(optuna.trial.TrialState.FAIL,))
    assert failed.user_attrs["error"] == "the loss of step 3 is not finite"
    assert failed.user_attrs["variant"] == fake[4]


def test_failures_without_end_are_no_fault_of_the_networks(fake, monkeypatch, tmp_path):
    def fails(config, variant, workdir, **rest):
        fake.append(variant)
        raise TrialFailed("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(trial_module, "run_trial", fails)
    with pytest.raises(InputError, match=r"the last 5 networks failed, at last by RESOURCE"):
        search(small_config(), tmp_path)
    assert len(fake) == 5


def test_a_space_that_is_used_up_ends_the_search(fake, tmp_path):
    config = small_config(num_trials=100)
    config.space.update(operations=("mbconv",), kernel_sizes=(3,), expansions=(4, 6))
    study = search(config, tmp_path)
    # 2^6 networks; what was drawn again was not trained again, and taught the same.
    assert len(fake) == len(set(fake)) <= 64 and len(fake) > 55
    repeated = [trial for trial in study.get_trials() if "same_as" in trial.user_attrs]
    values = {trial.number: trial.value for trial in study.get_trials()}
    assert repeated and all(t.value == values[t.user_attrs["same_as"]] for t in repeated)


def test_the_controller_finds_more_than_chance(fake, tmp_path):
    means = {}
    for name in ("random", "reinforce"):
        config = small_config(num_trials=150)
        config.sampler.update(name=name, learning_rate=0.15)
        study = search(config, tmp_path / name)
        late = trained_trials(study)[-40:]
        means[name] = sum(trial.value for trial in late) / len(late)
    assert means["reinforce"] > means["random"] + 0.005, means


_WORKER_SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from effnetv2_jax.nas import trial as trial_module
import test_search

def run_trial(config, variant, workdir, *, timer, baseline):
    with open({log!r}, "a") as stream:
        stream.write(variant + "\\n")
    time.sleep(0.25)
    return test_search.fake_outcome(variant)

trial_module.run_trial = run_trial
trial_module.make_timer = lambda *arguments: test_search.FakeTimer()
config = test_search.small_config(num_trials=24)
config.space.update(operations=("mbconv",), kernel_sizes=(3,), expansions=(4, 6))
test_search.search(config, {workdir!r}, storage={storage!r})
"""


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_two_workers_share_a_study_and_one_is_killed(storage, tmp_path):
    """All networks are there, and none twice; the space is so small that both draw the same."""
    log = tmp_path / "trained.txt"
    address = None if storage == "journal" else f"sqlite:///{tmp_path}/study.db"
    script = _WORKER_SCRIPT.format(
        tests=str(Path(__file__).parent),
        log=str(log),
        workdir=str(tmp_path / "nas"),
        storage=address,
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen([sys.executable, "-c", script], env=environment)

    one = start()
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().split()) < 3:
        assert time.monotonic() < deadline and one.poll() is None
        time.sleep(0.05)
    other = start()
    while len(log.read_text().split()) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert other.wait(timeout=120) == 0
    study = study_module.load_study(address or str(tmp_path / "nas/study.journal"))
    done = [trial.user_attrs["variant"] for trial in trained_trials(study)]
    assert len(done) == len(set(done)) == 24
    # Nothing was trained twice but what the killed one had begun.
    assert len(log.read_text().split()) <= 25
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space.operations": ()}, "operations of the space is ()"),
        ({"space.backbone": "resnet50"}, "is no EfficientNet"),
        ({"sampler.name": "genetic"}, "unknown sampler 'genetic'"),
        ({"num_trials": 0}, "num_trials is 0"),
        ({"trial.data.eval_split": None}, "set it to 'minival'"),
        ({"trial.data.minival_examples": 0}, "needs some: set minival_examples"),
        ({"trial.data.name": "synthetik"}, "unknown data set 'synthetik'"),
        ({"trial.model.depth_multiplier": 0.5}, "model.depth_multiplier of the trials is 0.5"),
        ({"trial.augment.policy": "randaugmint"}, "unknown"),
        ({"trial.learning_rate.schedule": "linear"}, "unknown"),
        ({"trial.model.dtype": "float8"}, "unknown dtype"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(fake, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        search(small_config(**changes), tmp_path / "nas")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not fake and not (tmp_path / "nas").exists()


def test_an_unknown_device(tmp_path):
    for where, message in (
        ("gpu", "unknown step time 'gpu': choose one of device, tpu:v3:4x4"),
        ("tpu:v9:4x4", "unknown TPU generation 'v9'"),
        ("tpu:v3:4x4", "batch_size 8"),  # For 32 cores.
    ):
        with pytest.raises(InputError) as error:
            search(small_config(), tmp_path / "nas", step_time=where)
        assert message in str(error.value)
    assert not (tmp_path / "nas").exists()


def test_a_study_of_another_search(fake, tmp_path):
    search(small_config(num_trials=2), tmp_path)
    for changes, what in (
        ({"space.expansions": (1, 4)}, "another space"),
        ({"reward.time_exponent": -0.1}, "another reward"),
        ({"trial.num_epochs": 2.0}, "another trial"),
    ):
        with pytest.raises(InputError, match=what):
            search(small_config(**changes), tmp_path)
    FakeTimer.device = "fake 2"
    try:
        with pytest.raises(InputError, match="another device"):
            search(small_config(), tmp_path)
    finally:
        FakeTimer.device = "fake"
    assert len(fake) == 2


def test_a_storage_that_cannot_be_reached(fake, tmp_path):
    for storage in (f"sqlite:///{tmp_path}/missing/study.db", "nosuch://host/db", str(tmp_path)):
        with pytest.raises(InputError) as error:
            search(small_config(), tmp_path / "nas", storage=storage)
        assert f"storage {storage!r} cannot be used" in str(error.value)


# ------------------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_a_miniature_search(tmp_path):
    """Two networks are really trained, timed, counted and scored on what was held out."""
    config = small_config(num_trials=2)
    study = search(config, tmp_path)
    trials = trained_trials(study)
    assert len(trials) == 2
    for trial in trials:
        found = trial.user_attrs
        assert 0.0 <= found["accuracy"] <= 1.0 and found["step_milliseconds"] > 0
        assert found["parameters"] == trial_module.num_parameters(config.trial, found["variant"])
        assert trial.value == pytest.approx(
            reward(found["accuracy"], found["step_time"], found["parameters_ratio"])
        )
        # Scored on what was held out, and on nothing else.
        (folder,) = [
            path
            for path in (tmp_path / "trials").iterdir()
            if json.loads((path / "config.json").read_text())["model"]["variant"]
            == found["variant"]
        ]
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["eval_ema/top1"] == found["accuracy"] and last["eval/num_examples"] == 16
        assert not (folder / "checkpoints").exists()
