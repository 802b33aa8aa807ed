"""How a search chooses: at random, by a REINFORCE controller, or by Optuna's own samplers.

The first two depend on nothing but the seed, how many networks were drawn before and what the
study knows, so any worker would draw the same, and a network that has to be tried again changes no
later draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from effnetv2_jax.errors import unknown_name

RANDOM, REINFORCE = "random", "reinforce"
# Optuna's, by its names without the ending.
_OPTUNA = {"tpe": "TPESampler", "nsga2": "NSGAIISampler"}
# Advantages are in standard deviations of the rewards so far; this keeps the first ones small.
_LEAST_DEVIATION = 1e-3
# What Optuna marks a trial with that was not drawn, see `Study.enqueue_trial`.
_QUEUED = "fixed_params"


class PolicySampler(BaseSampler):
    """A distribution over each choice by itself, which learns by REINFORCE.

    The controller of Tan et al. 2019 (MnasNet) without its recurrence: the probability of a
    network is the product over its choices. After each trial, in the order of their numbers, the
    logits move along the gradient of the log-probability, times the advantage over a moving
    average of the rewards. With a learning rate of 0 it is random search. A network that failed has
    no reward, and teaches nothing.

    Args:
      parameters: name -> choices.
      seed: of all draws.
      learning_rate: of the logits, for an advantage of one standard deviation.
      baseline_decay: of the moving average of rewards.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[Any, ...]],
        *,
        seed: int,
        learning_rate: float = 0.0,
        baseline_decay: float = 0.9,
    ):
        self._parameters = parameters
        self._seed = seed
        self._learning_rate = learning_rate
        self._baseline_decay = baseline_decay

    def probabilities(self, trials: Sequence[FrozenTrial]) -> dict[str, np.ndarray]:
        """Of each choice, after these trials."""
        logits = {name: np.zeros(len(c)) for name, c in self._parameters.items()}
        baseline, square, weight = 0.0, 0.0, 0.0
        for trial in sorted(trials, key=lambda trial: trial.number):
            if self._learning_rate == 0 or not trial.values:
                continue
            value = trial.values[0]
            if weight > 0:
                mean = baseline / weight
                deviation = math.sqrt(max(0.0, square / weight - mean**2))
                advantage = (value - mean) / max(deviation, _LEAST_DEVIATION)
                step = self._learning_rate * float(np.clip(advantage, -3, 3))
                for name, choices in self._parameters.items():
                    gradient = -_softmax(logits[name])
                    gradient[choices.index(trial.params[name])] += 1.0
                    logits[name] += step * gradient
            decay = self._baseline_decay
            baseline = decay * baseline + (1 - decay) * value
            square = decay * square + (1 - decay) * value**2
            weight = decay * weight + (1 - decay)
        return {name: _softmax(values) for name, values in logits.items()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters are drawn together."""
        del study, trial
        return distributions(self._parameters)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """A choice for every parameter."""
        del search_space
        trials = study.get_trials(deepcopy=False)
        done = [other for other in trials if other.state == TrialState.COMPLETE]
        probabilities = self.probabilities(done)
        drawn = sum(
            other.number < trial.number and _QUEUED not in other.system_attrs for other in trials
        )
        rng = random.Random(f"{self._seed} {drawn}")
        return {
            name: rng.choices(choices, weights=list(probabilities[name]))[0]
            for name, choices in self._parameters.items()
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that the space does not have."""
        raise ValueError(f"{param_name} is no parameter of this space")


def make_sampler(
    name: str, learning_rate: float, *, parameters: Mapping[str, tuple[Any, ...]], seed: int
) -> BaseSampler:
    """A sampler by its name.

    Args:
      name: `random` or `reinforce` (the paper names both), or Optuna's `tpe` or `nsga2`, whose
        draws differ from start to start, as workers with the same seed would draw the same.
      learning_rate: of `reinforce`.
      parameters: name -> choices.
      seed: of the draws of the first two.

    Raises:
      InputError: an unknown name.
    """
    if name in (RANDOM, REINFORCE):
        rate = learning_rate if name == REINFORCE else 0.0
        return PolicySampler(parameters, seed=seed, learning_rate=rate)
    if name not in _OPTUNA:
        raise unknown_name("sampler", name, (RANDOM, REINFORCE, *_OPTUNA))
    sampler: BaseSampler = getattr(optuna.samplers, _OPTUNA[name])()
    return sampler


def distributions(parameters: Mapping[str, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    """As Optuna has them."""
    return {name: CategoricalDistribution(choices) for name, choices in parameters.items()}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    normalised: np.ndarray = shares / shares.sum()
    return normalised
