"""The published recipes: golden schedules, and where the paper and the released code differ."""

from __future__ import annotations

import numpy as np
import pytest

from effnetv2_jax.config import base_config, make_plan
from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec, list_variants
from effnetv2_jax.optimizers import learning_rate_schedule
from effnetv2_jax.recipes import (
    NUM_CLASSES_21K,
    RECIPES,
    TRANSFER_DATA,
    StageSettings,
    baseline_imagenet1k,
    finetune1k,
    imagenet1k,
    imagenet21k,
    schedule_ablation,
    stage_settings,
    stage_settings_21k,
    transfer,
)

# The training set of the released code, without minival.
IMAGENET = {"num_train_examples": 1_256_144, "num_eval_examples": 50_000, "num_classes": 1000}
IMAGENET_21K = {
    "num_train_examples": 12_720_275,
    "num_eval_examples": 100_357,
    "num_classes": 21_843,
}
PROGRESSIVE = ("efficientnetv2-s", "efficientnetv2-m", "efficientnetv2-l", "efficientnetv2-xl")
BASE = ("efficientnetv2-b0", "efficientnetv2-b1", "efficientnetv2-b2", "efficientnetv2-b3")
V1 = tuple(f"efficientnet-b{number}" for number in range(8))
FUSED = tuple(f"efficientnet-b4-fused-1-{last}" for last in (3, 5, 7))
RESNETS = ("resnet50", "resnet152")
LITE = tuple(f"efficientnet-lite{number}" for number in range(5))


def schedule_of(config, plan):
    arguments = dict(config.learning_rate)
    del arguments["per_256_images"]
    return learning_rate_schedule(
        peak=plan.peak_learning_rate,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        **arguments,
    )


def check_rates(config, plan, expected):
    schedule = schedule_of(config, plan)
    got = [float(schedule(step)) for step in expected]
    np.testing.assert_allclose(got, list(expected.values()), rtol=2e-5)


def effective_ema_decay(config, step):
    """At the end of step number `step`, as train_state.update_ema has it."""
    return min(config.ema_decay, (1 + step + 1) / (10 + step + 1))


def test_every_variant_is_in_one_of_the_groups():
    assert set(PROGRESSIVE + BASE + V1 + FUSED + LITE + RESNETS) == set(list_variants())


# ------------------------------------------------------------------------------- ImageNet-1k


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", list_variants())
def test_imagenet1k_makes_a_plan(variant, recipe):
    config = imagenet1k(variant, recipe)
    assert config.is_locked
    assert config.model.variant == variant
    assert config.eval.image_size == get_spec(variant).eval_size
    assert config.progressive.form == recipe
    assert config.model.bn_decay == {"paper": 0.99, "released": 0.9}[recipe]

    plan = make_plan(config, **IMAGENET)
    assert plan.total_steps == 107_336
    assert plan.peak_learning_rate == pytest.approx(0.256)
    released_base = variant in BASE and recipe == "released"
    assert len(plan.stages) == (4 if variant in PROGRESSIVE or released_base else 1)
    settings = stage_settings(variant, recipe)
    assert plan.stages[-1].image_size == settings.image_size[1]
    assert plan.use_mixing == (variant in PROGRESSIVE[1:])


def test_the_paper_trains_s_as_the_base_config_has_it():
    config = base_config()
    config.data.minival_examples = 25_000
    assert imagenet1k("efficientnetv2-s", "paper") == config


# Measured on the released code (automl efficientnetv2/utils.py), both recipes: step -> rate.
RATES_1K = {
    0: 0.0,
    1: 1.6699e-4,
    766: 0.127917,
    1532: 0.255833,
    1533: 0.240870,
    2207: 0.240870,
    26_834: 0.0855112,
    53_668: 0.0285631,
    80_502: 0.00925466,
    107_335: 0.00309132,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", ["s", "m", "l"])
def test_learning_rates_of_imagenet1k(variant, recipe):
    config = imagenet1k(f"efficientnetv2-{variant}", recipe)
    check_rates(config, make_plan(config, **IMAGENET), RATES_1K)


# Algorithm 1 with Table 6, and main.py: (image size, dropout, RandAugment, mixup, cutmix).
STAGES_1K = {
    ("s", "paper"): [
        (128, 0.1, 5, 0, 0),
        (185, 0.1667, 8.333, 0, 0),
        (243, 0.2333, 11.667, 0, 0),
        (300, 0.3, 15, 0, 0),
    ],
    ("s", "released"): [
        (171, 0.2, 5, 0, 0),
        (214, 0.2, 6.667, 0, 0),
        (257, 0.2, 8.333, 0, 0),
        (300, 0.2, 10, 0, 0),
    ],
    ("m", "paper"): [
        (128, 0.1, 5, 0, 0),
        (212, 0.2, 10, 0.0667, 0),
        (296, 0.3, 15, 0.1333, 0),
        (380, 0.4, 20, 0.2, 0),
    ],
    ("m", "released"): [
        (192, 0.3, 5, 0, 0),
        (256, 0.3, 8.333, 0.0667, 0.0667),
        (320, 0.3, 11.667, 0.1333, 0.1333),
        (384, 0.3, 15, 0.2, 0.2),
    ],
    ("l", "paper"): [
        (128, 0.1, 5, 0, 0),
        (212, 0.2333, 11.667, 0.1333, 0),
        (296, 0.3667, 18.333, 0.2667, 0),
        (380, 0.5, 25, 0.4, 0),
    ],
    ("l", "released"): [
        (192, 0.4, 5, 0, 0),
        (256, 0.4, 10, 0.1667, 0.1667),
        (320, 0.4, 15, 0.3333, 0.3333),
        (384, 0.4, 20, 0.5, 0.5),
    ],
}


def rows_of(stages):
    names = ("image_size", "dropout_rate", "randaug_magnitude", "mixup_alpha", "cutmix_alpha")
    return [[getattr(stage, name) for name in names] for stage in stages]


@pytest.mark.parametrize(("variant", "recipe"), STAGES_1K)
def test_stages_of_imagenet1k(variant, recipe):
    plan = make_plan(imagenet1k(f"efficientnetv2-{variant}", recipe), **IMAGENET)
    assert [stage.last_step for stage in plan.stages] == [26_834, 53_668, 80_502, 107_336]
    np.testing.assert_allclose(rows_of(plan.stages), STAGES_1K[variant, recipe], atol=6e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_average_decay_of_imagenet1k(recipe):
    config = imagenet1k("efficientnetv2-m", recipe)
    # 2/11 after the first step; 0.9999 from update 89,990 on (measured on the released utils.py).
    assert effective_ema_decay(config, 0) == pytest.approx(2 / 11)
    assert effective_ema_decay(config, 89_988) < 0.9999
    assert effective_ema_decay(config, 89_989) == pytest.approx(0.9999, abs=1e-12)
    assert effective_ema_decay(config, 107_335) == 0.9999


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


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("b0", [144, 160, 176, 192]),
        ("b1", [144, 160, 176, 192]),
        ("b2", [148, 168, 188, 208]),
        ("b3", [156, 184, 212, 240]),
    ],
)
def test_released_base_models_have_v1s_preprocessing_and_stages(variant, sizes):
    config = imagenet1k(f"efficientnetv2-{variant}", "released")
    assert [s.image_size for s in make_plan(config, **IMAGENET).stages] == sizes
    assert config.augment.policy == "autoaugment"
    assert (config.augment.crop, config.augment.resize) == ("legacy", "bicubic")
    assert (config.eval.crop, config.eval.resize) == ("legacy", "bicubic")
    assert config.normalize.mean == pytest.approx((123.675, 116.28, 103.53))
    assert config.normalize.std == pytest.approx((58.395, 57.12, 57.375))


# ------------------------------------------------------------------------------- ImageNet-21k


@pytest.mark.parametrize("variant", PROGRESSIVE)
def test_stages_of_imagenet21k(variant):
    assert stage_settings_21k(variant, "paper") == stage_settings(variant, "paper")
    plain = StageSettings((224, 224), (0.0, 0.0), (0.0, 0.0), num_stages=1)
    assert stage_settings_21k(variant, "released") == plain
    (stage,) = make_plan(imagenet21k(variant, "released"), **IMAGENET_21K).stages
    assert (stage.first_step, stage.last_step, stage.image_size) == (0, 186_332, 224)
    plan = make_plan(imagenet21k(variant, "paper"), **IMAGENET_21K)
    assert [s.last_step for s in plan.stages] == [46_583, 93_166, 139_749, 186_332]
    key = (variant.removeprefix("efficientnetv2-").replace("xl", "l"), "paper")
    np.testing.assert_allclose(rows_of(plan.stages), STAGES_1K[key], atol=6e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", PROGRESSIVE)
def test_training_of_imagenet21k(variant, recipe):
    config = imagenet21k(variant, recipe)
    plan = make_plan(config, **IMAGENET_21K)
    assert plan.steps_per_epoch == pytest.approx(3105.536, abs=1e-3)
    assert plan.peak_learning_rate == pytest.approx(0.128)
    # Measured on the released code: warm-up, the first step behind it, and half the way.
    check_rates(config, plan, {0: 0.0, 3104: 0.127959, 3105: 0.127912, 93_166: 0.064})
    assert (config.loss.kind, config.loss.label_smoothing) == ("softmax", 0.0)
    assert config.ema_decay == 0.9999
    assert config.optimizer.weight_decay == 1e-5
    assert config.model.drop_path_rate == {"paper": 0.2, "released": 0.0}[recipe]
    assert config.augment.policy == {"paper": "randaugment", "released": "none"}[recipe]
    assert config.data.num_classes == {"paper": None, "released": 21_843}[recipe]


def test_imagenet21k_class_counts():
    assert NUM_CLASSES_21K == {"paper": 21_841, "released": 21_843}
    assert tuple(NUM_CLASSES_21K) == RECIPES


# ------------------------------------------------------------------ fine-tuning and transfer

FINETUNE_SIZES = {"s": 384, "m": 480, "l": 480, "xl": 512, "b0": 224, "b1": 240, "b2": 256}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("variant", "size"), FINETUNE_SIZES.items())
def test_finetuning_on_imagenet1k(variant, size, recipe):
    config = finetune1k(f"efficientnetv2-{variant}", recipe)
    plan = make_plan(config, **IMAGENET)
    assert plan.total_steps == 36_801
    assert plan.peak_learning_rate == pytest.approx(0.001)
    (stage,) = plan.stages
    assert (stage.image_size, stage.dropout_rate) == (size, 0.0)
    assert config.eval.image_size == get_spec(f"efficientnetv2-{variant}").eval_size
    # Cosine: 0.0005 (1 + cos(pi 18,400 / 36,801)).
    half = {"paper": 0.00050002, "released": 0.001}[recipe]
    check_rates(config, plan, {0: 0.0, 2452: 0.001 * 2452 / 2453, 18_400: half})
    assert config.ema_decay == 0.9996
    assert config.optimizer.weight_decay == 1e-5
    assert (config.augment.crop, config.augment.noise_cutout) == ("squash", True)
    assert config.normalize.mean == config.normalize.std == (127.5,) * 3
    assert (config.init_from, config.init_head) == ("", "pick")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("data", "num_train_examples", "warmup_steps"),
    [("cifar10", 50_000, 97), ("cifar100", 50_000, 97), ("flowers", 2040, 3), ("cars", 8144, 15)],
)
def test_transfer(data, num_train_examples, warmup_steps, recipe):
    """Section 5.3: 10,000 steps of 512 images, 0.001, cosine, no weight decay, cutout."""
    config = transfer("efficientnetv2-l", data, recipe)
    plan = make_plan(
        config, num_train_examples=num_train_examples, num_eval_examples=10, num_classes=10
    )
    assert (plan.total_steps, config.batch_size) == (10_000, 512)
    assert plan.peak_learning_rate == pytest.approx(0.001)
    schedule = schedule_of(config, plan)
    assert float(schedule(warmup_steps - 1)) < float(schedule(warmup_steps)) * 1.001
    expected = {"paper": 0.0005, "released": 0.001}[recipe]
    assert float(schedule(5000)) == pytest.approx(expected, rel=1e-4)
    assert config.optimizer.weight_decay == {"paper": 0.0, "released": 1e-5}[recipe]
    assert config.augment.noise_cutout is True
    assert effective_ema_decay(config, 9999) == pytest.approx(0.9991, abs=1e-5)
    # About ten evaluations.
    assert 8 <= plan.total_steps / plan.eval_every_steps <= 12


def test_transfer_data_of_table_9():
    assert list(TRANSFER_DATA) == ["cifar10", "cifar100", "flowers", "cars"]
    with pytest.raises(InputError, match="unknown transfer data 'cifar': did you mean cifar10"):
        transfer("efficientnetv2-s", "cifar", "paper")


# --------------------------------------------------------------------------------------- V1


def test_v1_is_trained_as_v2_with_and_without_progressive_learning():
    fixed = make_plan(baseline_imagenet1k("efficientnet-b4", "paper", False), **IMAGENET)
    assert [s.image_size for s in fixed.stages] == [380]
    stages = make_plan(baseline_imagenet1k("efficientnet-b4", "paper", True), **IMAGENET).stages
    assert [s.image_size for s in stages] == [128, 187, 245, 304]
    assert [s.randaug_magnitude for s in stages] == pytest.approx(
        [5, 8.3333, 11.6667, 15], abs=1e-3
    )
    assert stages[-1].dropout_rate == 0.4
    large = baseline_imagenet1k("efficientnet-b7", "paper", True)
    assert large.progressive.randaug_magnitude == (5.0, 20.0)
    assert large.progressive.mixup_alpha == (0.0, 0.2)
    assert large.progressive.image_size == (128, 480)


def test_v1_as_released():
    config = baseline_imagenet1k("efficientnet-b4", "released", False)
    (stage,) = make_plan(config, **IMAGENET).stages
    assert (stage.image_size, stage.dropout_rate) == (304, 0.4)
    assert (config.augment.policy, config.augment.crop) == ("autoaugment", "legacy")
    with pytest.raises(InputError, match="trains EfficientNet V1 alone, in one stage of its"):
        baseline_imagenet1k("efficientnet-b4", "released", True)
    with pytest.raises(InputError, match="efficientnetv2-s is no baseline: choose"):
        baseline_imagenet1k("efficientnetv2-s", "paper", False)


def test_b4_with_fused_stages_is_trained_like_b4():
    for progressive in (False, True):
        plain = baseline_imagenet1k("efficientnet-b4", "paper", progressive)
        for variant in FUSED:
            fused = baseline_imagenet1k(variant, "paper", progressive)
            fused.model.variant = "efficientnet-b4"
            assert fused == plain


@pytest.mark.parametrize("size", [224, 380])
def test_resnet_is_trained_like_s(size):
    config = baseline_imagenet1k("resnet50", "paper", False, size)
    (stage,) = make_plan(config, **IMAGENET).stages
    assert (stage.image_size, stage.dropout_rate, stage.randaug_magnitude) == (size, 0.3, 15.0)
    assert config.eval.image_size == size
    config = baseline_imagenet1k("resnet50", "paper", True, size)
    stages = make_plan(config, **IMAGENET).stages
    sizes = {224: [128, 160, 192, 224], 380: [128, 212, 296, 380]}
    assert [s.image_size for s in stages] == sizes[size]
    config.progressive.image_size = (128, 300)
    config.model.variant, config.eval.image_size = "efficientnetv2-s", 384
    assert config == imagenet1k("efficientnetv2-s", "paper")


def test_resnet_has_no_released_recipe_and_no_tiny_size():
    with pytest.raises(InputError, match="trains EfficientNet V1 alone"):
        baseline_imagenet1k("resnet50", "released", False)
    with pytest.raises(InputError, match="image size 100 is too small: give 128 pixels or more"):
        baseline_imagenet1k("resnet50", "paper", False, 100)


def test_schedules_of_table_13():
    plain = schedule_ablation("efficientnetv2-m", order="rising", adaptive=True)
    assert plain == imagenet1k("efficientnetv2-m", "paper")
    rising = make_plan(plain, **IMAGENET).stages
    config = schedule_ablation("efficientnetv2-m", order="rising", adaptive=False)
    fixed = make_plan(config, **IMAGENET).stages
    assert [s.image_size for s in fixed] == [s.image_size for s in rising]
    strengths = {(s.randaug_magnitude, s.dropout_rate, s.mixup_alpha) for s in fixed}
    assert strengths == {(20.0, 0.4, 0.2)}
    config = schedule_ablation("efficientnetv2-m", order="random", adaptive=True)
    drawn = make_plan(config, **IMAGENET)
    assert len(drawn.stages) == 44  # 350 epochs, 8 each.
    by_size = {s.image_size: (s.randaug_magnitude, s.dropout_rate) for s in rising}
    assert {s.image_size for s in drawn.stages} == set(by_size) == {128, 212, 296, 380}
    for stage in drawn.stages:
        assert (stage.randaug_magnitude, stage.dropout_rate) == by_size[stage.image_size]
        epochs = stage.num_steps / drawn.steps_per_epoch
        assert epochs == pytest.approx(350 / 44, rel=1e-3)
    config = schedule_ablation("efficientnetv2-m", order="random", adaptive=False)
    other = make_plan(config, **IMAGENET).stages
    assert [s.image_size for s in other] == [s.image_size for s in drawn.stages]
    assert {s.randaug_magnitude for s in other} == {20.0}


def test_schedules_of_table_14():
    config = schedule_ablation(
        "efficientnetv2-s", order="rising", adaptive=True, start_size=256, num_stages=8
    )
    stages = make_plan(config, **IMAGENET).stages
    assert [s.image_size for s in stages] == [256, 262, 269, 275, 281, 287, 294, 300]
    with pytest.raises(InputError, match="unknown variant with progressive learning 'resnet50'"):
        schedule_ablation("resnet50", order="rising", adaptive=True)
    with pytest.raises(InputError, match=r"unknown progressive\.order 'falling'"):
        config = schedule_ablation("efficientnetv2-s", order="falling", adaptive=True)
        make_plan(config, **IMAGENET)


@pytest.mark.parametrize(
    "function", [imagenet1k, imagenet21k, finetune1k, stage_settings, stage_settings_21k]
)
def test_unknown_names_name_the_nearest(function):
    with pytest.raises(InputError, match="unknown recipe 'relased': did you mean released"):
        function("efficientnetv2-s", "relased")
    with pytest.raises(InputError, match="unknown recipe 'x': choose one of paper, released"):
        function("efficientnetv2-s", "x")
    for recipe in RECIPES:
        with pytest.raises(InputError, match=r"did you mean .*efficientnetv2-s"):
            function("efficientnet-v2s", recipe)
