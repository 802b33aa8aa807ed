"""How a search draws: reproducibly, uniformly, and better where the controller has learnt."""

from __future__ import annotations

import collections

import pytest

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState  # noqa: E402

from effnetv2_jax.errors import InputError  # noqa: E402
from effnetv2_jax.nas.sampler import PolicySampler, distributions, make_sampler  # noqa: E402

PARAMETERS = {"a": ("x", "y", "z"), "b": (1, 2), "c": (3, 5)}
optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(sampler, num_trials, value=lambda params: 0.0):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(num_trials):
        trial = study.ask(fixed_distributions=distributions(PARAMETERS))
        study.tell(trial, value(trial.params))
    return study


def test_draws_depend_on_seed_and_number_alone():
    first = [t.params for t in run(PolicySampler(PARAMETERS, seed=1), 30).trials]
    again = [t.params for t in run(PolicySampler(PARAMETERS, seed=1), 30).trials]
    other = [t.params for t in run(PolicySampler(PARAMETERS, seed=2), 30).trials]
    assert first == again != other
    # A worker that comes in the middle draws what any other would have drawn.
    study = run(PolicySampler(PARAMETERS, seed=1), 20)
    study.sampler = PolicySampler(PARAMETERS, seed=1)
    trial = study.ask(fixed_distributions=distributions(PARAMETERS))
    assert trial.params == first[20]


def test_random_search_stays_uniform_whatever_the_rewards():
    study = run(PolicySampler(PARAMETERS, seed=0), 600, lambda p: float(p["a"] == "x"))
    for name, choices in PARAMETERS.items():
        counts = collections.Counter(trial.params[name] for trial in study.trials)
        for choice in choices:
            # Four standard deviations.
            assert counts[choice] / 600 == pytest.approx(1 / len(choices), abs=0.08)


def test_a_network_that_is_tried_again_changes_no_later_draw():
    whole = [t.params for t in run(PolicySampler(PARAMETERS, seed=1), 12).trials]
    study = run(PolicySampler(PARAMETERS, seed=1), 5)
    study.tell(study.ask(fixed_distributions=distributions(PARAMETERS)), state=TrialState.FAIL)
    study.enqueue_trial(study.trials[-1].params)
    for _ in range(7):
        study.tell(study.ask(fixed_distributions=distributions(PARAMETERS)), 0.0)
    done = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert done == whole


def test_the_controller_learns_what_is_rewarded():
    def value(params):
        # Differences as small as those of accuracies.
        return 0.8 + 0.01 * (params["a"] == "y") + 0.005 * (params["c"] == 5)

    sampler = PolicySampler(PARAMETERS, seed=0, learning_rate=0.1)
    study = run(sampler, 300, value)
    late = [trial.params for trial in study.trials[-60:]]
    assert sum(p["a"] == "y" for p in late) > 50
    assert sum(p["c"] == 5 for p in late) > 45
    # What makes no difference is not decided as firmly.
    probabilities = sampler.probabilities(study.trials)
    assert max(probabilities["b"]) < max(probabilities["a"])
    assert all(p.sum() == pytest.approx(1) for p in probabilities.values())


def test_equal_rewards_teach_nothing():
    sampler = PolicySampler(PARAMETERS, seed=0, learning_rate=0.1)
    probabilities = sampler.probabilities(run(sampler, 50, lambda p: 0.5).trials)
    assert probabilities["b"] == pytest.approx([0.5, 0.5])


def test_samplers_by_name():
    for name in ("random", "reinforce", "tpe", "nsga2"):
        sampler = make_sampler(name, 0.1, parameters=PARAMETERS, seed=0)
        run(sampler, 12)
    with pytest.raises(InputError, match="unknown sampler 'genetic': choose one of nsga2"):
        make_sampler("genetic", 0.1, parameters=PARAMETERS, seed=0)
