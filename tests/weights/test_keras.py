"""The names of keras.applications, and the three kinds of its files."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.weights.convert import convert
from effnetv2_jax.weights.keras import keras_layout, read_keras

h5py = pytest.importorskip("h5py")

# The order of the variables in a layer of Keras, which numbers them.
ORDER = ("kernel", "gamma", "beta", "bias", "moving_mean", "moving_variance")


def names(variant):
    spec = get_spec(variant)
    return {e.ours: e.theirs for e in keras_layout(spec).entries(spec)}


def layers_of(spec, variables):
    """(layer, {tensor: value}) in the order of the network."""
    flat = flatten_dict(variables, sep="/")
    table = get_spec(spec.variant)
    layers = {}
    for entry in keras_layout(table).entries(table):
        layer, _, leaf = entry.theirs.rpartition("/")
        layers.setdefault(layer, {})[leaf] = entry.to_theirs(flat[entry.ours])
    return layers


def write_keras3(file, layers):
    """As Keras 3's `save_weights`: classes are numbered, and the variables of each layer."""
    counts = {}
    with h5py.File(file, "w") as root:
        root.create_group("layers/normalization/vars")["0"] = np.ones(3)
        for name, tensors in layers.items():
            kind = "conv2d"
            if "gamma" in tensors:
                kind = "batch_normalization"
            elif name == "predictions":
                kind = "dense"
            elif "dwconv" in name:
                kind = "depthwise_conv2d"
            number = counts.get(kind, 0)
            counts[kind] = number + 1
            group = root.create_group(f"layers/{kind}_{number}/vars".replace("_0/", "/"))
            for place, leaf in enumerate(leaf for leaf in ORDER if leaf in tensors):
                group[str(place)] = tensors[leaf]


def write_keras2(file, layers, *, whole_model=False, depthwise="dwconv2"):
    """As Keras 2's `save_weights`, or `save`, which puts the weights into a group."""
    with h5py.File(file, "w") as root:
        top = root.create_group("model_weights") if whole_model else root
        renamed = {name.replace("dwconv", depthwise): value for name, value in layers.items()}
        renamed["normalization"] = {"mean": np.zeros(3)}
        top.attrs["layer_names"] = [name.encode() for name in renamed]
        for name, tensors in renamed.items():
            group = top.create_group(name)
            weights = []
            for leaf, value in tensors.items():
                stored = f"depthwise_{leaf}" if "dwconv" in name else leaf
                weights.append(f"{name}/{stored}:0".encode())
                group[f"{name}/{stored}:0"] = value
            group.attrs["weight_names"] = weights


def check(converted, variables):
    assert (converted.missing, converted.unused) == ((), ())
    flat = flatten_dict(variables, sep="/")
    for name, value in flatten_dict(converted.variables, sep="/").items():
        np.testing.assert_array_equal(value, flat[name], err_msg=name)


def test_names_are_those_of_keras():
    s, b0 = names("efficientnetv2-s"), names("efficientnet-b0")
    assert s["params/stem_conv/kernel"] == "stem_conv/kernel"
    assert s["params/blocks_0/conv/kernel"] == "block1a_project_conv/kernel"
    assert s["params/blocks_1/bn/scale"] == "block1b_project_bn/gamma"
    assert s["params/blocks_2/expand_conv/kernel"] == "block2a_expand_conv/kernel"
    assert s["params/blocks_10/depthwise_conv/kernel"] == "block4a_dwconv/kernel"
    assert s["batch_stats/blocks_10/depthwise_bn/mean"] == "block4a_bn/moving_mean"
    assert s["params/blocks_10/se/reduce/bias"] == "block4a_se_reduce/bias"
    assert s["batch_stats/blocks_39/project_bn/var"] == "block6o_project_bn/moving_variance"
    assert s["params/head_bn/bias"] == "top_bn/beta"
    assert s["params/classifier/kernel"] == "predictions/kernel"
    assert b0["params/blocks_0/depthwise_bn/scale"] == "block1a_bn/gamma"
    assert b0["params/blocks_15/project_conv/kernel"] == "block7a_project_conv/kernel"


def test_keras_3(tmp_path, tiny_weights):
    spec, variables = tiny_weights()
    write_keras3(tmp_path / "model.weights.h5", layers_of(spec, variables))
    check(convert("keras", spec.variant, tmp_path / "model.weights.h5"), variables)


def test_keras_3_whole_model(tmp_path, tiny_weights):
    spec, variables = tiny_weights()
    memory = io.BytesIO()
    write_keras3(memory, layers_of(spec, variables))
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", memory.getvalue())
        archive.writestr("../climbing.txt", "stays inside")
    check(convert("keras", spec.variant, tmp_path / "model.keras"), variables)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.keras"]


@pytest.mark.parametrize("depthwise", ["dwconv", "dwconv2"])
@pytest.mark.parametrize("whole_model", [False, True])
def test_keras_2(tmp_path, tiny_weights, whole_model, depthwise):
    spec, variables = tiny_weights()
    path = tmp_path / "model.h5"
    write_keras2(path, layers_of(spec, variables), whole_model=whole_model, depthwise=depthwise)
    check(convert("keras", spec.variant, path), variables)


@pytest.mark.parametrize("write", [write_keras2, write_keras3])
def test_layers_left_out_and_left_over(tmp_path, tiny_weights, write):
    spec, variables = tiny_weights()
    layers = layers_of(spec, variables)
    classifier = layers.pop("predictions")
    path = tmp_path / "model.weights.h5"
    write(path, layers)
    with pytest.raises(InputError, match="params/classifier/bias is missing"):
        convert("keras", spec.variant, path)
    converted = convert("keras", spec.variant, path, allow_mismatch=True)
    assert converted.missing == ("params/classifier/bias", "params/classifier/kernel")
    # One layer more than the network has is noticed too.
    write(path, {**layers, "predictions": classifier, "stem_conv_2": {"kernel": np.ones(2)}})
    with pytest.raises(InputError, match=r"(conv2d_\d+/0|stem_conv_2/kernel) is unused"):
        convert("keras", spec.variant, path)


def test_no_file_and_no_weights(tmp_path, tiny):
    spec = get_spec(tiny)
    with pytest.raises(InputError, match=r"is not a file: name a .h5"):
        read_keras(tmp_path / "none.h5", spec)
    damaged = "is not a weights file of Keras .+ fetch it again"
    path = tmp_path / "a.h5"
    path.write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=damaged):
        read_keras(path, spec)
    with h5py.File(path, "w") as root:
        root["values"] = np.ones(3)
    with pytest.raises(InputError, match=damaged):
        read_keras(path, spec)
    with h5py.File(path, "w") as root:
        root["layers"] = np.ones(3)
    with pytest.raises(InputError, match=damaged):
        read_keras(path, spec)
    path = tmp_path / "a.keras"
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match=damaged):
        read_keras(path, spec)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(InputError, match=damaged):
        read_keras(path, spec)


def test_a_truncated_file(tmp_path, tiny_weights):
    spec, variables = tiny_weights()
    path = tmp_path / "model.weights.h5"
    write_keras3(path, layers_of(spec, variables))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is not a weights file of Keras"):
        convert("keras", spec.variant, path)
