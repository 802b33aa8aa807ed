"""The network against the released code's numbers and against hand computations.

Real variants are only traced (`jax.eval_shape`); what must run, runs on a cut-down one.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effnetv2_jax
from effnetv2_jax.errors import InputError
from effnetv2_jax.models import network, specs
from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.efficientnet import EfficientNet, FusedMBConv, MBConv
from effnetv2_jax.models.layers import (
    batch_positions,
    classifier_init,
    conv_init,
    drop,
    example_uniforms,
)
from effnetv2_jax.models.specs import BlockRow, Spec, list_variants

# Trainable scalars, BN statistics (scalars), variables with and without the BN statistics. The
# first two sum to the number in the released unit test (automl effnetv2_model_test.py). A change
# here means that released checkpoints no longer fit.
COUNTS = {
    "efficientnetv2-b0": (7_139_704, 60_608, 361, 243),
    "efficientnetv2-b1": (8_141_052, 71_072, 443, 297),
    "efficientnetv2-b2": (10_096_086, 82_288, 462, 310),
    "efficientnetv2-b3": (14_358_406, 109_216, 538, 362),
    "efficientnetv2-s": (21_458_488, 153_872, 672, 452),
    "efficientnetv2-m": (54_139_356, 292_032, 963, 649),
    "efficientnetv2-l": (118_515_272, 512_576, 1331, 897),
    "efficientnetv2-xl": (208_119_808, 777_024, 1712, 1156),
    # EfficientNet V1 as torchvision and Keras count it (Keras without its input normalisation).
    # B7's statistics follow from its 66,658,680 variables.
    "efficientnet-b0": (5_288_548, 42_016, 311, 213),
    "efficientnet-b1": (7_794_184, 62_048, 439, 301),
    "efficientnet-b2": (9_109_994, 67_568, 439, 301),
    "efficientnet-b3": (12_233_232, 87_296, 496, 340),
    "efficientnet-b4": (19_341_616, 125_200, 610, 418),
    "efficientnet-b5": (30_389_784, 172_736, 738, 506),
    "efficientnet-b6": (43_040_704, 224_432, 852, 584),
    "efficientnet-b7": (66_347_960, 310_720, 1037, 711),
    # Table 3: 20.0M, 43.4M and 132.0M.
    "efficientnet-b4-fused-1-3": (19_944_398, 121_216, 520, 348),
    "efficientnet-b4-fused-1-5": (43_361_152, 104_464, 466, 306),
    "efficientnet-b4-fused-1-7": (131_954_632, 71_056, 376, 236),
    # As timm counts its tf_efficientnet_lite models.
    "efficientnet-lite0": (4_652_008, 42_016, 247, 149),
    "efficientnet-lite1": (5_416_680, 53_664, 322, 194),
    "efficientnet-lite2": (6_092_072, 58_096, 322, 194),
    "efficientnet-lite3": (8_197_096, 76_672, 367, 221),
    "efficientnet-lite4": (13_006_568, 112_368, 457, 275),
    # As torchvision counts them (Keras's convolutions have biases too).
    "resnet50": (25_557_032, 53_120, 267, 161),
    "resnet152": (60_192_808, 151_424, 777, 467),
}
# Squeeze-excitation's inner width in the first block of a row and in the others: a quarter of
# the block's input, which in the first block is the row before.
SQUEEZE_WIDTHS = {
    "efficientnetv2-b0": [(12, 24), (24, 28), (28, 48)],
    "efficientnetv2-b1": [(12, 24), (24, 28), (28, 48)],
    "efficientnetv2-b2": [(14, 26), (26, 30), (30, 52)],
    "efficientnetv2-b3": [(14, 28), (28, 34), (34, 58)],
    "efficientnetv2-s": [(16, 32), (32, 40), (40, 64)],
    "efficientnetv2-m": [(20, 40), (40, 44), (44, 76), (76, 128)],
    "efficientnetv2-l": [(24, 48), (48, 56), (56, 96), (96, 160)],
    "efficientnetv2-xl": [(24, 48), (48, 64), (64, 128), (128, 160)],
}
BASELINES = [variant for variant in COUNTS if not variant.startswith("efficientnetv2-")]
# Rows of Fused-MBConv blocks come first and have no squeeze-excitation.
NUM_BLOCKS = {
    "efficientnetv2-b0": (1, 2, 2, 3, 5, 8),
    "efficientnetv2-b1": (2, 3, 3, 4, 6, 9),
    "efficientnetv2-b2": (2, 3, 3, 4, 6, 10),
    "efficientnetv2-b3": (2, 3, 3, 5, 7, 12),
    "efficientnetv2-s": (2, 4, 4, 6, 9, 15),
    "efficientnetv2-m": (3, 5, 5, 7, 14, 18, 5),
    "efficientnetv2-l": (4, 7, 7, 10, 19, 25, 7),
    "efficientnetv2-xl": (4, 8, 8, 16, 24, 32, 8),
}
# Three blocks with skips: blocks 0, 1, 2 drop with 0, 1/3 and 2/3 of the drop_path_rate.
MICRO = Spec((BlockRow("fused", 3, 3, 1, 1, 8),), 8, 16, 32, 32, dropout_rate=0.0)
# All kinds of blocks. Blocks 1 and 3 change the resolution, block 5 the number of channels.
MIXED = Spec(
    (
        BlockRow("fused", 1, 3, 1, 1, 8),
        BlockRow("fused", 2, 3, 2, 4, 16),
        BlockRow("mbconv", 2, 3, 2, 4, 24, squeeze_ratio=0.25),
        BlockRow("mbconv", 1, 3, 1, 6, 32, squeeze_ratio=0.25),
    ),
    *(8, 64, 32, 32),
    dropout_rate=0.0,
)
MIXED_HAS_SKIP = [True, False, True, False, True, False]


def _micro(**overrides):
    settings = {"num_classes": 5, "dropout_rate": 0.0, "drop_path_rate": 0.0, **overrides}
    return EfficientNet(spec=MICRO, **settings)


def _tiny(**overrides):
    settings = {"num_classes": 5, "width_multiplier": 0.25, "depth_multiplier": 0.2, **overrides}
    return create_model("efficientnetv2-b0", **settings)


def _images(batch=2, height=32, width=32):
    random = np.random.default_rng(batch)
    return jnp.asarray(random.normal(size=(batch, height, width, 3)), jnp.float32)


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), _images(1))


@functools.cache
def _variant_shapes(variant):
    return flax.core.unfreeze(_shapes(create_model(variant)))


def _random_variables(model):
    """Variables as NumPy draws them: no compilation, and no special values like BN's 0 and 1."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = random.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        elif path[-1].key in ("var", "scale"):
            values = 0.5 + np.abs(values)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, _shapes(model))


def _sizes(tree):
    return [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]


def _run_blocks(model, variables, images, rngs=None, **kwargs):
    """Every block's input, then the last one's output; every block's branch; the endpoints."""

    @jax.jit
    def run(variables, images, rngs):
        maps, branches = [], []

        def record(next_call, args, kwargs, context):
            outputs = next_call(*args, **kwargs)
            if context.method_name == "__call__" and isinstance(
                context.module, FusedMBConv | MBConv
            ):
                maps.append(args[0])
                branches.append(outputs)
            return outputs

        with nn.intercept_methods(record):
            endpoints, _ = model.apply(
                variables,
                images,
                return_features=True,
                mutable=["batch_stats"],
                rngs=rngs,
                **kwargs,
            )
        last = max(name for name in endpoints if name.startswith("reduction_"))
        return [*maps, endpoints[last]], branches, endpoints

    return jax.tree.map(np.asarray, run(variables, images, rngs))


# ---------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("table", [SQUEEZE_WIDTHS, NUM_BLOCKS])
def test_the_tables_cover_every_variant(table):
    assert sorted(COUNTS) == sorted(list_variants()) == sorted(effnetv2_jax.list_variants())
    assert sorted([*table, *BASELINES]) == sorted(COUNTS)


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    shapes = _variant_shapes(variant)
    params, stats = _sizes(shapes["params"]), _sizes(shapes["batch_stats"])
    counts = (sum(params), sum(stats), len(params) + len(stats), len(params))
    assert counts == COUNTS[variant]
    assert set(shapes) == {"params", "batch_stats"}


def test_parameter_count_with_the_classes_of_imagenet_21k():
    shapes = _shapes(create_model("efficientnetv2-b0", num_classes=21_843))
    assert sum(_sizes(shapes["params"])) == 33_839_587


@pytest.mark.parametrize("variant", SQUEEZE_WIDTHS)
def test_squeeze_widths(variant):
    params = _variant_shapes(variant)["params"]
    repeats = NUM_BLOCKS[variant]
    expected = [None] * sum(repeats[:3])
    for (first, rest), count in zip(SQUEEZE_WIDTHS[variant], repeats[3:], strict=True):
        expected += [first] + [rest] * (count - 1)
    blocks = [params[f"blocks_{index}"] for index in range(sum(repeats))]
    assert f"blocks_{len(blocks)}" not in params
    widths = [b["se"]["reduce"]["kernel"].shape[-1] if "se" in b else None for b in blocks]
    assert widths == expected


def test_v1_squeezes_every_block_by_a_quarter_of_its_input():
    params = _variant_shapes("efficientnet-b3")["params"]
    # Rows of 40, 24, 32, 48, 96, 136, 232 and 384 channels, 2, 3, 3, 5, 5, 6 and 2 blocks each.
    widths = [10, 6, 6, 8, 8, 8, 12, 12, 12, *[24] * 5, *[34] * 5, *[58] * 6, 96]
    blocks = [params[f"blocks_{index}"]["se"]["reduce"]["kernel"].shape for index in range(26)]
    assert [shape[-1] for shape in blocks] == widths
    # The rule of V1 lifts 19.2 channels to 24, that of V2's code would leave 16.
    assert params["blocks_0"]["project_conv"]["kernel"].shape[-1] == 24


def test_lite_has_no_squeeze_relu6_and_ends_of_one_size():
    shapes = _variant_shapes("efficientnet-lite4")["params"]
    assert not any("se" in block for block in shapes.values())
    assert shapes["stem_conv"]["kernel"].shape == (3, 3, 3, 32)
    assert shapes["head_conv"]["kernel"].shape == (1, 1, 448, 1280)
    # Depth 1.8 leaves the first and the last row at one block: 1, 4, 4, 6, 6, 8, 1.
    assert sum(name.startswith("blocks_") for name in shapes) == 30
    assert shapes["blocks_29"]["project_conv"]["kernel"].shape[-1] == 448
    assert shapes["blocks_28"]["project_conv"]["kernel"].shape[-1] == 272
    model = create_model("efficientnet-lite0", num_classes=5)
    _, _, endpoints = _run_blocks(model, _random_variables(model), 40 * _images())
    assert endpoints["features"].max() == 6.0 and endpoints["features"].min() == 0.0


DROPOUT_RATES = {
    "b0": 0.2,
    "b1": 0.2,
    "b2": 0.3,
    "b3": 0.3,
    "s": 0.2,
    "m": 0.3,
    "l": 0.4,
    "xl": 0.4,
}


@pytest.mark.parametrize(("variant", "dropout_rate"), DROPOUT_RATES.items())
def test_released_settings(variant, dropout_rate):
    model = create_model(f"efficientnetv2-{variant}")
    assert model.dropout_rate == dropout_rate
    assert (model.drop_path_rate, model.bn_decay, model.bn_epsilon) == (0.2, 0.9, 1e-3)
    assert (model.num_classes, model.dtype, model.total_stride) == (1000, jnp.float32, 32)
    assert create_model(f"efficientnetv2-{variant}", dropout_rate=0.0).dropout_rate == 0.0


@pytest.mark.parametrize(
    ("image_size", "sides"), [(384, [192, 96, 48, 24, 12]), (171, [86, 43, 22, 11, 6])]
)
def test_endpoints_of_b0(image_size, sides):
    model = create_model("efficientnetv2-b0")
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    call = functools.partial(model.apply, return_features=True)
    endpoints = jax.eval_shape(call, _variant_shapes("efficientnetv2-b0"), images)
    expected = {
        f"reduction_{number}": (2, side, side, channels)
        for number, side, channels in zip(range(1, 6), sides, [16, 32, 48, 112, 192], strict=True)
    }
    expected["features"] = (2, sides[-1], sides[-1], 1280)
    expected["pooled"] = (2, 1280)
    expected["logits"] = (2, 1000)
    assert {name: leaf.shape for name, leaf in endpoints.items()} == expected


def test_a_stem_without_stride_suits_small_images():
    model = _tiny(stem_stride=1)
    assert model.total_stride == 16
    call = functools.partial(model.apply, return_features=True)
    endpoints = jax.eval_shape(call, _shapes(model), _images())
    sides = [leaf.shape[1] for name, leaf in endpoints.items() if name.startswith("reduction")]
    assert sides == [32, 16, 8, 4, 2]


# ------------------------------------------------------------------------------ the hand checks


def test_odd_images_that_are_not_square_and_consistent_endpoints():
    model, images = EfficientNet(spec=MIXED, num_classes=5), _images(2, 37, 50)
    variables = _random_variables(model)
    _, _, endpoints = _run_blocks(model, variables, images)
    assert endpoints["features"].shape == (2, 5, 7, 64)  # 37 -> 19, 10, 5 and 50 -> 25, 13, 7
    np.testing.assert_allclose(
        endpoints["pooled"], endpoints["features"].mean(axis=(1, 2)), rtol=1e-4, atol=1e-5
    )
    dense = jax.tree.map(np.asarray, variables["params"]["classifier"])
    logits = endpoints["pooled"] @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(endpoints["logits"], logits, rtol=1e-4, atol=1e-4)
    assert np.ptp(logits, axis=0).min() > 0


def test_the_call_returns_the_logits_alone_unless_asked():
    model = _micro()
    variables = _random_variables(model)
    endpoints = jax.jit(functools.partial(model.apply, return_features=True))(variables, _images())
    logits = jax.jit(model.apply)(variables, _images())
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(logits, endpoints["logits"], rtol=1e-4, atol=1e-5)


def test_the_input_is_added_where_neither_size_nor_channels_change():
    model = EfficientNet(spec=MIXED, num_classes=5)
    maps, branches, _ = _run_blocks(model, _random_variables(model), _images(2, 37, 50))
    assert len(branches) == len(MIXED_HAS_SKIP)
    for index, has_skip in enumerate(MIXED_HAS_SKIP):
        expected = branches[index] + maps[index] if has_skip else branches[index]
        np.testing.assert_allclose(
            maps[index + 1], expected, rtol=1e-4, atol=1e-5, err_msg=str(index)
        )
        assert np.abs(maps[index]).max() > 0.1


def _conv_by_hand(image, kernel, stride):
    """One image [H, W, C] of an even side, with TensorFlow's padding for a 3x3 kernel."""
    before = 1 if stride == 1 else 0
    padded = np.pad(image, ((before, 1), (before, 1), (0, 0)))
    side = image.shape[0] // stride
    outputs = np.zeros((side, side, kernel.shape[3]))
    for row in range(side):
        for column in range(side):
            y, x = row * stride, column * stride
            window = padded[y : y + 3, x : x + 3]
            outputs[row, column] = np.einsum("hwc,hwcd->d", window, kernel)
    return outputs


def _silu(x):
    return x / (1 + np.exp(-x))


def _norm_by_hand(x, params, stats):
    scaled = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3)
    return scaled * params["scale"] + params["bias"]


def test_a_fused_block_without_expansion_activates_before_the_addition():
    model, images = _micro(), _images(1, 8, 8)
    variables = _random_variables(model)
    maps, _, _ = _run_blocks(model, variables, images)
    params, stats = (jax.tree.map(np.asarray, variables[c]) for c in ("params", "batch_stats"))

    stem = _conv_by_hand(np.asarray(images)[0], params["stem_conv"]["kernel"], 2)
    stem = _silu(_norm_by_hand(stem, params["stem_bn"], stats["stem_bn"]))
    np.testing.assert_allclose(maps[0][0], stem, rtol=1e-4, atol=1e-5)

    block_params, block_stats = params["blocks_0"], stats["blocks_0"]
    assert set(block_params) == {"conv", "bn"}
    normed = _norm_by_hand(
        _conv_by_hand(stem, block_params["conv"]["kernel"], 1),
        block_params["bn"],
        block_stats["bn"],
    )
    np.testing.assert_allclose(maps[1][0], _silu(normed) + stem, rtol=1e-4, atol=1e-5)
    assert np.abs(_silu(normed + stem) - _silu(normed) - stem).max() > 0.1


def test_bn_epsilon_is_the_released_one():
    model = _micro()
    variables = _random_variables(model)
    # With variances this small the output is the epsilon's: 1e-5 would make it 10 times larger.
    variables["batch_stats"]["stem_bn"]["var"] = jnp.full((8,), 1e-6)
    maps, _, _ = _run_blocks(model, variables, _images(1, 8, 8))
    params, stats = (jax.tree.map(np.asarray, variables[c]) for c in ("params", "batch_stats"))
    stem = _conv_by_hand(np.asarray(_images(1, 8, 8))[0], params["stem_conv"]["kernel"], 2)
    expected = _silu(_norm_by_hand(stem, params["stem_bn"], stats["stem_bn"]))
    np.testing.assert_allclose(maps[0][0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bn_decay", [0.9, 0.99])
def test_bn_decay_is_the_weight_of_the_old_value(bn_decay):
    model, images = _micro(bn_decay=bn_decay), _images(2, 8, 8)
    variables = _random_variables(model)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, updates = jax.jit(train)(variables, images)
    kernel = np.asarray(variables["params"]["stem_conv"]["kernel"])
    batch = np.stack([_conv_by_hand(image, kernel, 2) for image in np.asarray(images)])
    old, new = variables["batch_stats"]["stem_bn"], updates["batch_stats"]["stem_bn"]
    # The variance is the biased one: divided by the number of pixels.
    for name, value in (("mean", batch.mean((0, 1, 2))), ("var", batch.var((0, 1, 2)))):
        expected = bn_decay * np.asarray(old[name]) + (1 - bn_decay) * value
        np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_replicas_share_batch_statistics():
    """Two replicas of two images each, as one batch of four; `vmap` stands for the devices."""
    images = _images(4, 8, 8)
    variables = _random_variables(_micro())

    def updates(model, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    together = jax.jit(functools.partial(updates, _micro()))(images)
    replicas = jax.vmap(functools.partial(updates, _micro(axis_name="r")), axis_name="r")
    shared = jax.jit(replicas)(images.reshape(2, 2, 8, 8, 3))
    for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(two, np.stack([one, one]), rtol=1e-4, atol=1e-5)


def test_replica_groups_must_divide_the_replicas():
    model = _micro(axis_name="r", bn_group_size=2)
    variables = _random_variables(model)

    def apply(images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    with pytest.raises(InputError, match=r"bn_group_size 2 does not divide the 3 replicas"):
        jax.eval_shape(jax.vmap(apply, axis_name="r"), jnp.zeros((3, 2, 8, 8, 3)))


# ------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize(
    ("shape", "stddev"),
    [
        ((3, 3, 1, 256), math.sqrt(2 / 9)),
        ((3, 3, 1, 2048), math.sqrt(2 / 9)),
        ((3, 3, 32, 64), math.sqrt(2 / (9 * 64))),
        ((1, 1, 256, 64), math.sqrt(2 / 64)),
    ],
)
def test_conv_init(shape, stddev):
    """Depthwise kernels have 0.4714 = sqrt(2 / 9) whatever their width."""
    depthwise = shape[2] == 1
    values = np.asarray(conv_init(jax.random.key(1), shape, depthwise=depthwise)) / stddev
    assert values.std() == pytest.approx(1, rel=0.06)
    assert values.mean() == pytest.approx(0, abs=0.06)
    # 4.6 % of a normal lie outside two standard deviations, of a truncated one hardly any.
    assert np.mean(np.abs(values) > 2) == pytest.approx(0.0455, abs=0.015)


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_classifier_init(num_classes):
    values = np.asarray(classifier_init(jax.random.key(1), (1280, num_classes)))
    limit = 1 / math.sqrt(num_classes)
    assert np.abs(values).max() <= limit
    assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)  # a uniform one
    assert values.mean() == pytest.approx(0, abs=0.02 * limit)


def test_the_network_uses_these_initialisers():
    model = EfficientNet(spec=MIXED, num_classes=100)
    # This generator compiles faster than the default one.
    key = jax.random.key(0, impl="unsafe_rbg")
    params = jax.jit(lambda key: model.init(key, _images(1))["params"])(key)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = 0
    for path, leaf in leaves:
        names = [entry.key for entry in path]
        values = np.asarray(leaf)
        label = "/".join(names)
        if names == ["classifier", "kernel"]:
            assert 0.099 < np.abs(values).max() <= 0.1, label
        elif names[-1] == "kernel":
            fan_out = 1 if names[-2] == "depthwise_conv" else values.shape[-1]
            stddev = math.sqrt(2 / (values.shape[0] ** 2 * fan_out))
            # Four standard errors of a standard deviation; the smallest kernel has 216 entries.
            assert values.std() == pytest.approx(stddev, rel=4 / math.sqrt(2 * values.size)), label
            kernels += 1
        else:
            np.testing.assert_array_equal(values, 1.0 if names[-1] == "scale" else 0.0, label)
    assert kernels == len(MIXED_HAS_SKIP) * 2 - 1 + 3 * 3 + 2


# ---------------------------------------------------------------------------------------- types


def test_parameters_statistics_and_logits_stay_float32():
    model = _tiny(dtype="bfloat16")
    assert model == _tiny(dtype=jnp.bfloat16) == _tiny(dtype=jnp.dtype("bfloat16"))
    variables = _shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    rngs = {name: jax.random.key(0) for name in ("dropout", "drop_path")}
    train = functools.partial(
        model.apply, train=True, return_features=True, mutable=["batch_stats"], rngs=rngs
    )
    endpoints, updates = jax.eval_shape(train, variables, _images())
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    assert endpoints.pop("logits").dtype == jnp.float32
    assert {leaf.dtype for leaf in endpoints.values()} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(model.apply, variables, _images()).dtype == jnp.float32


# -------------------------------------------------------------------------------------- dropping


def _trace_training(rngs=(), **rates):
    model = _micro(dropout_rate=0.1, drop_path_rate=0.1)
    keys = {name: jax.random.key(0) for name in rngs}
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"], rngs=keys, **rates)
    return jax.eval_shape(train, _shapes(model), _images())


@pytest.mark.parametrize("zero", [0, 0.0])
def test_training_needs_an_rng_only_where_a_rate_is_not_zero(zero):
    _trace_training(dropout_rate=zero, drop_path_rate=zero)
    _trace_training(["dropout"], drop_path_rate=zero)
    _trace_training(["drop_path"], dropout_rate=zero)
    _trace_training(["dropout", "drop_path"])
    for rngs, missing in ((["dropout"], "drop_path"), (["drop_path"], "dropout")):
        with pytest.raises(flax.errors.InvalidRngError, match=rf'PRNG for "{missing}"'):
            _trace_training(rngs)


def test_evaluation_ignores_rates_and_accepts_rngs():
    model = _micro(dropout_rate=0.5, drop_path_rate=0.5)
    variables = _random_variables(model)
    apply = jax.jit(model.apply)
    keys = {name: jax.random.key(0) for name in ("dropout", "drop_path")}
    plain = apply(variables, _images())
    np.testing.assert_array_equal(apply(variables, _images(), rngs=keys), plain)
    np.testing.assert_array_equal(apply(variables, _images(), drop_path_rate=0.9), plain)


def test_traced_rates_compile_nothing_anew():
    model = _micro()
    variables = _random_variables(model)
    traces = []

    @jax.jit
    def train(dropout_rate, drop_path_rate, key):
        traces.append(1)
        keys = dict(zip(("dropout", "drop_path"), jax.random.split(key), strict=True))
        rates = {"dropout_rate": dropout_rate, "drop_path_rate": drop_path_rate}
        return model.apply(
            variables, _images(4), train=True, mutable=["batch_stats"], rngs=keys, **rates
        )[0]

    key = jax.random.key(0)
    results = [train(*rates, key) for rates in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.9), (0.5, 0.9))]
    assert len(traces) == 1
    for index, one in enumerate(results):
        for other in results[:index]:
            assert np.abs(one - other).max() > 1e-3
    # A traced rate of 0 is no dropping at all.
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    plain, _ = jax.jit(apply)(variables, _images(4))
    np.testing.assert_allclose(results[0], plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(train(0.5, 0.9, key), results[3])
    assert np.abs(train(0.5, 0.9, jax.random.key(1)) - results[3]).max() > 1e-3


def test_stochastic_depth_rates_of_s(monkeypatch):
    """Every block counts, also those without a skip; the last of S survives with 0.805."""
    rates = specs.drop_path_rates(40, 0.2)
    assert rates == pytest.approx([0.2 * index / 40 for index in range(40)])
    assert rates[0] == 0.0
    assert 1 - rates[-1] == pytest.approx(0.805)

    used = []
    monkeypatch.setattr(network, "drop", lambda x, draws, rate: used.append(rate) or x)
    model = create_model("efficientnetv2-s", dropout_rate=0.0)
    train = functools.partial(
        model.apply, train=True, mutable=["batch_stats"], rngs={"drop_path": jax.random.key(0)}
    )
    jax.eval_shape(train, _variant_shapes("efficientnetv2-s"), _images())
    # The first blocks of rows 1 to 5 have no skip.
    with_skip = [index for index in range(40) if index not in (2, 6, 10, 16, 25)]
    assert used == pytest.approx([0.2 * index / 40 for index in with_skip])


def test_drop():
    draws = jnp.asarray([0.0, 0.2499, 0.25, 0.2501, 0.9])
    np.testing.assert_array_equal(drop(jnp.ones(5), draws, 0.75), [4, 4, 0, 0, 0])
    np.testing.assert_array_equal(drop(jnp.full(5, 3.0), draws, 0.0), np.full(5, 3.0))
    assert drop(jnp.ones(5, jnp.bfloat16), draws, jnp.float32(0.5)).dtype == jnp.bfloat16
    many = np.random.default_rng(0).random((100, 100), np.float32)
    dropped = drop(jnp.ones((100, 100)), many, 0.3)
    # Four standard errors of a share of 10,000 draws.
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 10_000))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / (1 - np.float32(0.3)))}


def _kept(maps, branches, rate):
    """Which branches [block, example] the network kept; fails for one kept in part."""
    kept = []
    for index, branch in enumerate(branches):
        added = maps[index + 1] - maps[index]
        scaled = branch / (1 - rate * index / len(branches))
        is_kept = [np.allclose(a, s, atol=1e-4) for a, s in zip(added, scaled, strict=True)]
        is_dropped = [np.allclose(a, 0, atol=1e-6) for a in added]
        assert [not value for value in is_dropped] == is_kept
        kept.append(is_kept)
    return np.asarray(kept)


def test_a_branch_is_dropped_for_a_whole_example_and_by_its_position():
    model = _micro(drop_path_rate=0.9)
    variables = _random_variables(model)

    def kept(batch, seed):
        rngs = {"drop_path": jax.random.key(seed)}
        maps, branches, _ = _run_blocks(model, variables, _images(batch, 8, 8), rngs, train=True)
        return _kept(maps, branches, 0.9)

    eight = kept(8, seed=8)
    assert eight.shape == (3, 8)
    assert eight[0].all()  # The first block's rate is 0.
    assert 0 < eight[1:].sum() < 16
    # Each block draws its own: by one draw for all, what a later block keeps, an earlier one does.
    assert (eight[2] & ~eight[1]).any()
    np.testing.assert_array_equal(kept(8, seed=8), eight)
    assert (kept(8, seed=9) != eight).any()
    # Draws belong to the position in the batch, not to the batch's size.
    np.testing.assert_array_equal(kept(4, seed=8), eight[:, :4])


def test_draws_do_not_depend_on_the_number_of_devices():
    key = jax.random.key(0)
    eight = example_uniforms(key, jnp.arange(8), 3)
    np.testing.assert_array_equal(example_uniforms(key, jnp.arange(4), 3), eight[:4])
    assert len(np.unique(eight)) == eight.size
    assert (example_uniforms(jax.random.key(1), jnp.arange(8), 3) != eight).all()
    devices = jax.vmap(
        lambda _: example_uniforms(key, batch_positions(4, "replicas"), 3), axis_name="replicas"
    )(jnp.arange(2))
    np.testing.assert_array_equal(devices.reshape(8, 3), eight)


# ---------------------------------------------------------------------------------- the messages


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(InputError, match=r"'efficientnet-v2-s': did you mean efficientnetv2-s"):
        create_model("efficientnet-v2-s")
    with pytest.raises(InputError, match=r"variant 'vgg': choose one of efficientnet-b0, "):
        create_model("vgg")


def test_an_unknown_padding_names_the_nearest():
    with pytest.raises(InputError, match="unknown padding 'symetric': did you mean symmetric"):
        create_model("efficientnetv2-b0", padding="symetric")


def test_symmetric_padding_moves_the_strided_convolutions_by_a_pixel():
    same, symmetric = _tiny(), _tiny(padding="symmetric")
    variables = _random_variables(same)
    for side in (32, 33):
        images = _images(height=side, width=side)
        differs = not np.allclose(
            same.apply(variables, images), symmetric.apply(variables, images), atol=1e-3
        )
        # Of 33 px 17, 9, 5, 3 and 2 are left: every map but the last is odd, and only an even one
        # is padded at one side alone.
        assert differs == (side == 32)


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(InputError, match=r"'drop_path': did you mean 'drop_path_rate'\?"):
        create_model("efficientnetv2-s", drop_path=0.1)
    with pytest.raises(InputError, match=r"'zzz': choose from .*bn_decay"):
        create_model("efficientnetv2-s", zzz=1)
    with pytest.raises(InputError, match="no override 'parent'"):
        create_model("efficientnetv2-s", parent=None)


def test_a_spec_is_no_override_and_is_not_offered():
    with pytest.raises(InputError, match="no override 'spec'") as error:
        create_model("efficientnetv2-s", spec=MICRO)
    assert "did you mean 'spec'" not in str(error.value)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        jnp.int32,
        "bfloat15",
    ],
    ids=str,
)
def test_an_unsupported_type_names_the_choices(dtype):
    with pytest.raises(InputError, match=r"unknown dtype .*(did you mean|choose one of) .*float"):
        create_model("efficientnetv2-s", dtype=dtype)


def test_a_model_is_built_without_tensorflow():
    program = (
        "import sys, effnetv2_jax\n"
        "effnetv2_jax.create_model(effnetv2_jax.list_variants()[0])\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'tensorflow'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
