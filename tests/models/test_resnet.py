"""ResNet: shapes, shortcuts, and what it shares with the other networks.

Its numbers are compared with torchvision's in tests/weights/test_parity.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.resnet import Bottleneck, Projection


def narrow(variant="resnet50", **overrides):
    settings = {"num_classes": 5, "width_multiplier": 0.125, "depth_multiplier": 0.3, **overrides}
    return create_model(variant, **settings)


def images(count=2, height=64, width=64):
    random = np.random.default_rng(0)
    return jnp.asarray(random.normal(size=(count, height, width, 3)), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(narrow().init)(jax.random.key(0), images())


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(
    ("stem_stride", "sides"), [(2, (32, 16, 8, 4, 2)), (1, (64, 32, 16, 8, 4))]
)
def test_endpoints_before_each_halving(padding, stem_stride, sides):
    model = create_model("resnet50", padding=padding, stem_stride=stem_stride)
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images(), return_features=True)[0]
    )
    assert model.total_stride == 64 // sides[-1]
    for number, (side, filters) in enumerate(
        zip(sides, (64, 256, 512, 1024, 2048), strict=True), 1
    ):
        assert shapes[f"reduction_{number}"].shape == (2, side, side, filters)
    assert shapes["features"].shape == (2, sides[-1], sides[-1], 2048)
    assert shapes["pooled"].shape == (2, 2048) and shapes["logits"].shape == (2, 1000)
    assert "reduction_6" not in shapes


def test_the_first_block_of_each_row_alone_projects(variables):
    projected = [name for name in variables["params"] if name.startswith("shortcut_")]
    rows = {"resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}
    assert projected == ["shortcut_0", "shortcut_1", "shortcut_3", "shortcut_5"]  # 1, 2, 2 and 1.
    for variant, repeats in rows.items():
        model = create_model(variant)
        params = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
        firsts = [sum(repeats[:row]) for row in range(4)]
        assert {name for name in params if "shortcut" in name} == {f"shortcut_{i}" for i in firsts}
        assert sum(name.startswith("blocks_") for name in params) == sum(repeats)
        # A block halves the resolution in its 3x3 convolution.
        assert params["blocks_0"]["spatial_conv"]["kernel"].shape == (3, 3, 64, 64)


def test_a_new_block_is_its_shortcut_and_an_activation(variables):
    maps = {}

    def keep(next_call, args, kwargs, context):
        outputs = next_call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(
            context.module, Bottleneck | Projection
        ):
            maps[context.module.name] = (args[0], outputs)
        return outputs

    with nn.intercept_methods(keep):
        narrow().apply(variables, images(), return_features=True)
    assert all(float(jnp.abs(maps[f"blocks_{index}"][1]).max()) == 0.0 for index in range(6))
    inputs, projected = maps["shortcut_1"]
    assert projected.shape == (2, 8, 8, 64) and inputs.shape == (2, 16, 16, 32)
    np.testing.assert_array_equal(maps["blocks_2"][0], jax.nn.relu(projected))
    np.testing.assert_array_equal(maps["shortcut_3"][0], maps["blocks_2"][0])


def test_stochastic_depth_drops_the_branch_of_projected_blocks_too(variables):
    # Scales other than 0, so that branches count.
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    trained = {"params": params, "batch_stats": variables["batch_stats"]}

    def run(rate):
        model = narrow()
        return model.apply(
            trained,
            images(),
            train=True,
            dropout_rate=0.0,
            drop_path_rate=rate,
            rngs={"drop_path": jax.random.key(3)},
            mutable=["batch_stats"],
        )[0]

    whole = run(0.0)
    assert np.isfinite(whole).all()
    assert not np.allclose(whole, run(0.9))


def test_rematerialisation_changes_nothing(variables):
    def gradients(groups):
        def loss(params):
            model = narrow(remat_groups=groups)
            collections = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, _ = model.apply(
                collections,
                images(),
                train=True,
                dropout_rate=0.0,
                drop_path_rate=0.0,
                mutable=["batch_stats"],
            )
            return jnp.mean(logits**2)

        return jax.jit(jax.grad(loss))(variables["params"])

    for one, other in zip(
        jax.tree.leaves(gradients(0)), jax.tree.leaves(gradients(4)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
