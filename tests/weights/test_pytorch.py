"""Names of four PyTorch layouts, and files that are not what they should be."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from safetensors.numpy import save_file

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.weights.convert import SOURCES
from effnetv2_jax.weights.pytorch import _unwrap, read_state_dict

# Of S, block 0 is a Fused-MBConv with one convolution, block 2 one with two (the first of the
# second row), block 10 an MBConv (the first of the fourth). Of V1-B0, block 0 does not expand.
S = {
    "params/stem_conv/kernel": {
        "timm": "conv_stem.weight",
        "torchvision": "features.0.0.weight",
        "plain_pytorch": "stem.conv.weight",
    },
    "batch_stats/stem_bn/var": {
        "timm": "bn1.running_var",
        "torchvision": "features.0.1.running_var",
        "plain_pytorch": "stem.bn.running_var",
    },
    "params/blocks_0/conv/kernel": {
        "timm": "blocks.0.0.conv.weight",
        "torchvision": "features.1.0.block.0.0.weight",
        "plain_pytorch": "blocks.0.project_conv.conv.weight",
    },
    "params/blocks_0/bn/scale": {
        "timm": "blocks.0.0.bn1.weight",
        "torchvision": "features.1.0.block.0.1.weight",
        "plain_pytorch": "blocks.0.project_conv.bn.weight",
    },
    "params/blocks_2/expand_conv/kernel": {
        "timm": "blocks.1.0.conv_exp.weight",
        "torchvision": "features.2.0.block.0.0.weight",
        "plain_pytorch": "blocks.2.expand_conv.conv.weight",
    },
    "params/blocks_2/project_bn/bias": {
        "timm": "blocks.1.0.bn2.bias",
        "torchvision": "features.2.0.block.1.1.bias",
        "plain_pytorch": "blocks.2.project_conv.bn.bias",
    },
    "params/blocks_10/depthwise_conv/kernel": {
        "timm": "blocks.3.0.conv_dw.weight",
        "torchvision": "features.4.0.block.1.0.weight",
        "plain_pytorch": "blocks.10.dwconv.conv.weight",
    },
    "params/blocks_10/se/reduce/bias": {
        "timm": "blocks.3.0.se.conv_reduce.bias",
        "torchvision": "features.4.0.block.2.fc1.bias",
        "plain_pytorch": "blocks.10.se.conv_reduce.bias",
    },
    "params/blocks_10/se/expand/kernel": {
        "timm": "blocks.3.0.se.conv_expand.weight",
        "torchvision": "features.4.0.block.2.fc2.weight",
        "plain_pytorch": "blocks.10.se.conv_expand.weight",
    },
    "batch_stats/blocks_10/project_bn/mean": {
        "timm": "blocks.3.0.bn3.running_mean",
        "torchvision": "features.4.0.block.3.1.running_mean",
        "plain_pytorch": "blocks.10.project_conv.bn.running_mean",
    },
    "params/head_conv/kernel": {
        "timm": "conv_head.weight",
        "torchvision": "features.7.0.weight",
        "plain_pytorch": "head.project_conv.conv.weight",
    },
    "params/classifier/bias": {
        "timm": "classifier.bias",
        "torchvision": "classifier.1.bias",
        "plain_pytorch": "head.classifier.bias",
    },
}
V1_B0 = {
    "params/blocks_0/depthwise_bn/scale": {
        "timm": "blocks.0.0.bn1.weight",
        "torchvision": "features.1.0.block.0.1.weight",
        "efficientnet_pytorch": "_blocks.0._bn1.weight",
    },
    "params/blocks_0/project_conv/kernel": {
        "timm": "blocks.0.0.conv_pw.weight",
        "torchvision": "features.1.0.block.2.0.weight",
        "efficientnet_pytorch": "_blocks.0._project_conv.weight",
    },
    "params/blocks_1/expand_conv/kernel": {
        "timm": "blocks.1.0.conv_pw.weight",
        "torchvision": "features.2.0.block.0.0.weight",
        "efficientnet_pytorch": "_blocks.1._expand_conv.weight",
    },
    "params/head_bn/scale": {
        "timm": "bn2.weight",
        "torchvision": "features.8.1.weight",
        "efficientnet_pytorch": "_bn1.weight",
    },
    "params/classifier/kernel": {
        "timm": "classifier.weight",
        "torchvision": "classifier.1.weight",
        "efficientnet_pytorch": "_fc.weight",
    },
}
# Blocks 0, 3, 7 and 13 are the first of a row.
RESNET50 = {
    "params/stem_conv/kernel": {"torchvision": "conv1.weight"},
    "batch_stats/stem_bn/mean": {"torchvision": "bn1.running_mean"},
    "params/blocks_0/reduce_conv/kernel": {"torchvision": "layer1.0.conv1.weight"},
    "params/shortcut_0/conv/kernel": {"torchvision": "layer1.0.downsample.0.weight"},
    "params/blocks_3/spatial_conv/kernel": {"torchvision": "layer2.0.conv2.weight"},
    "params/shortcut_3/bn/scale": {"torchvision": "layer2.0.downsample.1.weight"},
    "params/blocks_15/project_bn/bias": {"torchvision": "layer4.2.bn3.bias"},
    "params/classifier/kernel": {"torchvision": "fc.weight"},
}


@pytest.mark.parametrize(
    ("variant", "examples"),
    [("efficientnetv2-s", S), ("efficientnet-b0", V1_B0), ("resnet50", RESNET50)],
)
def test_names_are_those_of_the_libraries(variant, examples):
    spec = get_spec(variant)
    for ours, names in examples.items():
        for layout, expected in names.items():
            entries = SOURCES[layout].layout(spec).entries(spec)
            (theirs,) = [entry.theirs for entry in entries if entry.ours == ours]
            assert theirs == expected, (layout, ours)


def test_efficientnet_pytorch_has_no_fused_blocks():
    with pytest.raises(InputError, match="no Fused-MBConv: take it for efficientnet-b0"):
        SOURCES["efficientnet_pytorch"].entries("efficientnet_pytorch", "efficientnetv2-b0")


def test_safetensors_as_float32_with_counters_as_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    half = np.array([1.5, -2.0], np.float16)
    save_file({"a.weight": half, "a.num_batches_tracked": np.array(7)}, path)
    tensors = read_state_dict(path)
    assert tensors["a.weight"].dtype == np.float32
    np.testing.assert_array_equal(tensors["a.weight"], [1.5, -2.0])


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_weights_that_are_no_fractions_are_refused(tmp_path, dtype):
    # Quantised weights mean nothing without their scales.
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": np.ones(3, dtype)}, path)
    with pytest.raises(InputError, match=rf"'a.weight' in .* is of type {np.dtype(dtype)}, and"):
        read_state_dict(path)


@pytest.mark.parametrize("length", [0, 4, 40, 300])
def test_a_truncated_safetensors_file(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save_file({f"layer{i}.weight": np.ones((10, 10), np.float32) for i in range(3)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"a.safetensors' cannot be read \(.+\): fetch it again"):
        read_state_dict(path)


def test_a_header_that_promises_too_much(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="cannot be read"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(InputError, match=r"is not a file: name a .safetensors or .pth file"):
        read_state_dict(tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_a_pickle_without_pytorch(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"anything")
    with pytest.raises(InputError, match="PyTorch is not installed: run `pip install torch`"):
        read_state_dict(tmp_path / "a.pth")


class FakeTensor:
    def detach(self):
        return self


def test_a_state_dict_inside_a_checkpoint():
    weight, average = FakeTensor(), FakeTensor()
    state = {"epoch": 3, "state_dict": {"module.a": weight}, "optimizer": {"a": average}}
    assert _unwrap(state) == {"a": weight}
    # The average is preferred, and a wrapper may stand in a wrapper.
    state["model_ema"] = {"model": {"a": average, "note": "text"}}
    assert _unwrap(state) == {"a": average}
    # `module.` is only a prefix where all names have it.
    assert set(_unwrap({"module.a": weight, "b": weight})) == {"module.a", "b"}
    for other in ([weight], "text", {}, {"note": "text"}):
        assert _unwrap(other) == {}
