"""Every layout names exactly the tensors of every network that it has."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec, list_variants
from effnetv2_jax.weights.convert import SOURCES, TARGETS
from effnetv2_jax.weights.model_folder import ModelSpec, expected_shapes

LAYOUTS = sorted(SOURCES)


@functools.cache
def shapes(variant):
    return expected_shapes(ModelSpec(variant, 1000, 224))


def entries(layout, variant):
    spec = get_spec(variant)
    return SOURCES[layout].layout(spec).entries(spec)


def has(layout, variant):
    # The package efficientnet_pytorch has V1 and Lite alone.
    is_fused = variant.startswith("efficientnetv2") or "fused" in variant
    return get_spec(variant).family in SOURCES[layout].families and not (
        layout == "efficientnet_pytorch" and is_fused
    )


@pytest.mark.parametrize("variant", list_variants())
def test_a_layout_covers_exactly_the_tensors_of_the_network(variant):
    for layout in filter(lambda name: has(name, variant), LAYOUTS):
        ours = [entry.ours for entry in entries(layout, variant)]
        theirs = [entry.theirs for entry in entries(layout, variant)]
        assert sorted(ours) == sorted(shapes(variant)), layout
        assert len(set(theirs)) == len(theirs), layout


def test_a_network_that_a_source_lacks_is_refused():
    with pytest.raises(InputError, match="timm has no resnet50 here: choose torchvision"):
        SOURCES["timm"].entries("timm", "resnet50")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["efficientnetv2-b0", "efficientnet-b0"])
def test_axes_are_those_of_the_library(layout, variant):
    if not has(layout, variant):
        pytest.skip(f"{layout} has no {variant}")
    # Height, width, inputs, outputs of our kernels; of a depthwise one, `i` is 1.
    conv, depthwise, dense = "hwio->hwio", "hwio->hwoi", "io->io"
    if layout in TARGETS:
        conv, depthwise, dense = "hwio->oihw", "hwio->oihw", "io->oi"
    random = np.random.default_rng(0)
    checked = set()
    for entry in entries(layout, variant):
        shape = shapes(variant)[entry.ours]
        axes = conv if len(shape) == 4 else dense if len(shape) == 2 else "i->i"
        if entry.ours.endswith("depthwise_conv/kernel"):
            axes = depthwise
        value = random.normal(size=shape)
        theirs = np.einsum(axes, value)
        np.testing.assert_array_equal(entry.to_theirs(value), theirs)
        np.testing.assert_array_equal(entry.from_theirs(theirs), value)
        checked.add(axes)
    assert checked == {conv, depthwise, dense, "i->i"}
