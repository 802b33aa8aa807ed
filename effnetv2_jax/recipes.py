"""The published ways to train, by name: `paper` and `released`, never mixed silently.

`paper` is the text (Table 6, Algorithm 1, sections 5.1 to 5.3), `released` the official code
(automl efficientnetv2: effnetv2_configs.py, datasets.py, hparams.py, main.py). Where the paper
is silent, `paper` has the released value. docs/paper_vs_released.md lists every difference.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.weights.model_folder import ModelSpec
from effnetv2_jax.weights.trained import MODEL_FIELDS, load_spec_of

RECIPES = ("paper", "released")

# Training images that both hold out as minival: section 5.1 (about 2 %), and the first 20 of the
# 1,024 training files (datasets.py), which hold 25,021. ImageNet-21k: files 16 to 19 there.
MINIVAL = {"paper": 25_000, "released": 25_021}
MINIVAL_21K = {"paper": 0, "released": 25_089}

# The paper's 21,841 classes (section 5.2) are those of the data; datasets.py has 21,843 outputs.
NUM_CLASSES_21K = {"paper": 21_841, "released": 21_843}


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Ends of progressive learning: (first stage, last stage) of each strength."""

    image_size: tuple[int, int]
    dropout_rate: tuple[float, float]
    randaug_magnitude: tuple[float, float]
    mixup_alpha: tuple[float, float] = (0.0, 0.0)
    cutmix_alpha: tuple[float, float] = (0.0, 0.0)
    num_stages: int = 4


def _fixed(image_size: int, dropout_rate: float, magnitude: float) -> StageSettings:
    """One stage: no progressive learning."""
    return StageSettings(
        (image_size, image_size), (dropout_rate,) * 2, (magnitude,) * 2, num_stages=1
    )


# Table 6. The paper gives nothing for XL, which gets L's settings, as in the released code.
_PAPER_L = StageSettings((128, 380), (0.1, 0.5), (5.0, 25.0), mixup_alpha=(0.0, 0.4))
_PAPER = {
    "efficientnetv2-s": StageSettings((128, 300), (0.1, 0.3), (5.0, 15.0)),
    "efficientnetv2-m": StageSettings((128, 380), (0.1, 0.4), (5.0, 20.0), mixup_alpha=(0.0, 0.2)),
    "efficientnetv2-l": _PAPER_L,
    "efficientnetv2-xl": _PAPER_L,
}

# effnetv2_configs.py: largest RandAugment magnitude, and the alpha that mixup and cutmix share.
# B0 to B3 and V1 use AutoAugment in place of RandAugment.
_RELEASED_STRENGTHS = {
    "efficientnetv2-s": (10.0, 0.0),
    "efficientnetv2-m": (15.0, 0.2),
    "efficientnetv2-l": (20.0, 0.5),
    "efficientnetv2-xl": (20.0, 0.5),
}
# Of the baselines.
_AS_LARGE_AS_M = ("efficientnet-b5", "efficientnet-b6", "efficientnet-b7")


def _is_v1(variant: str) -> bool:
    return variant.startswith("efficientnet-b")


def stage_settings(variant: str, recipe: str) -> StageSettings:
    """Progressive learning of a variant on ImageNet-1k.

    Args:
      variant: one of `list_variants()`; others than V2 have no progressive learning here, see
        `baseline_stage_settings`.
      recipe: `paper` or `released`.
    """
    spec = get_spec(variant)
    _check_recipe(recipe)
    if recipe == "paper" and variant in _PAPER:
        return _PAPER[variant]
    if recipe == "paper" or not variant.startswith("efficientnetv2-"):
        # Table 11 trains B0 to B3 without progressive learning and without further detail: sizes
        # and dropout are the released ones, and magnitude 10 is the best of Table 5 at 192 px.
        return _fixed(spec.train_size, spec.dropout_rate, 10.0)
    magnitude, alpha = _RELEASED_STRENGTHS.get(variant, (0.0, 0.0))
    # hparams.py: 128 px and magnitude 5 to begin with. main.py computes a rising dropout rate
    # and deletes it, so the rate is constant.
    return StageSettings(
        (128, spec.train_size),
        (spec.dropout_rate, spec.dropout_rate),
        (5.0, magnitude) if magnitude else (0.0, 0.0),
        mixup_alpha=(0.0, alpha),
        cutmix_alpha=(0.0, alpha),
    )


def stage_settings_21k(variant: str, recipe: str) -> StageSettings:
    """Progressive learning of a variant on ImageNet-21k.

    The caption of Table 7 says that these models are trained with progressive learning too, so
    `paper` has the settings of ImageNet-1k. `released` trains at 224 px in one stage, with a
    dropout rate of 1e-6 that only keeps the layer (datasets.py).
    """
    _check_recipe(recipe)
    if recipe == "released":
        get_spec(variant)
        return _fixed(224, 0.0, 0.0)
    return stage_settings(variant, recipe)


def baseline_stage_settings(
    variant: str, progressive: bool, image_size: int | None = None
) -> StageSettings:
    """EfficientNet V1 and ResNet as the paper trains them again, for Tables 10 and 12.

    The paper gives sizes and times only. Without progressive learning the size is that of
    inference (B4 takes the 21 h of Table 7). With it, V1's sizes end 20 % below (section 4), and
    ResNet's at it, which comes nearer to the times of Table 12. The other ends are those of the V2
    network that is nearest in size: M from V1-B5 on, else S.

    Args:
      variant: of V1 or ResNet.
      progressive: with or without progressive learning.
      image_size: of inference, pixels; None: the variant's own.
    """
    spec = get_spec(variant)
    size = image_size or spec.eval_size
    like = _PAPER["efficientnetv2-m" if variant in _AS_LARGE_AS_M else "efficientnetv2-s"]
    # ResNet has no dropout of its own.
    dropout_rate = spec.dropout_rate or like.dropout_rate[1]
    if not progressive:
        return _fixed(size, dropout_rate, like.randaug_magnitude[1])
    last = size if spec.family == "resnet" else spec.train_size
    return dataclasses.replace(like, image_size=(128, last), dropout_rate=(0.1, dropout_rate))


# ------------------------------------------------------------------------- preprocessing paths


def _v2_preprocessing(config: ConfigDict) -> None:
    """preprocessing.py: any crop from 5 % of the area on, bilinear, (x - 128) / 128."""
    config.augment.update(crop="random", crop_area=(0.05, 1.0), crop_aspect_ratio=(0.75, 1.33))
    config.augment.resize = "bilinear"
    config.eval.update(crop="released", resize="bilinear")
    config.normalize.update(mean=(128.0,) * 3, std=(128.0,) * 3)


def _legacy_preprocessing(config: ConfigDict) -> None:
    """preprocess_legacy.py: EfficientNet V1's crops, TF1's bicubic, ImageNet's mean and std."""
    config.augment.update(crop="legacy", crop_area=(0.08, 1.0), crop_aspect_ratio=(3 / 4, 4 / 3))
    config.augment.resize = "bicubic"
    config.eval.update(crop="legacy", resize="bicubic")
    config.normalize.mean = (255 * 0.485, 255 * 0.456, 255 * 0.406)
    config.normalize.std = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def _finetune_preprocessing(config: ConfigDict) -> None:
    """preprocessing.py, `ft`: whole images squashed, a square of noise, (x / 255 - .5) / .5."""
    config.augment.update(crop="squash", resize="bilinear", policy="none", noise_cutout=True)
    config.eval.update(crop="squash", resize="bilinear")
    config.normalize.update(mean=(127.5,) * 3, std=(127.5,) * 3)


# ------------------------------------------------------------------------------------ the runs


def _check_recipe(recipe: str) -> None:
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)


def _base(variant: str, recipe: str, settings: StageSettings) -> ConfigDict:
    """What all runs of a recipe share."""
    _check_recipe(recipe)
    config = base_config()
    config.model.variant = variant
    config.eval.image_size = get_spec(variant).eval_size
    values: dict[str, Any] = dataclasses.asdict(settings)
    config.progressive.update({"form": recipe, **values})
    if recipe == "released":
        config.model.bn_decay = 0.9  # hparams.py; section 5.1 of the paper says 0.99.
        config.augment.policy = "randaugment_released"
        config.mixing = "released"
    if max(settings.randaug_magnitude) == 0:
        config.augment.policy = "none"
    return config


def imagenet1k(variant: str, recipe: str) -> ConfigDict:
    """Training on ImageNet-1k from scratch.

    Args:
      variant: one of `list_variants()`.
      recipe: `paper` or `released`.

    Raises:
      InputError: an unknown name.
    """
    config = _base(variant, recipe, stage_settings(variant, recipe))
    config.data.minival_examples = MINIVAL[recipe]
    _v2_preprocessing(config)
    if recipe == "released" and variant.startswith("efficientnetv2-b"):
        _legacy_preprocessing(config)  # effnetv2_configs.py: augname effnetv1_autoaug.
        config.augment.policy = "autoaugment"
    return config


# Section 5 of the paper draws a new size "every eight epochs", of 350.
_EPOCHS_PER_DRAW = 8.0


def schedule_ablation(
    variant: str, *, order: str, adaptive: bool, start_size: int = 128, num_stages: int = 4
) -> ConfigDict:
    """Another schedule of sizes on ImageNet-1k: Table 13, and Table 14 of the appendix.

    Table 13 names no network; its best accuracy is that of M. The paper does not say from which
    sizes a random one is drawn, nor how strong fixed regularisation is: here from those of the
    stages, and as strong as the last stage.

    Args:
      variant: with settings in Table 6.
      order: of the sizes, see `progressive.make_stages`.
      adaptive: whether the strengths belong to the sizes, or are those of the last stage always.
      start_size: the smallest, pixels.
      num_stages: M of Algorithm 1.
    """
    if variant not in _PAPER:
        raise unknown_name("variant with progressive learning", variant, _PAPER)
    config = imagenet1k(variant, "paper")
    settings = config.progressive
    settings.update(order=order, num_stages=num_stages)
    settings.image_size = (start_size, settings.image_size[1])
    if order == "random":
        settings.num_draws = round(config.num_epochs / _EPOCHS_PER_DRAW)
    if not adaptive:
        for name in ("dropout_rate", "randaug_magnitude", "mixup_alpha", "cutmix_alpha"):
            settings[name] = (settings[name][1],) * 2
    return config


def imagenet21k(variant: str, recipe: str) -> ConfigDict:
    """Pretraining on ImageNet-21k: 60 epochs (section 5.2: "60 or 30"), cosine.

    The learning rate, which the paper does not give, is that of datasets.py.
    """
    config = _base(variant, recipe, stage_settings_21k(variant, recipe))
    _v2_preprocessing(config)
    config.num_epochs = 60.0
    # The release with the paper's 21,841 classes; winter21 has 19,167.
    config.data.name = "imagenet21k/fall11"
    config.data.minival_examples = MINIVAL_21K[recipe]
    config.learning_rate.update(per_256_images=0.008, schedule="cosine", warmup_epochs=1.0)
    config.loss.label_smoothing = 0.0
    config.eval.every_epochs = 2.0
    config.checkpoint.every_epochs = 0.25
    if recipe == "released":
        config.model.drop_path_rate = 0.0  # datasets.py: survival probability 1.
        config.data.num_classes = NUM_CLASSES_21K[recipe]
        config.eval.image_size = 224
    return config


def _finetuning(variant: str, recipe: str) -> ConfigDict:
    """What fine-tuning on ImageNet-1k and transfer share: datasets.py, *Ft."""
    spec = get_spec(variant)
    # main.py: the evaluation size, floored to a multiple of 16.
    settings = _fixed(spec.eval_size // 16 * 16, 0.0, 0.0)
    config = _base(variant, recipe, settings)
    _finetune_preprocessing(config)
    config.init_from = ""  # Has to be named.
    config.batch_size = 512
    config.num_epochs = 15.0
    config.min_steps = 10_000
    config.ema_decay = 0.9996
    config.learning_rate.update(per_256_images=0.0005, warmup_epochs=1.0)
    config.learning_rate.schedule = "cosine" if recipe == "paper" else "constant"
    config.eval.batch_size = 512
    return config


def finetune1k(variant: str, recipe: str) -> ConfigDict:
    """Fine-tuning on ImageNet-1k after ImageNet-21k: 15 epochs (section 5.2).

    The classifier's columns are picked out of the 21k classifier by name.
    """
    config = _finetuning(variant, recipe)
    config.init_head = "pick"
    config.data.minival_examples = MINIVAL[recipe]
    config.eval.every_epochs = 1.0
    config.checkpoint.every_epochs = 0.25
    return config


# Table 9: data set, and about 1,000 steps of 512 images in epochs.
TRANSFER_DATA = {
    "cifar10": ("cifar10", 10.0),
    "cifar100": ("cifar100", 10.0),
    "flowers": ("oxford_flowers102", 250.0),
    "cars": ("cars196", 63.0),
}


def transfer(variant: str, data: str, recipe: str) -> ConfigDict:
    """Transfer of an ImageNet network to a small data set in 10,000 steps (section 5.3).

    Args:
      variant: one of `list_variants()`.
      data: a name of `TRANSFER_DATA`.
      recipe: `paper` or `released`.
    """
    if data not in TRANSFER_DATA:
        raise unknown_name("transfer data", data, TRANSFER_DATA)
    config = _finetuning(variant, recipe)
    config.init_head = "new"
    config.data.name, every_epochs = TRANSFER_DATA[data]
    config.eval.every_epochs = every_epochs
    config.checkpoint.every_epochs = every_epochs
    if recipe == "paper":
        config.optimizer.weight_decay = 0.0
    return config


def finetune(model: str | None, data: str) -> ConfigDict:
    """Fine-tuning on a data set of one's own; not of the paper.

    Network, normalisation, evaluation size, crop and interpolation are those of the weights.

    Args:
      model: what `weights.trained.load_spec_of` describes: a model folder, a workdir or a
        checkpoint; None: EfficientNetV2-S, whose weights `init_from` still has to name.
      data: as `config.data.name`, or the path of a folder of class folders.
    """
    if model is None:
        spec = ModelSpec("efficientnetv2-s", 1000, get_spec("efficientnetv2-s").eval_size)
    else:
        spec = load_spec_of(model)
    config = base_config()
    config.init_from = model or ""
    config.model.update({field: getattr(spec, field) for field in MODEL_FIELDS})
    config.model.update(dtype="float32", drop_path_rate=0.1)
    is_folder = data.startswith(("/", ".", "~")) or os.path.isdir(data)
    config.data.name = f"folder:{data}" if is_folder else data
    config.normalize.update(mean=spec.mean, std=spec.std)
    config.eval.update(
        image_size=spec.eval_size,
        crop=spec.crop,
        crop_fraction=spec.crop_fraction,
        resize=spec.resize,
        batch_size=64,
        every_epochs=1.0,
    )
    config.batch_size = 64
    config.num_epochs = 10.0
    # A few hundred steps: the averages have to follow, and a crop has to show the object.
    config.ema_decay = 0.99
    config.model.bn_decay = 0.9
    config.augment.update(crop_area=(0.35, 1.0), resize=spec.resize)
    config.progressive.update(
        num_stages=2,
        image_size=(spec.eval_size * 3 // 4, spec.eval_size),
        dropout_rate=(0.1, 0.3),
        randaug_magnitude=(3.0, 9.0),
    )
    config.optimizer.weight_decay = 0.0
    config.learning_rate.update(per_256_images=0.008, schedule="cosine", warmup_epochs=1.0)
    config.log_every_steps = 20
    return config


def fashion_mnist() -> ConfigDict:
    """An hour of training on the 70,000 pictures of Fashion-MNIST; not of the paper."""
    config = base_config()
    config.batch_size = 128
    config.num_epochs = 32.0

    # B0 halves 28 px five times; at half its width and depth, one halving less costs the same.
    config.model.variant = "efficientnetv2-b0"
    config.model.width_multiplier = 0.5
    config.model.depth_multiplier = 0.5
    config.model.stem_stride = 1
    config.model.drop_path_rate = 0.1
    config.model.dtype = "float32"  # CPUs have no fast bfloat16.
    config.data.name = "fashion_mnist"

    # A garment fills its picture; inverted or turned ones do not occur, so no RandAugment.
    config.augment.crop_area = (0.7, 1.0)
    config.augment.crop_aspect_ratio = (0.85, 1.18)
    config.augment.policy = "none"
    config.normalize.mean = (73.0, 73.0, 73.0)
    config.normalize.std = (90.0, 90.0, 90.0)

    # Up to 16 px the last feature map is a single pixel, and only the centre of a kernel is
    # trained: evaluated at 28 px such a network is no better than chance.
    config.progressive.num_stages = 3
    config.progressive.image_size = (18, 28)
    config.progressive.dropout_rate = (0.1, 0.3)
    config.progressive.randaug_magnitude = (0.0, 0.0)
    config.progressive.mixup_alpha = (0.0, 0.1)

    config.learning_rate.per_256_images = 0.008
    config.learning_rate.schedule = "cosine"
    config.learning_rate.warmup_epochs = 1.0
    config.ema_decay = 0.999

    config.eval.image_size = 28
    config.eval.crop = "squash"
    config.eval.batch_size = 500
    config.eval.every_epochs = 2.0
    config.eval.at_stage_size = False
    config.checkpoint.every_epochs = 1.0
    config.log_every_steps = 100
    return config


def fashion_mnist_subset() -> ConfigDict:
    """Minutes of training on a thousand pictures of Fashion-MNIST; not of the paper.

    The experiments on the paper's training claims and the small architecture search start here.
    """
    config = fashion_mnist()
    config.data.minival_examples = 3000
    config.data.train_examples = 1000
    config.data.eval_split = "minival"

    # So few steps need small batches, a high rate, and averages that follow soon.
    config.batch_size = 32
    config.num_epochs = 90.0
    config.learning_rate.per_256_images = 0.016
    config.learning_rate.warmup_epochs = 2.0
    config.ema_decay = 0.99
    config.model.bn_decay = 0.95

    # RandAugment stands for the regularisation that rises; drop path and mixup stay out. The
    # paper's two operations are meant for larger pictures.
    config.model.drop_path_rate = 0.0
    config.progressive.mixup_alpha = (0.0, 0.0)
    config.augment.policy = "randaugment"
    config.augment.randaug_layers = 1
    config.augment.crop_area = (0.8, 1.0)
    config.progressive.num_stages = 4
    config.progressive.randaug_magnitude = (2.0, 8.0)

    config.eval.every_epochs = 10.0
    config.checkpoint.every_epochs = 30.0
    config.checkpoint.keep = 1
    config.log_every_steps = 100
    return config


def baseline_imagenet1k(
    variant: str, recipe: str, progressive: bool, image_size: int | None = None
) -> ConfigDict:
    """EfficientNet V1 or ResNet on ImageNet-1k: the baselines of Tables 3, 7, 10 and 12.

    Args:
      variant: `efficientnet-b0` to `efficientnet-b7`, B4 with fused stages, or ResNet.
      recipe: `paper`: the training of V2, as in Table 10; `released`: the official V1 config.
      progressive: with or without progressive learning.
      image_size: of inference, pixels; None: the variant's own.

    Raises:
      InputError: an unknown name; or `released`, which has neither progressive learning for V1
        nor other sizes nor ResNet.
    """
    _check_recipe(recipe)
    spec = get_spec(variant)
    if not _is_v1(variant) and spec.family != "resnet":
        raise InputError(
            f"{variant} is no baseline: choose efficientnet-b0 to -b7, resnet50 or resnet152."
        )
    if image_size is not None and image_size < 128:
        raise InputError(f"image size {image_size} is too small: give 128 pixels or more.")
    if recipe == "released":
        if progressive or image_size or not _is_v1(variant):
            raise InputError(
                "recipe 'released' trains EfficientNet V1 alone, in one stage of its own size: use "
                "progressive=no or recipe=paper."
            )
        config = _base(variant, recipe, _fixed(spec.train_size, spec.dropout_rate, 0.0))
        _legacy_preprocessing(config)
        config.augment.policy = "autoaugment"
    else:
        settings = baseline_stage_settings(variant, progressive, image_size)
        config = _base(variant, recipe, settings)
        _v2_preprocessing(config)
        config.eval.image_size = image_size or spec.eval_size
    config.data.minival_examples = MINIVAL[recipe]
    return config
