"""Weights files of `keras.applications`: Keras 2's .h5, Keras 3's .weights.h5 and .keras."""

from __future__ import annotations

import collections
import io
import os
import zipfile
from typing import Any

import numpy as np

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import Spec
from effnetv2_jax.weights.layout import Layer, Layout, Tensors, list_layers

_PARAMETERS = {"kernel": "kernel", "bias": "bias"}
_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
_ENDS = {
    "stem_conv": "stem_conv",
    "stem_bn": "stem_bn",
    "head_conv": "top_conv",
    "head_bn": "top_bn",
    "classifier": "predictions",
}
_ROLES = {
    "conv": "project_conv",
    "bn": "project_bn",
    "depthwise_bn": "bn",
    "se/reduce": "se_reduce",
    "se/expand": "se_expand",
}
# How Keras 3 calls the classes of layers in .weights.h5.
_CLASSES = {
    "conv": "conv2d",
    "depthwise": "depthwise_conv2d",
    "norm": "batch_normalization",
    "dense": "dense",
}


def _name(layer: Layer) -> str:
    """keras.applications efficientnet_v2.py; rows are numbered and their blocks lettered."""
    if layer.block is None:
        return _ENDS[layer.role]
    role = _ROLES.get(layer.role, layer.role)
    if role == "depthwise_conv":
        # efficientnet.py, for V1, has no 2.
        role = "dwconv"
    return f"block{layer.block.row + 1}{chr(ord('a') + layer.block.repeat)}_{role}"


def keras_layout(spec: Spec) -> Layout:
    """The names of the layers, with `dwconv` for V1's `dwconv` and V2's `dwconv2`."""
    del spec
    return Layout(
        _name,
        {"conv": _PARAMETERS, "depthwise": _PARAMETERS, "dense": _PARAMETERS, "norm": _NORM},
        separator="/",
        axes={"depthwise": (0, 1, 3, 2)},
    )


def read_keras(path: str | os.PathLike[str], spec: Spec) -> Tensors:
    """Reads a weights file; the preprocessing layers in front of the network are left out.

    Raises:
      InputError: the file is missing or is no weights file of Keras.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise InputError(f"{name!r} is not a file: name a .h5, .weights.h5 or .keras file.")
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            f"{name!r} is an HDF5 file, and h5py is not installed: run `pip install h5py`."
        ) from error
    try:
        file: Any = name
        if name.endswith(".keras"):
            with zipfile.ZipFile(name) as archive:
                # Read in memory by its one name: nothing is unpacked to the disk.
                file = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(file, "r") as root:
            if "layers" in root:
                return _read_keras3(root, spec)
            return _read_keras2(root.get("model_weights", root))
    except (OSError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # h5py has a missing group as KeyError, and a tensor in a group's place as the next two.
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(
            f"{name!r} is not a weights file of Keras ({reason}): fetch it again."
        ) from error


def _read_keras2(root: Any) -> Tensors:
    tensors = {}
    for layer_name in root.attrs["layer_names"]:
        layer = layer_name.decode() if isinstance(layer_name, bytes) else layer_name
        for weight_name in root[layer].attrs["weight_names"]:
            weight = weight_name.decode() if isinstance(weight_name, bytes) else weight_name
            leaf = weight.rpartition("/")[2].partition(":")[0].replace("depthwise_", "")
            if not layer.startswith("normalization"):
                tensors[f"{layer.replace('dwconv2', 'dwconv')}/{leaf}"] = np.asarray(
                    root[layer][weight], np.float32
                )
    return tensors


def _read_keras3(root: Any, spec: Spec) -> Tensors:
    """Keras 3 numbers the layers of each class in their order, and their variables."""
    counts: collections.Counter[str] = collections.Counter()
    leaf_names = keras_layout(spec).leaf_names
    tensors = {}
    seen = set()
    for layer in list_layers(spec):
        number = counts[layer.kind]
        counts[layer.kind] += 1
        group = _CLASSES[layer.kind] + (f"_{number}" if number else "")
        seen.add(group)
        variables = root["layers"].get(group, {}).get("vars", {})
        for place, leaf in enumerate(layer.leaves):
            if str(place) in variables:
                key = f"{_name(layer)}/{leaf_names[layer.kind][leaf]}"
                tensors[key] = np.asarray(variables[str(place)], np.float32)
    for group, content in root["layers"].items():
        if group not in seen and not group.startswith(("normalization", "rescaling")):
            for place, value in content.get("vars", {}).items():
                tensors[f"layers/{group}/{place}"] = np.asarray(value, np.float32)
    return tensors
