"""Scaling S up."""

from __future__ import annotations

import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.models.create import count_parameters
from effnetv2_jax.nas.scaling import compare, scale_to, scale_up


def test_no_step_leaves_the_network_alone():
    same = scale_up("efficientnetv2-s", 0.0)
    assert specs.get_spec(same.variant) == specs.get_spec("efficientnetv2-s")
    assert same.width_multiplier == 1.0 and same.eval_size == 384
    assert count_parameters(same.network()) == 21_458_488


def test_late_stages_get_more_layers_and_images_stay_below_480():
    scaled = scale_up("efficientnetv2-s", 3.0)
    growth = [b / a for a, b in zip((2, 4, 4, 6, 9, 15), scaled.layers(), strict=True)]
    assert min(growth[4:]) > max(growth[:4]) > 1.5
    assert scaled.eval_size == 480
    plain = scale_up("efficientnetv2-s", 3.0, late_depth=1.0)
    assert plain.layers()[:4] == scaled.layers()[:4] and plain.layers()[5] < scaled.layers()[5]


@pytest.mark.slow
def test_a_budget_of_multiply_adds_is_kept():
    scaled = scale_to("efficientnetv2-s", 24.6e9)
    assert 0.9 * 24.6e9 < scaled.multiply_adds() <= 24.6e9


def test_a_network_that_cannot_be_scaled():
    with pytest.raises(InputError, match="has more than 1e\\+09 multiply-adds already"):
        scale_to("efficientnetv2-s", 1e9)
    with pytest.raises(InputError, match="'resnet50' cannot be scaled: give an EfficientNet"):
        scale_up("resnet50", 1.0)
    with pytest.raises(InputError, match="by -1 steps: give 0 or more"):
        scale_up("efficientnetv2-s", -1.0)


@pytest.mark.parametrize("steps", [0.7, 1.3, 2.9])
def test_what_is_printed_is_what_was_scaled(steps):
    scaled = scale_up("efficientnetv2-s", steps)
    assert float(f"{scaled.width_multiplier:g}") == scaled.width_multiplier


@pytest.mark.slow
def test_the_comparison_shows_the_published_networks():
    text = compare("efficientnetv2-s")
    assert "efficientnetv2-m: 480 px, 54.1M parameters, 24.6G FLOPs" in text
    assert "efficientnetv2-l: 480 px, 118.5M parameters, 56.1G FLOPs" in text
    assert text.count("efficientnetv2-s scaled: 480 px") == 2
    assert text.count("scaled / published: parameters 0.") == 2
