"""Progressive learning: the stages of both published forms, number by number.

The sizes of `paper` follow from Algorithm 1 and Table 6, those of `released` were read off the
official main.py, for the 107,336 steps of 350 epochs of 1,256,144 images in batches of 4,096.
"""

from __future__ import annotations

import itertools
import random

import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import list_variants
from effnetv2_jax.progressive import Stage, format_stages, make_stages, stage_at
from effnetv2_jax.recipes import RECIPES, StageSettings, stage_settings

TOTAL_STEPS = 107_336
BOUNDARIES = (0, 26_834, 53_668, 80_502, 107_336)

VALID = {
    "form": "paper",
    "num_stages": 4,
    "image_size": (128, 300),
    "dropout_rate": (0.1, 0.3),
    "randaug_magnitude": (5.0, 15.0),
    "mixup_alpha": (0.0, 0.2),
    "cutmix_alpha": (0.0, 0.2),
}


def stages_of(variant: str, recipe: str, total_steps: int = TOTAL_STEPS) -> tuple[Stage, ...]:
    settings: StageSettings = stage_settings(variant, recipe)
    return make_stages(total_steps, form=recipe, **vars(settings))


def column(stages: tuple[Stage, ...], name: str) -> tuple:
    return tuple(getattr(stage, name) for stage in stages)


@pytest.mark.parametrize(
    ("variant", "recipe", "sizes"),
    [
        ("s", "paper", (128, 185, 243, 300)),
        ("m", "paper", (128, 212, 296, 380)),
        ("l", "paper", (128, 212, 296, 380)),
        ("s", "released", (171, 214, 257, 300)),
        ("m", "released", (192, 256, 320, 384)),
        ("l", "released", (192, 256, 320, 384)),
        ("xl", "released", (192, 256, 320, 384)),
        ("b0", "released", (144, 160, 176, 192)),
        ("b1", "released", (144, 160, 176, 192)),
        ("b2", "released", (148, 168, 188, 208)),
        ("b3", "released", (156, 184, 212, 240)),
    ],
)
def test_image_sizes_and_boundaries(variant, recipe, sizes):
    stages = stages_of(f"efficientnetv2-{variant}", recipe)
    assert column(stages, "image_size") == sizes
    assert column(stages, "index") == (0, 1, 2, 3)
    assert column(stages, "first_step") == BOUNDARIES[:-1]
    assert column(stages, "last_step") == BOUNDARIES[1:]
    assert all(stage.num_steps == 26_834 for stage in stages)


STRENGTHS = {
    ("s", "paper"): {
        "randaug_magnitude": (5, 8.3333, 11.6667, 15),
        "dropout_rate": (0.1, 0.166667, 0.233333, 0.3),
    },
    ("m", "paper"): {
        "randaug_magnitude": (5, 10, 15, 20),
        "dropout_rate": (0.1, 0.2, 0.3, 0.4),
        "mixup_alpha": (0, 0.0666667, 0.133333, 0.2),
    },
    ("l", "paper"): {
        "randaug_magnitude": (5, 11.6667, 18.3333, 25),
        "dropout_rate": (0.1, 0.233333, 0.366667, 0.5),
        "mixup_alpha": (0, 0.133333, 0.266667, 0.4),
    },
    ("s", "released"): {
        "randaug_magnitude": (5, 6.66667, 8.33333, 10),
        "dropout_rate": (0.2, 0.2, 0.2, 0.2),
    },
    ("m", "released"): {
        "randaug_magnitude": (5, 8.33333, 11.6667, 15),
        "dropout_rate": (0.3, 0.3, 0.3, 0.3),
        "mixup_alpha": (0, 0.0666667, 0.133333, 0.2),
        "cutmix_alpha": (0, 0.0666667, 0.133333, 0.2),
    },
    ("l", "released"): {
        "randaug_magnitude": (5, 10, 15, 20),
        "dropout_rate": (0.4, 0.4, 0.4, 0.4),
        "mixup_alpha": (0, 0.166667, 0.333333, 0.5),
        "cutmix_alpha": (0, 0.166667, 0.333333, 0.5),
    },
}


@pytest.mark.parametrize(("variant", "recipe"), STRENGTHS)
def test_strengths(variant, recipe):
    stages = stages_of(f"efficientnetv2-{variant}", recipe)
    off = {"mixup_alpha": (0, 0, 0, 0), "cutmix_alpha": (0, 0, 0, 0)}
    for name, values in (off | STRENGTHS[variant, recipe]).items():
        assert column(stages, name) == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", list_variants())
def test_nothing_falls_from_stage_to_stage(variant, recipe):
    stages = stages_of(variant, recipe)
    settings = stage_settings(variant, recipe)
    for name in ("image_size", "dropout_rate", "randaug_magnitude", "mixup_alpha", "cutmix_alpha"):
        values = column(stages, name)
        assert list(values) == sorted(values), name
        assert values[-1] == pytest.approx(getattr(settings, name)[1]), name


def test_the_first_stage_is_at_the_minimum_in_the_paper_only():
    assert stages_of("efficientnetv2-s", "paper")[0].image_size == 128
    for variant in list_variants():
        if variant.startswith("efficientnetv2"):
            assert stages_of(variant, "released")[0].image_size > 128


@pytest.mark.parametrize("form", RECIPES)
def test_a_single_stage_sits_at_the_end_values(form):
    (stage,) = make_stages(1000, **(VALID | {"form": form, "num_stages": 1}))
    assert stage == Stage(0, 0, 1000, 300, 0.3, 15.0, 0.2, 0.2)


@pytest.mark.parametrize("form", RECIPES)
def test_stages_tile_the_training(form):
    rng = random.Random(7)
    for _ in range(400):
        num_stages = rng.randint(1, 12)
        total_steps = rng.choice((num_stages, rng.randint(num_stages, 40), rng.randint(40, 10**7)))
        stages = make_stages(total_steps, **(VALID | {"form": form, "num_stages": num_stages}))
        assert column(stages, "index") == tuple(range(num_stages))
        assert stages[0].first_step == 0 and stages[-1].last_step == total_steps
        for earlier, later in itertools.pairwise(stages):
            assert earlier.last_step == later.first_step
        lengths = column(stages, "num_steps")
        assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
        assert sum(lengths) == total_steps
        for name in ("image_size", "dropout_rate", "randaug_magnitude", "mixup_alpha"):
            assert list(column(stages, name)) == sorted(column(stages, name))
        assert stages[-1].image_size == 300


def test_random_order_draws_stages_and_tiles_the_training():
    draws = {"order": "random", "num_draws": 44}
    settings = make_stages(1000, **VALID)
    stages = make_stages(107_336, **(VALID | draws))
    assert stages == make_stages(107_336, **(VALID | draws))
    assert stages != make_stages(107_336, **(VALID | draws | {"draw_seed": 1}))
    assert column(stages, "index") == tuple(range(44))
    assert stages[0].first_step == 0 and stages[-1].last_step == 107_336
    for earlier, later in itertools.pairwise(stages):
        assert earlier.last_step == later.first_step
    lengths = column(stages, "num_steps")
    assert max(lengths) - min(lengths) <= 1
    strengths = ("image_size", "dropout_rate", "randaug_magnitude", "mixup_alpha", "cutmix_alpha")
    drawn = {tuple(getattr(s, name) for name in strengths) for s in stages}
    assert drawn == {tuple(getattr(s, name) for name in strengths) for s in settings}
    sizes = list(column(stages, "image_size"))
    assert sizes != sorted(sizes)
    # Of 44 draws from 4, none is nearly all or nearly none.
    assert all(3 <= sizes.count(size) <= 20 for size in set(sizes))


def test_stage_at_every_boundary_and_one_step_before():
    stages = stages_of("efficientnetv2-m", "paper")
    for index, boundary in enumerate(BOUNDARIES[:-1]):
        assert stage_at(stages, boundary) is stages[index]
        if index:
            assert stage_at(stages, boundary - 1) is stages[index - 1]
    assert stage_at(stages, TOTAL_STEPS - 1) is stages[-1]
    for outside in (-1, TOTAL_STEPS, TOTAL_STEPS + 1):
        with pytest.raises(ValueError, match=f"step {outside} is outside the 107336 steps"):
            stage_at(stages, outside)


@pytest.mark.parametrize(
    ("image_size", "multiple", "sizes"),
    [
        ((128, 300), 1, (128, 185, 243, 300)),
        ((128, 300), 16, (128, 192, 240, 304)),
        ((128, 300), 32, (128, 192, 256, 288)),
        ((128, 380), 32, (128, 224, 288, 384)),
        ((8, 20), 32, (32, 32, 32, 32)),  # Never 0 px.
    ],
)
def test_sizes_are_rounded_to_the_nearest_multiple(image_size, multiple, sizes):
    changes = {"image_size": image_size, "size_multiple": multiple}
    assert column(make_stages(100, **(VALID | changes)), "image_size") == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "relased"}, "unknown progressive.form 'relased': did you mean released"),
        ({"num_stages": 0}, "progressive.num_stages is 0"),
        ({"num_stages": 101}, "100 training steps cannot be cut into 101 stages"),
        ({"size_multiple": 0}, "progressive.size_multiple is 0"),
        ({"order": "rand"}, "unknown progressive.order 'rand': did you mean random"),
        ({"num_draws": 0}, "progressive.num_draws is 0"),
        (
            {"order": "random", "num_draws": 101},
            "100 training steps cannot be cut into 101 stages: .* or progressive.num_draws",
        ),
        ({"image_size": (0, 300)}, r"progressive.image_size is \(0, 300\)"),
        ({"image_size": (128, -1)}, r"progressive.image_size is \(128, -1\)"),
        ({"dropout_rate": (0.1, 1.0)}, r"progressive.dropout_rate is .*at least 0 and below 1\."),
        ({"dropout_rate": (-0.1, 0.3)}, r"progressive.dropout_rate is \(-0.1, 0.3\)"),
        ({"dropout_rate": (0.1, float("nan"))}, "progressive.dropout_rate is"),
        ({"randaug_magnitude": (-1.0, 5.0)}, "progressive.randaug_magnitude is .*0 or more"),
        ({"randaug_magnitude": (5.0, float("inf"))}, "progressive.randaug_magnitude is"),
        ({"randaug_magnitude": (5.0,)}, "progressive.randaug_magnitude is .*give two numbers"),
        ({"mixup_alpha": (0.0, -0.2)}, "progressive.mixup_alpha is .*0 or more"),
        ({"mixup_alpha": (0.0, 0.1, 0.2)}, "progressive.mixup_alpha is .*give two numbers"),
        ({"cutmix_alpha": (-0.5, 0.5)}, "progressive.cutmix_alpha is .*0 or more"),
    ],
)
def test_bad_values_are_refused(changes, message):
    make_stages(100, **VALID)
    with pytest.raises(InputError, match=message):
        make_stages(100, **(VALID | changes))


def test_no_step_at_all_is_refused():
    with pytest.raises(InputError, match="0 training steps cannot be cut into 1 stages"):
        make_stages(0, **(VALID | {"num_stages": 1}))


def test_the_table_shows_every_number():
    stages = stages_of("efficientnetv2-l", "released")
    header, *rows = format_stages(stages).splitlines()
    for title in ("stage", "steps", "image size", "dropout", "randaug", "mixup", "cutmix"):
        assert title in header
    assert len({len(line) for line in rows}) == 1 and len(rows) == 4
    for stage, row in zip(stages, rows, strict=True):
        number, steps, size, unit, *strengths = row.split()
        assert (number, size, unit) == (str(stage.index + 1), str(stage.image_size), "px")
        assert steps == f"{stage.first_step}-{stage.last_step - 1}"
        expected = (
            *(stage.dropout_rate, stage.randaug_magnitude),
            *(stage.mixup_alpha, stage.cutmix_alpha),
        )
        assert [float(s) for s in strengths] == pytest.approx(expected, abs=5e-4)
