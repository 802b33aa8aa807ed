"""Every configuration of the repository with every argument that makes a run of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from effnetv2_jax.config import Plan, make_plan
from effnetv2_jax.data.sizes import Sizes, published_sizes
from effnetv2_jax.models.specs import list_variants
from effnetv2_jax.recipes import NUM_CLASSES_21K, RECIPES, TRANSFER_DATA

CONFIGS = Path(__file__).parents[1] / "configs"

# Any folder of images, of this size for instance.
FOLDER = Sizes(1_000, 100, 5)
_FROM_SCRATCH = ("s", "m", "l", "b0", "b1", "b2", "b3")
_WITH_21K = ("s", "m", "l", "xl")


def _arguments() -> dict[str, list[str]]:
    """File name -> arguments."""
    table = {"finetune": ["", "weights=no"]}
    table |= {name: [""] for name in ("digits", "fashion_mnist", "fashion_mnist_subset")}
    names = [*_FROM_SCRATCH, *(f"{v}_21k{end}" for v in _WITH_21K for end in ("", "_ft1k"))]
    for name in names:
        table[name] = [f"recipe={recipe}" for recipe in RECIPES]
    table["transfer"] = [
        f"model={model},data={data},recipe={recipe}"
        for model in ("s", "m", "l")
        for data in TRANSFER_DATA
        for recipe in RECIPES
    ]
    v1 = [v.removeprefix("efficientnet-") for v in list_variants() if "-b" in v and "v2" not in v]
    table["v1"] = [
        f"{variant},{rest}"
        for variant in v1
        for rest in ("recipe=paper", "recipe=released", "recipe=paper,progressive=yes")
    ]
    table["resnet"] = ["50", "50,380", "152,380", "50,380,progressive=yes", "152,progressive=yes"]
    table["schedules"] = [
        "",
        "order=random",
        "order=random,adaptive=no",
        "adaptive=no",
        *(f"s,start={start},stages={n}" for start in (128, 256) for n in (4, 8, 16)),
    ]
    return table


ARGUMENTS = _arguments()
EVERY = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]


def load(name: str, argument: str) -> ConfigDict:
    """Calls `get_config` of `configs/NAME.py`, as the flag `--config` does."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument or None)


def num_classes(config: ConfigDict) -> int:
    """Outputs of the network on the real data."""
    return sizes(config).classes


def sizes(config: ConfigDict) -> Sizes:
    """Of the real data, as the run uses it."""
    is_folder = config.data.name == "folder:data"
    whole = FOLDER if is_folder else published_sizes(config.data.name)
    return whole.used_by(config.data)


def plan(config: ConfigDict) -> Plan:
    """The plan on the real data."""
    return make_plan(
        config,
        num_train_examples=sizes(config).train,
        num_eval_examples=sizes(config).eval,
        num_classes=num_classes(config),
    )


assert NUM_CLASSES_21K["paper"] == published_sizes("imagenet21k/fall11").classes
