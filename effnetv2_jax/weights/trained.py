"""Weights of ours, wherever they lie: a workdir, one of its checkpoints, a model folder."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from effnetv2_jax.checkpoint import read_parts
from effnetv2_jax.errors import InputError
from effnetv2_jax.paths import absolute
from effnetv2_jax.weights.model_folder import SPEC, ModelSpec, load_model, load_spec
from effnetv2_jax.workdir import CONFIG, PLAN, read_class_names

# The network of a configuration that a spec repeats under the same name.
MODEL_FIELDS = (
    "variant",
    "padding",
    "bn_epsilon",
    "stem_stride",
    "width_multiplier",
    "depth_multiplier",
)


def load_trained(
    path: str | os.PathLike[str], *, averaged: bool = True
) -> tuple[ModelSpec, dict[str, Any]]:
    """Reads trained weights.

    Args:
      path: a model folder, a workdir (its newest checkpoint is read), or one checkpoint in it,
        for instance `DIR/best/1000`.
      averaged: of a checkpoint, whether to take the moving averages, as evaluation does.

    Returns:
      What the weights are, and {'params', 'batch_stats'} as NumPy arrays.

    Raises:
      InputError: there are none, or they are damaged.
    """
    folder = absolute(path)
    if (folder / SPEC).is_file():
        _, variables, spec = load_model(folder)
        return spec, variables
    workdir, checkpoint = _find_checkpoint(folder)
    spec = _spec_of_run(workdir, checkpoint)
    prefix = "ema_" * averaged
    try:
        parts = read_parts(checkpoint, (f"{prefix}params", f"{prefix}batch_stats"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the checkpoint {checkpoint} cannot be read ({reason}): name another one."
        ) from error
    return spec, {
        "params": parts[f"{prefix}params"],
        "batch_stats": parts[f"{prefix}batch_stats"],
    }


def load_spec_of(path: str | os.PathLike[str]) -> ModelSpec:
    """What the weights are that `load_trained` would read.

    Raises:
      InputError: there are none, or nothing describes them.
    """
    folder = absolute(path)
    if (folder / SPEC).is_file():
        return load_spec(folder)
    return _spec_of_run(*_find_checkpoint(folder))


def _find_checkpoint(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The workdir and the checkpoint folder that `path` names."""
    if (path / "default").is_dir():
        return path.parent.parent, path
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{str(path)!r} is neither a model folder nor a workdir nor a checkpoint of one: name "
            f"a folder that holds {SPEC} or {CONFIG}, or DIR/checkpoints/STEP."
        )
    folder = path / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise InputError(f"{str(path)!r} has no checkpoint yet: train it first.")
    return path, folder / str(max(steps))


def _spec_of_run(workdir: epath.Path, checkpoint: epath.Path) -> ModelSpec:
    """What a run's configuration says of its weights."""
    try:
        config = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        plan = json.loads((workdir / PLAN).read_text(encoding="utf-8"))
        classes = read_class_names(workdir)
        model, evaluation = config["model"], config["eval"]
        return ModelSpec(
            num_classes=plan["num_classes"],
            eval_size=evaluation["image_size"],
            train_size=max(stage["image_size"] for stage in plan["stages"]),
            mean=tuple(config["normalize"]["mean"]),
            std=tuple(config["normalize"]["std"]),
            crop=evaluation["crop"],
            crop_fraction=evaluation.get("crop_fraction"),
            resize=evaluation["resize"],
            scores=config["loss"]["kind"],
            label_space=config["data"]["name"],
            classes=tuple(classes) if classes else None,
            source=f"effnetv2_jax run, checkpoint of step {checkpoint.name}",
            **{field: model[field] for field in MODEL_FIELDS if field in model},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{CONFIG} or {PLAN} of {str(workdir)!r} cannot be read ({error}): name another run."
        ) from error
