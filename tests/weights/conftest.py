"""A network that has every kind of block and a few thousand weights."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from effnetv2_jax.models import specs
from effnetv2_jax.models.specs import BlockRow, Spec
from effnetv2_jax.weights.model_folder import ModelSpec, expected_shapes

_TINY = Spec(
    (
        BlockRow("fused", 2, 3, 1, 1, 8),
        BlockRow("fused", 1, 3, 2, 4, 16),
        BlockRow("mbconv", 1, 5, 2, 1, 16, squeeze_ratio=0.25),
        BlockRow("mbconv", 2, 3, 1, 6, 24, squeeze_ratio=0.25),
    ),
    stem_filters=8,
    head_filters=32,
    train_size=32,
    eval_size=32,
    dropout_rate=0.2,
)


def random_variables(spec, seed=0):
    """Every tensor another random one; variances are positive."""
    random = np.random.default_rng(seed)
    tensors = {
        name: random.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in expected_shapes(spec).items()
    }
    return unflatten_dict(tensors, sep="/")


@pytest.fixture
def tiny(monkeypatch):
    """The name of the variant."""
    monkeypatch.setitem(specs.SPECS, "tiny", _TINY)
    return "tiny"


@pytest.fixture
def tiny_v1(monkeypatch):
    """The name of the variant without Fused-MBConv."""
    rows = tuple(row for row in _TINY.rows if row.operation == "mbconv")
    monkeypatch.setitem(specs.SPECS, "tiny-v1", dataclasses.replace(_TINY, rows=rows))
    return "tiny-v1"


@pytest.fixture
def tiny_weights(tiny):
    """A function from fields of the tiny network's spec to the spec and random variables."""
    return lambda **fields: _weights(ModelSpec(tiny, 5, 32, **fields))


def _weights(spec):
    return spec, random_variables(spec)
