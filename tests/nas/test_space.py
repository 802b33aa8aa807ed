"""The search space: it round-trips, it holds the published network, it refuses what is none."""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.models.create import count_parameters, create_model
from effnetv2_jax.nas.space import make_space


def sample(space, rng):
    return {name: rng.choice(choices) for name, choices in space.parameters.items()}


BACKBONES = ("efficientnetv2-b0", "efficientnet-b4", "efficientnet-lite0", "efficientnetv2-s")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_samples_are_networks_of_the_backbone_and_round_trip(backbone):
    space, rng = make_space(backbone), random.Random(0)
    base = specs.get_spec(backbone)
    variants = set()
    for _ in range(200):
        choices = sample(space, rng)
        variant = space.variant(choices)
        assert space.choices(variant) == choices
        spec = specs.get_spec(variant)
        assert [row.filters for row in spec.rows] == [row.filters for row in base.rows]
        assert [row.stride for row in spec.rows] == [row.stride for row in base.rows]
        for number, row in enumerate(spec.rows, 1):
            # What was chosen is what is built, with whatever depth coefficient the backbone has.
            assert spec.scaled_repeats(number - 1) == choices[f"stage{number}_layers"] >= 1
            assert row.operation == choices[f"stage{number}_operation"]
            assert (row.squeeze_ratio is None) == (
                row.operation == "fused" or backbone == "efficientnet-lite0"
            )
        # The same widths: as many channels at the ends of stages.
        assert spec.width == base.width and spec.eval_size == base.eval_size
        variants.add(variant)
    assert len(variants) > 190


def test_the_size_is_the_product_of_the_choices():
    # Six stages of 2 operations, 2 kernels, 3 expansions; the first may have 1 or 2 layers.
    assert make_space("efficientnetv2-b0").size == (2 * 2 * 3) ** 6 * 2 * 3**5
    assert make_space("efficientnetv2-b0", extra_layers=(0,)).size == (2 * 2 * 3) ** 6
    assert len(make_space("efficientnet-b4").parameters) == 7 * 4


def test_the_space_holds_the_published_choices_of_s():
    space = make_space("efficientnet-b4")
    for number, row in enumerate(specs.get_spec("efficientnetv2-s").rows, 1):
        assert row.operation in space.parameters[f"stage{number}_operation"]
        assert row.kernel_size in space.parameters[f"stage{number}_kernel_size"]
        assert row.expansion in space.parameters[f"stage{number}_expansion"]
    # And with S as the backbone, S itself, layers included.
    own = make_space("efficientnetv2-s")
    variant = own.variant(own.choices("efficientnetv2-s"))
    assert variant == "efficientnetv2-s@f3e1x2.f3e4x4.f3e4x4.m3e4x6.m3e6x9.m3e6x15"
    assert specs.get_spec(variant) == specs.get_spec("efficientnetv2-s")


def test_b4s_own_rows_are_b4():
    space = make_space("efficientnet-b4")
    variant = space.variant(space.choices("efficientnet-b4"))
    assert specs.unroll(specs.get_spec(variant)) == specs.unroll(specs.get_spec("efficientnet-b4"))
    assert count_parameters(create_model(variant)) == 19_341_616


def test_a_searched_network_computes_and_learns():
    model = create_model(
        "efficientnetv2-b0@m5e1x1.f5e6x1.m3e1x1.f3e1x2.f3e6x1.m5e4x1",
        num_classes=3,
        width_multiplier=0.5,
    )
    images = jnp.linspace(-1, 1, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params):
        return model.apply({**variables, "params": params}, images).var()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)]
    assert all(norm == norm for norm in norms) and sum(norm > 0 for norm in norms) > len(norms) / 2


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("efficientnetv2-b0@f3e1x1", "has 1 rows: the backbone has 6"),
        ("efficientnetv2-b0@f3e1x1.f3e4x2.f3e4x2.m3e4x3.m3e6x5.q3e6x8", "row 'q3e6x8' of"),
        ("efficientnetv2-b0@f3e1x1.f3e4x2.f4e4x2.m3e4x3.m3e6x5.m3e6x8", "odd kernel size"),
        ("efficientnetv2-b0@f3e1x1.f3e4x2.f3e4x0.m3e4x3.m3e6x5.m3e6x8", "row 'f3e4x0' of"),
        ("efficientnetv2-b0@", "has 1 rows"),
        ("efficientnetv2-b@f3e1x1", "unknown variant 'efficientnetv2-b': did you mean"),
        ("resnet50@f3e1x1", "only an EfficientNet"),
    ],
)
def test_a_name_that_is_no_network(variant, message):
    with pytest.raises(InputError) as error:
        specs.get_spec(variant)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operations": ()}, "operations of the space is (): give each choice once"),
        ({"expansions": (4, 4)}, "expansions of the space is (4, 4)"),
        ({"operations": ("mbconv", "pool")}, "operation 'pool'"),
        ({"kernel_sizes": (3, 4)}, "kernel_sizes (3, 4) must be odd"),
        ({"expansions": (0, 4)}, "1 or more"),
        ({"expansions": (4.5,)}, "expansions of the space is (4.5,): give whole numbers below 100"),
        ({"expansions": (128,)}, "whole numbers below 100"),
        ({"expansions": ("a",)}, "whole numbers below 100"),
        ({"kernel_sizes": (3.0,)}, "kernel_sizes of the space is (3.0,)"),
        ({"extra_layers": (0.5,)}, "extra_layers of the space is (0.5,)"),
    ],
)
def test_a_space_that_is_none(arguments, message):
    with pytest.raises(InputError) as error:
        make_space("efficientnetv2-b0", **arguments)
    assert message in str(error.value)
    with pytest.raises(InputError, match="backbone 'resnet50' is no EfficientNet"):
        make_space("resnet50")


def test_choices_outside_the_space():
    space = make_space("efficientnetv2-b0", expansions=(1, 4))
    choices = sample(space, random.Random(0))
    with pytest.raises(InputError, match="stage6_expansion is 6: it must be one of 1, 4"):
        space.variant({**choices, "stage6_expansion": 6})
    with pytest.raises(InputError, match="stage5_expansion is 6"):
        space.choices("efficientnetv2-b0")
    with pytest.raises(InputError, match="has 7 stages and the backbone 'efficientnetv2-b0' 6"):
        space.choices("efficientnet-b0")
    # As many rows, and other channels or no squeeze-excitation: not the network that it would name.
    for backbone, other in (
        ("efficientnetv2-b0", "efficientnetv2-s"),
        ("efficientnet-b0", "efficientnet-lite0"),
        ("efficientnet-b0", "efficientnet-b2"),
    ):
        wide = make_space(backbone, extra_layers=range(-5, 30))
        with pytest.raises(InputError, match="differs from the backbone"):
            wide.choices(other)
    # B1 is B0 with more layers.
    wide = make_space("efficientnet-b0", extra_layers=range(3))
    assert specs.unroll(
        specs.get_spec(wide.variant(wide.choices("efficientnet-b1")))
    ) == specs.unroll(specs.get_spec("efficientnet-b1"))
    assert dataclasses.asdict(space)["backbone"] == "efficientnetv2-b0"
