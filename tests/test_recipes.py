"""The published recipes: where the paper and the released code differ, and that both make plans."""

from __future__ import annotations

import pytest

from effnetv2_jax.config import base_config, make_plan
from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec, list_variants
from effnetv2_jax.recipes import (
    NUM_CLASSES_21K,
    RECIPES,
    StageSettings,
    imagenet1k,
    stage_settings,
    stage_settings_21k,
)

IMAGENET = {"num_train_examples": 1_256_144, "num_eval_examples": 50_000, "num_classes": 1000}
PROGRESSIVE = ("efficientnetv2-s", "efficientnetv2-m", "efficientnetv2-l", "efficientnetv2-xl")
BASE = ("efficientnetv2-b0", "efficientnetv2-b1", "efficientnetv2-b2", "efficientnetv2-b3")


def test_every_variant_is_in_one_of_the_two_groups():
    assert set(PROGRESSIVE + BASE) == set(list_variants())


@pytest.mark.parametrize(
    ("variant", "recipe"),
    [(v, r) for v in list_variants() for r in RECIPES if not (v in BASE and r == "released")],
)
def test_imagenet1k_makes_a_plan(variant, recipe):
    config = imagenet1k(variant, recipe)
    assert config.is_locked
    assert config.model.variant == variant
    assert config.eval.image_size == get_spec(variant).eval_size
    assert config.progressive.form == recipe
    assert config.augment.randaug_layers == 2

    plan = make_plan(config, **IMAGENET)
    assert plan.total_steps == 107_336
    assert plan.peak_learning_rate == pytest.approx(0.256)
    assert len(plan.stages) == (4 if variant in PROGRESSIVE else 1)
    settings = stage_settings(variant, recipe)
    assert plan.stages[-1].image_size == settings.image_size[1]
    assert plan.use_mixing == (variant in PROGRESSIVE[1:])


def test_the_paper_trains_s_as_the_base_config_has_it():
    assert imagenet1k("efficientnetv2-s", "paper") == base_config()


@pytest.mark.parametrize(
    ("variant", "paper", "released"),
    [
        (
            "efficientnetv2-s",
            StageSettings((128, 300), (0.1, 0.3), (5.0, 15.0)),
            StageSettings((128, 300), (0.2, 0.2), (5.0, 10.0)),
        ),
        (
            "efficientnetv2-m",
            StageSettings((128, 380), (0.1, 0.4), (5.0, 20.0), (0.0, 0.2)),
            StageSettings((128, 384), (0.3, 0.3), (5.0, 15.0), (0.0, 0.2), (0.0, 0.2)),
        ),
        (
            "efficientnetv2-l",
            StageSettings((128, 380), (0.1, 0.5), (5.0, 25.0), (0.0, 0.4)),
            StageSettings((128, 384), (0.4, 0.4), (5.0, 20.0), (0.0, 0.5), (0.0, 0.5)),
        ),
    ],
)
def test_paper_and_released_code_differ(variant, paper, released):
    assert stage_settings(variant, "paper") == paper
    assert stage_settings(variant, "released") == released


def test_cutmix_is_in_the_released_code_only():
    for variant in list_variants():
        assert stage_settings(variant, "paper").cutmix_alpha == (0.0, 0.0)
        released = stage_settings(variant, "released")
        assert released.cutmix_alpha == released.mixup_alpha


@pytest.mark.parametrize(("recipe", "bn_decay"), [("paper", 0.99), ("released", 0.9)])
def test_batch_norm_decay(recipe, bn_decay):
    assert imagenet1k("efficientnetv2-s", recipe).model.bn_decay == bn_decay


def test_outside_stages_and_decay_the_recipes_are_one():
    """A difference that appears elsewhere must be written into the table of differences."""
    paper = imagenet1k("efficientnetv2-l", "paper").to_dict()
    released = imagenet1k("efficientnetv2-l", "released").to_dict()
    for config in (paper, released):
        del config["progressive"], config["model"]["bn_decay"]
    assert paper == released


@pytest.mark.parametrize("recipe", RECIPES)
def test_xl_is_trained_like_l(recipe):
    large = stage_settings("efficientnetv2-l", recipe)
    assert stage_settings("efficientnetv2-xl", recipe) == large


@pytest.mark.parametrize(
    ("variant", "size", "dropout"),
    [("b0", 192, 0.2), ("b1", 192, 0.2), ("b2", 208, 0.3), ("b3", 240, 0.3)],
)
def test_the_paper_trains_base_models_in_one_stage(variant, size, dropout):
    (stage,) = make_plan(imagenet1k(f"efficientnetv2-{variant}", "paper"), **IMAGENET).stages
    assert (stage.image_size, stage.dropout_rate) == (size, dropout)
    assert (stage.first_step, stage.last_step) == (0, 107_336)
    assert (stage.randaug_magnitude, stage.mixup_alpha, stage.cutmix_alpha) == (10.0, 0.0, 0.0)


@pytest.mark.parametrize("variant", BASE)
def test_released_base_models_need_autoaugment(variant):
    with pytest.raises(InputError, match=f"{variant} needs AutoAugment.*recipe=paper"):
        imagenet1k(variant, "released")
    # The stages are known all the same, without RandAugment.
    assert stage_settings(variant, "released").randaug_magnitude == (0.0, 0.0)


@pytest.mark.parametrize("variant", list_variants())
def test_imagenet21k_settings(variant):
    assert stage_settings_21k(variant, "paper") == stage_settings(variant, "paper")
    plain = StageSettings((224, 224), (0.0, 0.0), (0.0, 0.0), num_stages=1)
    assert stage_settings_21k(variant, "released") == plain


def test_imagenet21k_class_counts():
    assert NUM_CLASSES_21K == {"paper": 21_841, "released": 21_843}
    assert tuple(NUM_CLASSES_21K) == RECIPES


@pytest.mark.parametrize("function", [imagenet1k, stage_settings, stage_settings_21k])
def test_unknown_names_name_the_nearest(function):
    with pytest.raises(InputError, match="unknown recipe 'relased': did you mean released"):
        function("efficientnetv2-s", "relased")
    with pytest.raises(InputError, match="unknown recipe 'x': choose one of paper, released"):
        function("efficientnetv2-s", "x")
    for recipe in RECIPES:
        with pytest.raises(InputError, match=r"did you mean .*efficientnetv2-s"):
            function("efficientnet-v2s", recipe)
