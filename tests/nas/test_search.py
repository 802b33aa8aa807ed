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
import types
from pathlib import Path

import jax
import pytest

optuna = pytest.importorskip("optuna")

from effnetv2_jax.errors import InputError  # noqa: E402
from effnetv2_jax.memory import DoesNotFit, NoRoom  # noqa: E402
from effnetv2_jax.nas import search as search_module  # noqa: E402
from effnetv2_jax.nas import study as study_module  # noqa: E402
from effnetv2_jax.nas import trial as trial_module  # noqa: E402
from effnetv2_jax.nas.report import pareto_front  # noqa: E402
from effnetv2_jax.nas.search import base_search_config, search  # noqa: E402
from effnetv2_jax.nas.study import trained_trials  # noqa: E402
from effnetv2_jax.nas.trial import Outcome, TrialFailed, reward  # noqa: E402
from effnetv2_jax.train import Interrupted, TrainingDiverged  # noqa: E402

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
    exponents = base_search_config().reward
    assert reward(0.8, 1.0, 1.0, **exponents) == 0.8
    # Twice as slow costs 4.7 %, twice as large 3.4 %.
    assert reward(0.8, 2.0, 1.0, **exponents) == pytest.approx(0.8 * 2**-0.07)
    assert reward(0.8, 1.0, 2.0, **exponents) == pytest.approx(0.8 * 2**-0.05)
    assert reward(0.8, 2.0, 2.0, time_exponent=0.0, parameters_exponent=0.0) == 0.8


def test_the_front_is_what_nothing_cheaper_beats():
    costs, accuracy = [3.0, 1.0, 2.0, 2.0, 4.0], [0.7, 0.5, 0.4, 0.6, 0.7]
    assert pareto_front(costs, accuracy) == [1, 3, 0]


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
    assert not (tmp_path / "importances.csv").exists()  # Of so few networks they would be noise.


def test_importances_name_what_the_reward_hangs_on(fake, tmp_path):
    """`fake_outcome` rewards Fused-MBConv most, expansion 6 a little and kernel sizes not."""
    search(small_config(num_trials=120), tmp_path)
    with (tmp_path / "importances.csv").open() as stream:
        found = {row["parameter"]: float(row["importance"]) for row in csv.DictReader(stream)}
    assert sum(found.values()) == pytest.approx(1, abs=0.01)
    shares = {
        kind: sum(value for name, value in found.items() if name.endswith(kind))
        for kind in ("operation", "expansion", "kernel_size")
    }
    assert shares["operation"] > shares["expansion"] + 0.2
    assert shares["operation"] > shares["kernel_size"] + 0.2


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


def test_programs_of_networks_that_were_tried_do_not_fill_the_disk(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(search_module, "_CACHE_BYTES", 250)
    folder = tmp_path / "compilation_cache"
    folder.mkdir()
    for age in range(4):
        (folder / f"program{age}").write_bytes(bytes(100))
        os.utime(folder / f"program{age}", (1e9 - age, 1e9 - age))
    search(small_config(num_trials=1), tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["program0", "program1"]


def test_it_goes_on_where_it_was(fake, tmp_path):
    search(small_config(num_trials=5), tmp_path)
    assert len(fake) == 5
    study = search(small_config(num_trials=9), tmp_path)
    assert len(fake) == len(set(fake)) == 9 and len(trained_trials(study)) == 9
    search(small_config(num_trials=9), tmp_path)
    assert len(fake) == 9
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
    assert len(done) == len(set(done)) == 12
    # What is tried does not depend on the interruption, nor does the order.
    monkeypatch.setattr(trial_module, "run_trial", run_trial)
    at_once = search(small_config(), tmp_path / "at_once")
    assert done == [trial.user_attrs["variant"] for trial in trained_trials(at_once)]


def _killed(study, trial, *, is_loss):
    """A process that is killed gives nothing back; another one finds what it lost."""


def _starts(monkeypatch, tmp_path, config=None):
    """Starts the search again and again, each time as another process, until it ends well."""
    for start in range(20):
        monkeypatch.setattr(study_module, "WORKER", (*study_module.WORKER[:2], str(start)))
        try:
            return start, search(config or small_config(), tmp_path)
        except (KeyboardInterrupt, RuntimeError, Interrupted):
            continue
    raise AssertionError("no start came to its end")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("INTERNAL: cuDNN")])
def test_a_network_that_ends_its_workers_is_given_up(fake, monkeypatch, tmp_path, error):
    """Killed by the system for its memory, or with an error that is none of `TrialFailed`."""
    if error is KeyboardInterrupt:
        monkeypatch.setattr(study_module, "give_back", _killed)
    run_trial = trial_module.run_trial
    calls = []

    def ends(config, variant, workdir, **rest):
        calls.append(variant)
        if variant == calls[0]:
            raise error
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", ends)
    start, study = _starts(monkeypatch, tmp_path)
    assert calls.count(calls[0]) == 5 == start
    assert len(trained_trials(study)) == 11 and calls[0] not in fake


def test_a_stop_is_no_fault_of_a_network_that_was_lost_before(fake, monkeypatch, tmp_path):
    run_trial = trial_module.run_trial
    calls = []

    def ends(config, variant, workdir, **rest):
        calls.append(variant)
        if variant == calls[0] and calls.count(variant) <= 6:
            # Four losses, of five that give it up, and two stops.
            raise Interrupted(15, 0) if calls.count(variant) > 4 else RuntimeError
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", ends)
    _, study = _starts(monkeypatch, tmp_path)
    assert calls.count(calls[0]) == 7 and calls[0] in fake
    assert len(trained_trials(study)) == 12


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


def test_many_networks_that_do_not_fit_leave_the_study_usable(fake, monkeypatch, tmp_path):
    run_trial = trial_module.run_trial

    def fails(config, variant, workdir, **rest):
        if 1 <= len(fake) <= 20:
            fake.append(variant)
            raise TrialFailed("RESOURCE_EXHAUSTED: out of memory")
        return run_trial(config, variant, workdir, **rest)

    monkeypatch.setattr(trial_module, "run_trial", fails)
    with pytest.raises(InputError, match=r"the last 20 networks failed.*start again to go on"):
        search(small_config(num_trials=25), tmp_path)
    assert len(fake) == 21
    study = search(small_config(num_trials=25), tmp_path)
    assert len(fake) == len(set(fake)) == 25 and len(trained_trials(study)) == 5


def _try_backbone(workdir):
    config = small_config()
    backbone = config.space.backbone
    return trial_module.run_trial(
        config.trial, backbone, workdir, timer=FakeTimer(), baseline=backbone
    )


@pytest.mark.parametrize(
    "error",
    [
        TrainingDiverged("the loss of step 3 is nan"),
        DoesNotFit("3 GiB", 3 * 2**30),
        NoRoom("3 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        float("nan"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_network_can_be_at_fault_for(monkeypatch, tmp_path, error):
    def train(config, workdir):
        if isinstance(error, float):
            return {"eval_ema/top1": error}
        raise error

    monkeypatch.setattr(trial_module, "train_and_evaluate", train)
    with pytest.raises(TrialFailed, match=r"nan|3 GiB|RESOURCE_EXHAUSTED"):
        _try_backbone(tmp_path)


def test_a_broken_device_is_no_networks_fault(monkeypatch, tmp_path):
    def train(config, workdir):
        raise jax.errors.JaxRuntimeError("INTERNAL: the driver is gone")

    monkeypatch.setattr(trial_module, "train_and_evaluate", train)
    with pytest.raises(jax.errors.JaxRuntimeError):
        _try_backbone(tmp_path)


def test_the_step_time_is_a_ratio_to_the_baseline(monkeypatch):
    """And a baseline whose state an error took with it begins anew."""
    config = small_config()
    baseline = config.space.backbone
    timer = trial_module.make_timer("device", config.trial, baseline)
    turns = []

    def turn(variant):
        turns.append(variant)
        if variant == "broken":
            raise MemoryError
        return lambda: 0.25 if variant == baseline else 0.75

    monkeypatch.setattr(timer, "_turn", turn)
    timer.prepare()
    assert timer("slow") == (750.0, 3.0) and turns == [baseline, "slow"]
    with pytest.raises(MemoryError):
        timer("broken")
    assert timer("slow") == (750.0, 3.0)
    assert turns == [baseline, "slow", "broken", baseline, "slow"]


def test_the_compilers_step_time_is_one_of_whole_steps(monkeypatch):
    from effnetv2_jax.tools import tpu_compile

    config = small_config()
    config.trial.data.update(name="digits", minival_examples=100)
    baseline = config.space.backbone
    variant = baseline.replace("f", "m")
    compiled = []

    def compile_steps(config, topology, *, steps):
        compiled.append(config)
        is_baseline = config.model.variant == baseline
        fits = config.model.variant != variant.replace("m3e6", "m5e6")
        milliseconds = 4.0 if is_baseline else 2.0
        yield types.SimpleNamespace(
            step="train",
            stage=1,
            fits=fits,
            error="17 GiB",
            estimated_ms=milliseconds,
        )

    monkeypatch.setattr(tpu_compile, "compile_steps", compile_steps)
    monkeypatch.setattr(tpu_compile, "topology_devices", lambda topology: [None] * 8)
    timer = trial_module.make_timer("tpu:v3:2x2", config.trial, baseline)
    timer.prepare()
    assert timer(variant) == (2.0, 0.5)
    whole = {"micro_batches": "1", "remat_groups": "0"}
    assert [each.memory.to_dict() for each in compiled] == [whole, whole]
    with pytest.raises(TrialFailed, match="does not fit into a core of v3:2x2: 17 GiB"):
        timer(variant.replace("m3e6", "m5e6"))


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
        ({"trial.augment.policy": "randaugmint"}, "randaugmint"),
        ({"trial.learning_rate.schedule": "linear"}, "unknown learning_rate.schedule 'linear'"),
        ({"trial.model.dtype": "float8"}, "unknown dtype 'float8'"),
        ({"trial.progressive.image_size": (8, 8)}, "below the network's total stride"),
        ({"trial.memory.micro_batches": "3"}, "memory.micro_batches 3 does not divide"),
        ({"trial.init_from": "runs/other"}, "init_from of the trials is 'runs/other'"),
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


def test_a_workdir_that_cannot_be_one(fake, tmp_path):
    (tmp_path / "file").write_text("text")
    for workdir, message in (
        (tmp_path / "file", "cannot be used (File exists): name another"),
        ("gs://bucket/nas", "workdir gs://bucket/nas is in a bucket: name a folder on a disk"),
    ):
        with pytest.raises(InputError) as error:
            search(small_config(), workdir)
        assert message in str(error.value)
    assert (tmp_path / "file").read_text() == "text" and not fake


def test_a_storage_that_is_lost_while_it_is_searched(fake, monkeypatch, tmp_path):
    def fails(config, variant, workdir, **rest):
        raise optuna.exceptions.StorageInternalError("the server closed the connection")

    monkeypatch.setattr(trial_module, "run_trial", fails)
    with pytest.raises(InputError, match="cannot be reached any more: start again to go on"):
        search(small_config(), tmp_path)


def test_a_password_is_not_told(fake, tmp_path):
    with pytest.raises(InputError) as error:
        search(small_config(), tmp_path, storage="postgresql://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(error.value) and "me:***@127.0.0.1" in str(error.value)


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
            reward(
                found["accuracy"], found["step_time"], found["parameters_ratio"], **config.reward
            )
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
