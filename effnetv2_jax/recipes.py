"""The published ways to train, by name: `paper` and `released`, never mixed silently.

`paper` is the text (Table 6, Algorithm 1, section 5.1), `released` the official code (automl
efficientnetv2: effnetv2_configs.py, datasets.py, hparams.py, main.py). They differ in stages,
strengths, cutmix and BatchNorm decay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models.specs import get_spec

RECIPES = ("paper", "released")


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Ends of progressive learning: (first stage, last stage) of each strength."""

    image_size: tuple[int, int]
    dropout_rate: tuple[float, float]
    randaug_magnitude: tuple[float, float]
    mixup_alpha: tuple[float, float] = (0.0, 0.0)
    cutmix_alpha: tuple[float, float] = (0.0, 0.0)
    num_stages: int = 4


# Table 6. The paper gives nothing for XL, which gets L's settings, as in the released code.
_PAPER_L = StageSettings((128, 380), (0.1, 0.5), (5.0, 25.0), mixup_alpha=(0.0, 0.4))
_PAPER = {
    "efficientnetv2-s": StageSettings((128, 300), (0.1, 0.3), (5.0, 15.0)),
    "efficientnetv2-m": StageSettings((128, 380), (0.1, 0.4), (5.0, 20.0), mixup_alpha=(0.0, 0.2)),
    "efficientnetv2-l": _PAPER_L,
    "efficientnetv2-xl": _PAPER_L,
}


def _paper_base(variant: str) -> StageSettings:
    """B0 to B3, which Table 11 trains without progressive learning and without further detail.

    Sizes and dropout are the released ones; magnitude 10 is the best of Table 5 at 192 px.
    """
    spec = get_spec(variant)
    size, rate = spec.train_size, spec.dropout_rate
    return StageSettings((size, size), (rate, rate), (10.0, 10.0), num_stages=1)


# effnetv2_configs.py: largest RandAugment magnitude, and the alpha that mixup and cutmix share.
# B0 to B3 use AutoAugment in place of RandAugment.
_RELEASED_STRENGTHS = {
    "efficientnetv2-b0": (0.0, 0.0),
    "efficientnetv2-b1": (0.0, 0.0),
    "efficientnetv2-b2": (0.0, 0.0),
    "efficientnetv2-b3": (0.0, 0.0),
    "efficientnetv2-s": (10.0, 0.0),
    "efficientnetv2-m": (15.0, 0.2),
    "efficientnetv2-l": (20.0, 0.5),
    "efficientnetv2-xl": (20.0, 0.5),
}


def stage_settings(variant: str, recipe: str) -> StageSettings:
    """Progressive learning of a variant on ImageNet-1k.

    The paper's caption of Table 7 says that the ImageNet-21k models are trained with progressive
    learning too, so `paper` uses the same settings there, with the 21,841 classes of section 5.2;
    `released` trains 21k at a fixed 224 px without augmentation, see `stage_settings_21k`.
    """
    spec = get_spec(variant)
    if recipe == "paper":
        return _PAPER[variant] if variant in _PAPER else _paper_base(variant)
    if recipe == "released":
        magnitude, alpha = _RELEASED_STRENGTHS[variant]
        # hparams.py: 128 px and magnitude 5 to begin with. main.py computes a rising dropout
        # rate and deletes it, so the rate is constant.
        return StageSettings(
            (128, spec.train_size),
            (spec.dropout_rate, spec.dropout_rate),
            (5.0, magnitude) if magnitude else (0.0, 0.0),
            mixup_alpha=(0.0, alpha),
            cutmix_alpha=(0.0, alpha),
        )
    raise unknown_name("recipe", recipe, RECIPES)


def stage_settings_21k(variant: str, recipe: str) -> StageSettings:
    """Progressive learning of a variant on ImageNet-21k."""
    if recipe == "released":
        # datasets.py: 224 px, no stages, crop and flip alone, dropout 1e-6 to keep the layer.
        get_spec(variant)
        return StageSettings((224, 224), (0.0, 0.0), (0.0, 0.0), num_stages=1)
    return stage_settings(variant, recipe)


NUM_CLASSES_21K = {
    "paper": 21_841,  # Section 5.2.
    "released": 21_843,  # automl efficientnetv2/datasets.py.
}


def _apply(config: ConfigDict, settings: StageSettings, recipe: str) -> None:
    values: dict[str, Any] = dataclasses.asdict(settings)
    config.progressive.update({"form": recipe, **values})
    if max(settings.randaug_magnitude) == 0:
        config.augment.randaug_layers = 0


def imagenet1k(variant: str, recipe: str) -> ConfigDict:
    """Training on ImageNet-1k from scratch.

    Args:
      variant: one of `list_variants()`.
      recipe: `paper` or `released`.

    Raises:
      InputError: an unknown name, or B0 to B3 by `released`, which needs AutoAugment.
    """
    settings = stage_settings(variant, recipe)
    if recipe == "released" and variant.startswith("efficientnetv2-b"):
        raise InputError(
            f"recipe 'released' of {variant} needs AutoAugment, which this package does not "
            "have yet: take recipe=paper."
        )
    config = base_config()
    config.model.variant = variant
    config.eval.image_size = get_spec(variant).eval_size
    if recipe == "released":
        config.model.bn_decay = 0.9  # hparams.py; section 5.1 of the paper says 0.99.
    _apply(config, settings, recipe)
    return config
