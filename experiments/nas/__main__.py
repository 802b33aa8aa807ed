"""The architecture search on real data: does its reward pick good networks, and which ones?"""

from __future__ import annotations

import csv
import functools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from experiments import rank, training
from experiments.experiment import (
    EXACT,
    PROXY,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    Value,
    command,
    markdown,
    shown,
)
from experiments.training import Arm, Spread, spread

FOLDER = Path(__file__).resolve().parent
TRIALS = FOLDER / "trials.csv"
CONFIG = "configs/nas_fashion_mnist.py"
_SEARCH = "search"
_NUM_AGAIN = 10  # Networks that are trained as in the search with another seed.
_SEED, _SECOND_SEED = 0, 1  # Of the search's trainings, and of those.
_NUM_BEST = 3
# Cores of the TPU that steps are compiled for, and images of each.
_TOPOLOGY, _CORES, _PER_CORE = "v3:2x2", 8, 128
_ACCURACY, _REWARD = "accuracy", "reward"
_COST = {"CPU": "step_time", "FLOPs": "FLOPs, G", "TPU": "ms"}


def _config() -> Any:
    from experiments.estimates import Run

    return Run(CONFIG).load()


def trials() -> list[dict[str, str]]:
    """Of the search, in the order of their numbers; none before it was run."""
    if not TRIALS.is_file():
        return []
    with TRIALS.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _search() -> dict[str, Value]:
    """Runs the search to its end, or goes on with it, and copies its trials."""
    from effnetv2_jax.nas.study import load_study, trained_trials

    workdir = training.RUNS / "nas"
    arguments = ["-m", "effnetv2_jax.nas.search", f"--config={CONFIG}", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    status = subprocess.run(
        [sys.executable, *arguments], cwd=training.ROOT, env=environment
    ).returncode
    if status:
        raise InputError(f"{' '.join(arguments)} ended with status {status}.")
    study = load_study(str(training.ROOT / workdir / "study.journal"))
    names = ("variant", "accuracy", "step_milliseconds", "step_time", "parameters")
    found = trained_trials(study)
    with TRIALS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("trial", _REWARD, *names, "parameters_ratio", "seconds"))
        for trial in found:
            values = [trial.user_attrs[name] for name in (*names, "parameters_ratio")]
            duration = trial.duration
            assert duration is not None
            seconds = round(duration.total_seconds())
            writer.writerow((trial.number, trial.value, *values, seconds))
    return {"networks": len(found), "best reward": max(trial.value for trial in found)}


def _as_in_the_search(variant: str) -> Arm:
    """The training of a trial."""
    from flax.traverse_util import flatten_dict

    from effnetv2_jax.nas.trial import trial_config
    from experiments.estimates import Run

    configs = (Run(training.CONFIG).load(), trial_config(_config().trial, variant))
    before, after = (flatten_dict(config.to_dict(), sep=".") for config in configs)
    changes = {key: value for key, value in after.items() if value != before[key]}
    return Arm(training.CONFIG, changes, is_tested=False)


def _in_full(variant: str) -> Arm:
    """Progressive learning, for as long as the other experiments train."""
    return Arm(training.CONFIG, {"model.variant": variant, "model.depth_multiplier": 1.0})


def _exact(variant: str) -> dict[str, Value]:
    from effnetv2_jax.models.create import create_model
    from experiments import counts

    model = create_model(variant, num_classes=10, **_small())
    return counts.quantities_of(model, training.IMAGE_SIZE[1])


def _small() -> dict[str, Any]:
    """What the trials' networks have in common."""
    model = _config().trial.model
    return {name: model[name] for name in ("width_multiplier", "stem_stride")}


def _estimate(variant: str) -> dict[str, Value]:
    """The TPU compiler's estimate of a training step."""
    from effnetv2_jax.nas.trial import trial_config
    from effnetv2_jax.tools.tpu_compile import chosen_rows, compile_steps

    config = trial_config(_config().trial, variant)
    config.batch_size = _CORES * _PER_CORE
    config.model.dtype = "bfloat16"
    config.progressive.image_size = (training.IMAGE_SIZE[1],) * 2
    (row,) = chosen_rows(list(compile_steps(config, _TOPOLOGY, steps=("train",))))
    return {"ms": row.estimated_ms, "GFLOPs an image by XLA": row.gflops_per_image}


def _ranked(by: str) -> list[dict[str, str]]:
    return sorted(trials(), key=lambda row: -float(row[by]))


def baseline() -> str:
    """The hand-made network that the ratios are to."""
    backbone: str = _config().space.backbone
    return backbone


def chosen() -> dict[str, str]:
    """What is trained in full: name -> variant; empty before the search."""
    ranked = _ranked(_REWARD)
    if not ranked:
        return {}
    found = {f"number {i + 1}": row["variant"] for i, row in enumerate(ranked[:_NUM_BEST])}
    found["the median"] = ranked[len(ranked) // 2]["variant"]
    return {**found, "baseline": baseline()}


def _again(variant: str) -> str:
    return f"{variant} as in the search"


def items() -> Sequence[Item]:
    """The search, and what its networks are compared by."""
    found = [Item(PROXY, _SEARCH, _search, packages=("jax", "flax", "optuna"))]
    variants = [row["variant"] for row in trials()]
    for variant in variants:
        found.append(Item(EXACT, variant, functools.partial(_exact, variant)))
    again = [(variant, _SECOND_SEED) for variant in variants[:_NUM_AGAIN]]
    for variant, seed in [*again, (baseline(), _SEED)] if variants else ():
        measure = functools.partial(training.train, _as_in_the_search(variant), seed)
        found.append(Item(PROXY, _again(variant), measure, seed=seed))
    found += training.items({variant: _in_full(variant) for variant in chosen().values()})
    for variant in variants:
        estimate = functools.partial(_estimate, variant)
        found.append(Item(TPU_ESTIMATE, variant, estimate, _TOPOLOGY, packages=("jax", "libtpu")))
    return found


def _noise(rows: Rows) -> tuple[list[float], list[float]]:
    """Accuracy in % of the same networks with the search's seed, and with another."""
    first = {row["variant"]: 100 * float(row[_ACCURACY]) for row in trials()[:_NUM_AGAIN]}
    second = [rows.number(_again(v), training.VALIDATION, PROXY) for v in first]
    return list(first.values()), second


def _costs(rows: Rows) -> dict[str, list[float]]:
    """Of each network, by each device."""
    known = trials()
    return {
        "CPU": [float(row[_COST["CPU"]]) for row in known],
        "FLOPs": [rows.number(row["variant"], _COST["FLOPs"], EXACT) for row in known],
        "TPU": [rows.number(row["variant"], _COST["TPU"], TPU_ESTIMATE) for row in known],
    }


class _Effect(NamedTuple):
    """What Fused-MBConv in place of MBConv does to the cost of a whole step, in %."""

    percent: float
    half_width: float  # Of the 95 % confidence interval.


def _effects(costs: Sequence[float]) -> list[_Effect]:
    """Stage by stage: a least-squares fit of the logarithm of the cost to all choices."""
    import numpy as np
    from scipy import stats

    stages = len(specs.get_spec(baseline()).rows)
    design = []
    for row in trials():
        features = [1.0]
        for each in specs.get_spec(row["variant"]).rows:
            features += [
                float(each.operation == "fused"),
                float(each.kernel_size == 5),
                math.log(each.expansion),
                float(each.repeats),
            ]
        design.append(features)
    freedom = len(design) - (1 + 4 * stages)
    if freedom < 1 or any(math.isnan(cost) for cost in costs):
        return [_Effect(math.nan, math.nan)] * stages
    matrix, logarithms = np.array(design), np.log(costs)
    fitted, *_ = np.linalg.lstsq(matrix, logarithms, rcond=None)
    variance = float(((logarithms - matrix @ fitted) ** 2).sum()) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(matrix.T @ matrix)))
    quantile = float(stats.t.ppf(0.975, freedom))
    found = []
    for index in range(1, 1 + 4 * stages, 4):
        factor = math.exp(fitted[index])
        found.append(_Effect(100 * (factor - 1), 100 * factor * quantile * float(errors[index])))
    return found


def _full(rows: Rows, name: str) -> Spread:
    return spread(rows, chosen()[name])


def tables(rows: Rows) -> Mapping[str, str]:
    """The best, the noise, the full trainings, the two rankings, the devices."""
    from effnetv2_jax.nas.trial import reward

    known = {row["variant"]: row for row in trials()}

    def line(name: str, row: Mapping[str, str]) -> tuple[Value, ...]:
        return (
            name,
            f"`{row['variant'].partition('@')[2]}`",
            f"{float(row[_REWARD]):.4f}",
            f"{100 * float(row[_ACCURACY]):.2f}",
            f"{float(row['step_time']):.2f}",
            f"{float(row['parameters_ratio']):.2f}",
        )

    header = ("", "rows", "reward", "accuracy, %", "step time", "parameters")
    best = [line(str(i), row) for i, row in enumerate(_ranked(_REWARD)[:10], 1)]
    full = []
    for name, variant in chosen().items():
        accuracy, step_time, parameters = (
            _of_search(known[variant])
            if variant in known
            else (rows.number(_again(variant), training.VALIDATION, PROXY), 1.0, 1.0)
        )
        rewards = (
            reward(percent / 100, step_time, parameters, **_config().reward)
            for percent in (accuracy, _full(rows, name).mean)
        )
        full.append(
            (
                name,
                shown(accuracy, ".2f"),
                str(_full(rows, name)),
                f"{step_time:.2f}",
                f"{parameters:.2f}",
                *(shown(value, ".4f") for value in rewards),
                _full(rows, name).minus(_full(rows, "baseline")) if name != "baseline" else "",
            )
        )
    choices = []
    if known:
        for name, by in (("by reward", _REWARD), ("by accuracy", _ACCURACY)):
            top = _ranked(by)[:_NUM_BEST]
            means = [statistics.fmean(float(row[key]) for row in top) for key in _MEANS]
            choices.append((name, f"{100 * means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:.2f}"))
    costs = _costs(rows)
    effects = {name: _effects(values) for name, values in costs.items()}
    stages = range(1, len(specs.get_spec(baseline()).rows) + 1)
    first, second = _noise(rows)
    return {
        "best": markdown(header, best),
        "noise": markdown(
            ("networks", "rank correlation of two seeds", "mean absolute difference, points"),
            [
                (
                    len(first),
                    shown(rank.correlation(first, second), ".2f", "not trained yet"),
                    shown(_mean_difference(first, second), ".2f"),
                )
            ],
        ),
        "full": markdown(
            (
                *("network", "accuracy in the search, %", "test top-1 in full, %", "step time"),
                *("parameters", "reward in the search", "reward in full"),
                "points over the baseline",
            ),
            full,
        ),
        "choices": markdown(
            (f"mean of the best {_NUM_BEST}", "accuracy, %", "step time", "parameters"), choices
        ),
        "devices": markdown(
            ("rank correlation of step times", "CPU", "FLOPs", "TPU"),
            [
                (
                    name,
                    *(
                        shown(rank.correlation(values, costs[other]), ".2f", "not compiled yet")
                        for other in costs
                    ),
                )
                for name, values in costs.items()
            ],
        ),
        "fused": markdown(
            ("Fused-MBConv instead of MBConv: step time, %", *(f"stage {s}" for s in stages)),
            [(name, *map(_shown_effect, values)) for name, values in effects.items()],
        ),
        "answer": f"{answer(rows)}.",
    }


def _of_search(row: Mapping[str, str]) -> tuple[float, float, float]:
    """Accuracy in %, and the ratios of step time and parameters to the baseline's."""
    return 100 * float(row[_ACCURACY]), float(row["step_time"]), float(row["parameters_ratio"])


def _shown_effect(effect: _Effect) -> str:
    if math.isnan(effect.percent):
        return ""
    return f"{effect.percent:+.0f} ± {effect.half_width:.0f}"


_MEANS = (_ACCURACY, "step_time", "parameters_ratio")


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    pairs = [abs(a - b) for a, b in zip(first, second, strict=True) if not math.isnan(b)]
    return statistics.fmean(pairs) if pairs else math.nan


def answer(rows: Rows) -> str:
    """Whether the winner beats the baseline, and how much of the ranking is noise."""
    if not trials():
        return "not searched yet"
    best = _ranked(_REWARD)[0]
    correlation = rank.correlation(*_noise(rows))
    gain = _full(rows, "number 1").minus(_full(rows, "baseline"))
    return (
        f"{len(trials())} networks; the best by reward has {float(best['step_time']):.2f} x the "
        f"baseline's step time and {float(best['parameters_ratio']):.2f} x its parameters, and in "
        f"full {gain or 'not trained yet'} points of top-1; rank correlation of two seeds "
        f"{shown(correlation, '.2f', 'not trained yet')}"
    )


def plot(rows: Rows, folder: Path) -> None:
    """Accuracy against cost, and what Fused-MBConv does to the step of each device."""
    import matplotlib

    from effnetv2_jax.nas.report import plot_costs

    known = trials()
    if not known:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    accuracy = [100 * float(row[_ACCURACY]) for row in known]
    rewards = [float(row[_REWARD]) for row in known]
    for axes, name in zip(all_axes, ("step_time", "parameters_ratio"), strict=False):
        costs = [float(row[name]) for row in known]
        points = plot_costs(axes, costs, accuracy, rewards)
        axes.set(xlabel=f"{name.replace('_', ' ')} to the baseline's", ylabel="accuracy, %")
    figure.colorbar(points, ax=all_axes[1], label="reward")
    for name, values in _costs(rows).items():
        effects = _effects(values)
        all_axes[2].errorbar(
            range(1, len(effects) + 1),
            [effect.percent for effect in effects],
            [effect.half_width for effect in effects],
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    all_axes[2].axhline(0, color="black", lw=0.8)
    all_axes[2].set(xlabel="stage", ylabel="Fused-MBConv instead of MBConv: cost, %")
    all_axes[2].grid(alpha=0.3)
    all_axes[2].legend()
    figure.savefig(folder / "search.png", dpi=90)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=FOLDER,
    question="Does the search find networks that are better, and which ones?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
