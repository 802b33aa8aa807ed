"""Table 12: what progressive learning saves of the training time of ResNet and EfficientNet."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from effnetv2_jax.config import Plan
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments import counts, cpu, estimates, rank, training
from experiments.experiment import (
    CPU,
    EXACT,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    Value,
    command,
    markdown,
    shown,
)
from experiments.training import Arm, spread

# Configuration of the training at a fixed size -> the name in Table 12 (with the inference size),
# top-1 in % and hours on 32 cores of TPUv3, then both with progressive learning.
PAPER = {
    "configs/resnet.py:50,224": ("ResNet50 (224)", 78.1, 4.9, 78.4, 3.5),
    "configs/resnet.py:50,380": ("ResNet50 (380)", 80.0, 14.3, 80.3, 5.8),
    "configs/resnet.py:152,380": ("ResNet152 (380)", 82.4, 15.5, 82.9, 7.2),
    "configs/v1.py:b4": ("EfficientNet-B4", 82.9, 20.8, 83.1, 9.4),
    "configs/v1.py:b5": ("EfficientNet-B5", 83.7, 42.9, 84.0, 15.2),
}
# Of equal size and unequal depth.
_SHALLOW, _DEEP = "configs/resnet.py:50,380", "configs/resnet.py:152,380"

# Trained for real, on a thousand small pictures: name -> variant and the share of its width
# and depth.
SMALL = {
    "ResNet50 (width x 0.25)": ("resnet50", 0.25, 1.0),
    "EfficientNet-B0 (width x 0.5, depth x 0.5)": ("efficientnet-b0", 0.5, 0.5),
}
# Only timed on a CPU, at every size of their training: images of a step.
TIMED = {"configs/resnet.py:152,380": 4, "configs/v1.py:b5": 4}


def progressive(config: str) -> str:
    """The same network with progressive learning."""
    return f"{config},progressive=yes"


def _configs() -> list[str]:
    return [c for config in PAPER for c in (config, progressive(config))]


def _exact(config: str) -> dict[str, Value]:
    """What is counted: the network at its inference size, and the sizes it is trained at."""
    loaded = estimates.Run(config).load()
    plan = plan_of(loaded)
    return {
        **counts.quantities(loaded.model.variant, loaded.eval.image_size),
        "training sizes, px": ", ".join(str(stage.image_size) for stage in plan.stages),
        "mean area of a training image, px": _mean_area(plan),
    }


def _mean_area(plan: Plan) -> float:
    """Of a training image over all steps, in pixels."""
    pixels = sum(stage.num_steps * stage.image_size**2 for stage in plan.stages)
    return pixels / plan.total_steps


def _small(name: str, is_progressive: bool) -> str:
    return f"{name}, {'progressive' if is_progressive else 'fixed size'}"


def _arms() -> dict[str, Arm]:
    found = {}
    for name, (variant, width, depth) in SMALL.items():
        network = {
            "model.variant": variant,
            "model.width_multiplier": width,
            "model.depth_multiplier": depth,
        }
        found[_small(name, False)] = Arm(training.CONFIG, {**network, "progressive.num_stages": 1})
        found[_small(name, True)] = Arm(training.CONFIG, network)
    return found


def _sizes(config: str) -> list[int]:
    """Of the training with and without progressive learning."""
    return sorted(
        {
            stage.image_size
            for each in (config, progressive(config))
            for stage in plan_of(estimates.Run(each).load()).stages
        }
    )


def _at(config: str, size: int) -> str:
    return f"{config} at {size} px"


def items() -> Sequence[Item]:
    """Each network with and without progressive learning."""
    found = [Item(EXACT, c, functools.partial(_exact, c)) for c in _configs()]
    for config, batch_size in TIMED.items():
        variant = estimates.Run(config).load().model.variant
        for size in _sizes(config):
            measure_step = functools.partial(cpu.train_quantities, variant, size, batch_size)
            found.append(Item(CPU, _at(config, size), measure_step))
    found += training.items(_arms())
    for config in _configs():
        measure = functools.partial(estimates.hours_quantities, estimates.Run(config))
        found.append(
            Item(TPU_ESTIMATE, config, measure, estimates.POD, packages=estimates.PACKAGES)
        )
    return found


def _speed_ups(rows: Rows, quantity: str, scale: str) -> list[float]:
    """Fixed size / progressive learning of each network."""
    return [
        rows.number(config, quantity, scale) / rows.number(progressive(config), quantity, scale)
        for config in PAPER
    ]


def _by_area(rows: Rows) -> list[float]:
    return _speed_ups(rows, "mean area of a training image, px", EXACT)


def _by_estimate(rows: Rows) -> list[float]:
    return _speed_ups(rows, "hours", TPU_ESTIMATE)


def _seconds_an_image(rows: Rows, config: str) -> float:
    """Of the mean training step on a CPU, over the stages of a run."""
    plan = plan_of(estimates.Run(config).load())
    fixed = config.removesuffix(",progressive=yes")
    return (
        sum(
            stage.num_steps / rows.number(_at(fixed, stage.image_size), "images/s", CPU)
            for stage in plan.stages
        )
        / plan.total_steps
    )


def _by_paper() -> list[float]:
    return [fixed / progressive for _, _, fixed, _, progressive in PAPER.values()]


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 12 beside the paper's."""

    def hours(config: str) -> str:
        found = shown(rows.number(config, "hours", TPU_ESTIMATE), ".1f")
        return found or rows.find(config, "hours", TPU_ESTIMATE)

    exact = [
        (
            name,
            shown(rows.number(config, "parameters, M"), ".2f"),
            shown(rows.number(config, "FLOPs, G"), ".2f"),
            rows.find(config, "training sizes, px"),
            rows.find(progressive(config), "training sizes, px"),
        )
        for config, (name, *_) in PAPER.items()
    ]
    time = [
        (name, hours(config), paper[1], hours(progressive(config)), paper[3], paper[0], paper[2])
        for config, (name, *paper) in PAPER.items()
    ]
    speed_ups = [
        (name, *(shown(value, ".2f") for value in line))
        for (name, *_), *line in zip(
            PAPER.values(), _by_area(rows), _by_estimate(rows), _by_paper(), strict=True
        )
    ]
    depth = []
    for what, ours, theirs, column in (
        ("fixed size", _SHALLOW, _DEEP, 2),
        ("progressive", progressive(_SHALLOW), progressive(_DEEP), 4),
    ):

        def ratio(quantity: str, shallow: str = ours, deep: str = theirs) -> str:
            return shown(rows.number(deep, quantity) / rows.number(shallow, quantity), ".2f")

        paper = PAPER[_DEEP][column] / PAPER[_SHALLOW][column]
        depth.append((what, ratio("FLOPs, G"), ratio("hours"), f"{paper:.2f}"))
    trained = []
    areas = {
        name: _mean_area(plan_of(estimates.Run(arm.config, dict(arm.overrides)).load()))
        for name, arm in _arms().items()
    }
    for name in SMALL:
        fixed, rising = (_small(name, is_progressive) for is_progressive in (False, True))
        seconds = [spread(rows, arm, training.SECONDS) for arm in (fixed, rising)]
        trained.append(
            (
                name,
                *(str(spread(rows, arm)) for arm in (fixed, rising)),
                spread(rows, rising).minus(spread(rows, fixed)),
                *map(str, seconds),
                shown(seconds[0].mean / seconds[1].mean, ".2f"),
                shown(areas[fixed] / areas[rising], ".2f"),
            )
        )
    timed = []
    for config in TIMED:
        found = [_seconds_an_image(rows, each) for each in (config, progressive(config))]
        timed.append(
            (
                PAPER[config][0],
                *(shown(1e3 * each, ".0f") for each in found),
                shown(found[0] / found[1], ".2f"),
                f"{PAPER[config][2] / PAPER[config][4]:.2f}",
            )
        )
    return {
        "trained": markdown(
            (
                *("network", "fixed size: test top-1, %", "progressive: test top-1, %"),
                *("difference, points", "fixed size: training steps, s"),
                *("progressive: training steps, s", "speed-up", "by area"),
            ),
            trained,
        ),
        "timed": markdown(
            (
                *("network", "ms an image, fixed size", "progressive", "speed-up"),
                "the paper's speed-up",
            ),
            timed,
        ),
        "exact": markdown(
            (
                *("network", "parameters, M", "FLOPs, G", "training px, fixed"),
                "training px, progressive",
            ),
            exact,
        ),
        "time": markdown(
            (
                *("network", "fixed size, h (estimate)", "the paper's"),
                *("progressive, h (estimate)", "the paper's"),
                *("top-1 in the paper, %, fixed", "progressive"),
            ),
            time,
        ),
        "speed_up": markdown(
            ("network", "by area", "by the TPU compiler's estimate", "the paper's"), speed_ups
        ),
        "depth": markdown(
            ("ResNet152 (380) / ResNet50 (380)", "FLOPs", "hours (estimate)", "the paper's hours"),
            depth,
        ),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """How the speed-ups compare."""
    parts = []
    for what, ours in (
        ("by area", _by_area(rows)),
        ("by the TPU compiler's estimate", _by_estimate(rows)),
    ):
        known = [shown(value, ".2f", "not compiled yet") for value in ours]
        text = known[0] if len(set(known)) == 1 else ", ".join(known)
        correlation = rank.correlation(ours, _by_paper())
        parts.append(f"{what}: {text} (rank correlation {shown(correlation, '.2f', 'none')})")
    paper = ", ".join(f"{value:.2f}" for value in _by_paper())
    for name in SMALL:
        fixed, rising = (_small(name, is_progressive) for is_progressive in (False, True))
        difference = spread(rows, rising).minus(spread(rows, fixed))
        ratio = (
            spread(rows, fixed, training.SECONDS).mean / spread(rows, rising, training.SECONDS).mean
        )
        if difference:
            parts.append(f"trained on a CPU, {name}: {ratio:.2f}, top-1 {difference}")
    return f"speed-up of training {'; '.join(parts)}; in the paper: {paper}"


def plot(rows: Rows, folder: Path) -> None:
    """Accuracy of all seeds, and all speed-ups beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    labels = []
    for name in SMALL:
        for is_progressive, color in ((False, "tab:gray"), (True, "tab:blue")):
            values = spread(rows, _small(name, is_progressive)).values
            left.plot(values, [len(labels)] * len(values), "o", color=color)
            labels.append(f"{name},\n{'progressive' if is_progressive else 'fixed size'}")
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.set_xlabel(f"{training.TEST} (all seeds)")
    places = list(range(len(PAPER)))
    series = {
        "by area": _by_area(rows),
        "by the TPU compiler's estimate": _by_estimate(rows),
        "the paper's": _by_paper(),
    }
    for offset, (label, values) in zip((-0.25, 0.0, 0.25), series.items(), strict=True):
        right.bar([place + offset for place in places], values, width=0.25, label=label)
    right.set_xticks(
        places, [row[0].replace(" ", "\n").replace("-", "-\n") for row in PAPER.values()]
    )
    right.set_ylabel("speed-up: fixed size / progressive")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(folder / "progressive.png", dpi=100)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="How much training time does progressive learning save other networks?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (
            PAPER[config.removesuffix(",progressive=yes")][0]
            + (", progressive" if config not in PAPER else ""),
            f"python -m effnetv2_jax.main --config={config} --workdir=DIR",
        )
        for config in _configs()
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
