"""What a search found: the best networks as a table, a configuration and pictures."""

from __future__ import annotations

import csv
import io
import math
import uuid
from collections.abc import Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from effnetv2_jax.config import base_config
from effnetv2_jax.nas.study import trained_trials
from effnetv2_jax.nas.trial import trial_config

BEST, TABLE, PARETO, IMPORTANCES = (
    "best_config.py",
    "best_networks.csv",
    "pareto.png",
    "importances.csv",
)
_NUM_BEST = 10
# The evaluator compares the best tenth with all: below so many trials it is noise.
_LEAST_TRIALS = 50
_COLUMNS = ("accuracy", "step_milliseconds", "step_time", "parameters", "parameters_ratio")


def write(study: Any, workdir: epath.Path, config: ConfigDict) -> None:
    """Writes what is known so far.

    Args:
      study: with trials; without any nothing is written.
      workdir: gets `best_networks.csv` (ten), `best_config.py`, which `main` trains, `pareto.png`
        (accuracy against step time and parameters) and `importances.csv` (of the choices).
      config: of the search.
    """
    trials = trained_trials(study)
    if not trials:
        return
    best = sorted(trials, key=lambda trial: trial.values[0], reverse=True)[:_NUM_BEST]
    _write(workdir / TABLE, _table(best))
    _write(workdir / BEST, _configuration(best[0], len(trials), config))
    if (importances := _importances(study)) is not None:
        _write(workdir / IMPORTANCES, importances)
    _plot(trials, workdir / PARETO)


def _write(path: epath.Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: epath.Path, content: bytes) -> None:
    """Workers that share a folder each replace the whole file."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _table(best: Sequence[Any]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("trial", "variant", "reward", *_COLUMNS))
    for trial in best:
        attributes = trial.user_attrs
        writer.writerow(
            (trial.number, attributes["variant"], trial.value, *(attributes[c] for c in _COLUMNS))
        )
    return stream.getvalue()


def _configuration(best: Any, num_trials: int, config: ConfigDict) -> str:
    """A configuration file that trains the network as the trials do, for longer."""
    defaults = flatten_dict(base_config().to_dict(), sep=".")
    trial = trial_config(config.trial, best.user_attrs["variant"])
    # The held-out examples go on choosing the checkpoint; the test set says how good it is.
    trial.data.eval_split = None
    changes = {k: v for k, v in flatten_dict(trial.to_dict(), sep=".").items() if v != defaults[k]}
    examples = config.trial.data.train_examples
    limit = f" of {examples} examples" if examples else ""
    lift = " and set data.train_examples to None" if examples else ""
    lines = "\n".join(f"            {key!r}: {value!r}," for key, value in changes.items())
    return f'''"""The best of {num_trials} networks: trial {best.number}, reward {best.value:.4f}.

    python -m effnetv2_jax.main --config=THIS_FILE --workdir=DIR

It is trained as in the search, {config.trial.num_epochs:g} epochs{limit}: raise
num_epochs{lift}.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; it takes no argument."""
    parse_argument(argument)
    config = base_config()
    config.update_from_flattened_dict(
        {{
{lines}
        }}
    )
    return config
'''


def _importances(study: Any) -> str | None:
    """How unlike all trials the best tenth is in each choice, by Optuna's PED-ANOVA; sums to 1."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = trained_trials(study)
    if len(trials) < _LEAST_TRIALS or len({trial.value for trial in trials}) < 2:
        return None
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    lines = ["parameter,importance"]
    lines += [f"{name},{value:.4f}" for name, value in found.items() if not math.isnan(value)]
    return "\n".join(lines) + "\n"


def _plot(trials: Sequence[Any], path: epath.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    accuracy = [100 * trial.user_attrs["accuracy"] for trial in trials]
    rewards = [trial.value for trial in trials]
    for axes, name in zip(all_axes, ("step_time", "parameters_ratio"), strict=True):
        costs = [trial.user_attrs[name] for trial in trials]
        points = plot_costs(axes, costs, accuracy, rewards)
        axes.set_xlabel(f"{name.replace('_', ' ')} to the baseline's")
    all_axes[0].set_ylabel("top-1 on held-out examples, %")
    all_axes[0].legend(fontsize=8)
    figure.colorbar(points, ax=all_axes, label="reward")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    _write_bytes(path, buffer.getvalue())


def plot_costs(
    axes: Any, costs: Sequence[float], accuracy: Sequence[float], rewards: Sequence[float]
) -> Any:
    """Draws networks by cost and accuracy, coloured by reward, and marks front and best.

    Returns:
      The points, for a colour bar.
    """
    points = axes.scatter(costs, accuracy, c=rewards, s=14, cmap="viridis")
    front = pareto_front(costs, accuracy)
    axes.plot(
        [costs[i] for i in front],
        [accuracy[i] for i in front],
        color="tab:red",
        linewidth=1,
        label="Pareto front",
    )
    best = max(range(len(rewards)), key=rewards.__getitem__)
    axes.plot(costs[best], accuracy[best], "*", color="tab:red", ms=12, label="best reward")
    axes.grid(alpha=0.3)
    return points


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The indices of what is better than all that cost as much or less, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front
