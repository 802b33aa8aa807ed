"""The four layouts of PyTorch state dicts, and reading their files without running pickles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import Spec
from effnetv2_jax.weights.layout import Layer, Layout, Tensors

_PARAMETERS = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# PyTorch: [out, in, kh, kw] and [out, in]; a depthwise kernel is [C, 1, kh, kw].
_CONV_AXES = (2, 3, 1, 0)
# What files hold beside the tensors of the network: counters, and losses' or averages' own.
IGNORED_SUFFIXES = (".num_batches_tracked",)
# Where training scripts put the state dict inside their checkpoint, the averaged one first.
_WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model")


def _layout(layer_name: Callable[[Layer], str]) -> Layout:
    return Layout(
        layer_name,
        {"conv": _PARAMETERS, "depthwise": _PARAMETERS, "dense": _PARAMETERS, "norm": _NORM},
        separator=".",
        axes={"conv": _CONV_AXES, "depthwise": _CONV_AXES, "dense": (1, 0)},
    )


# The roles of a block, by its operation and whether it expands (pytorch-image-models
# timm/models/_efficientnet_blocks.py: ConvBnAct, EdgeResidual, DepthwiseSeparableConv,
# InvertedResidual).
_SE = {"se/reduce": "se.conv_reduce", "se/expand": "se.conv_expand"}
_TIMM_BLOCKS: dict[tuple[str, bool], dict[str, str]] = {
    ("fused", False): {"conv": "conv", "bn": "bn1"},
    ("fused", True): {
        "expand_conv": "conv_exp",
        "expand_bn": "bn1",
        "project_conv": "conv_pwl",
        "project_bn": "bn2",
        **_SE,
    },
    ("mbconv", False): {
        "depthwise_conv": "conv_dw",
        "depthwise_bn": "bn1",
        "project_conv": "conv_pw",
        "project_bn": "bn2",
        **_SE,
    },
    ("mbconv", True): {
        "expand_conv": "conv_pw",
        "expand_bn": "bn1",
        "depthwise_conv": "conv_dw",
        "depthwise_bn": "bn2",
        "project_conv": "conv_pwl",
        "project_bn": "bn3",
        **_SE,
    },
}
_TIMM_ENDS = {
    "stem_conv": "conv_stem",
    "stem_bn": "bn1",
    "head_conv": "conv_head",
    "head_bn": "bn2",
    "classifier": "classifier",
}


def _timm_name(layer: Layer) -> str:
    if layer.block is None:
        return _TIMM_ENDS[layer.role]
    names = _TIMM_BLOCKS[layer.block.operation, layer.block.expansion != 1]
    return f"blocks.{layer.block.row}.{layer.block.repeat}.{names[layer.role]}"


def _torchvision_efficientnet(num_rows: int) -> Layout:
    ends = {
        "stem_conv": "features.0.0",
        "stem_bn": "features.0.1",
        "head_conv": f"features.{num_rows + 1}.0",
        "head_bn": f"features.{num_rows + 1}.1",
        "classifier": "classifier.1",
    }

    def name(layer: Layer) -> str:
        """torchvision/models/efficientnet.py: MBConv and FusedMBConv are lists of sub-blocks."""
        block = layer.block
        if block is None:
            return ends[layer.role]
        parts = [] if block.expansion == 1 else ["expand"]
        parts += ["depthwise"] if block.operation == "mbconv" else []
        parts += ["se"] if block.squeeze_filters is not None else []
        if block.operation == "fused" and block.expansion == 1:
            place = {"conv": "0.0", "bn": "0.1"}[layer.role]
        elif layer.role.startswith("se/"):
            place = f"{parts.index('se')}.{'fc1' if layer.role == 'se/reduce' else 'fc2'}"
        else:
            part, _, what = layer.role.partition("_")
            place = f"{[*parts, 'project'].index(part)}.{0 if what == 'conv' else 1}"
        return f"features.{block.row + 1}.{block.repeat}.block.{place}"

    return _layout(name)


_RESNET_ENDS = {"stem_conv": "conv1", "stem_bn": "bn1", "classifier": "fc"}
_RESNET_ROLES = {
    "reduce_conv": "conv1",
    "reduce_bn": "bn1",
    "spatial_conv": "conv2",
    "spatial_bn": "bn2",
    "project_conv": "conv3",
    "project_bn": "bn3",
    "conv": "downsample.0",
    "bn": "downsample.1",
}


def _resnet_name(layer: Layer) -> str:
    """torchvision/models/resnet.py."""
    block = layer.block
    if block is None:
        return _RESNET_ENDS[layer.role]
    return f"layer{block.row + 1}.{block.repeat}.{_RESNET_ROLES[layer.role]}"


_LUKEMELAS_ENDS = {
    "stem_conv": "_conv_stem",
    "stem_bn": "_bn0",
    "head_conv": "_conv_head",
    "head_bn": "_bn1",
    "classifier": "_fc",
}
_LUKEMELAS_ROLES = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_bn": "_bn1",
    "se/reduce": "_se_reduce",
    "se/expand": "_se_expand",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}


def _lukemelas_name(layer: Layer) -> str:
    """efficientnet_pytorch/model.py."""
    if layer.block is None:
        return _LUKEMELAS_ENDS[layer.role]
    if layer.block.operation == "fused":
        raise InputError(
            "the layout efficientnet_pytorch has no Fused-MBConv: take it for efficientnet-b0 to "
            "b7 and lite0 to lite4."
        )
    return f"_blocks.{layer.index}.{_LUKEMELAS_ROLES[layer.role]}"


_PLAIN_ENDS = {
    "stem_conv": "stem.conv",
    "stem_bn": "stem.bn",
    "head_conv": "head.project_conv.conv",
    "head_bn": "head.project_conv.bn",
    "classifier": "head.classifier",
}
_PLAIN_ROLES = {
    # A fused block that does not expand has its only convolution called a projection.
    "conv": "project_conv.conv",
    "bn": "project_conv.bn",
    "expand_conv": "expand_conv.conv",
    "expand_bn": "expand_conv.bn",
    "depthwise_conv": "dwconv.conv",
    "depthwise_bn": "dwconv.bn",
    "se/reduce": "se.conv_reduce",
    "se/expand": "se.conv_expand",
    "project_conv": "project_conv.conv",
    "project_bn": "project_conv.bn",
}


def _plain_name(layer: Layer) -> str:
    if layer.block is None:
        return _PLAIN_ENDS[layer.role]
    return f"blocks.{layer.index}.{_PLAIN_ROLES[layer.role]}"


def timm_layout(spec: Spec) -> Layout:
    """timm's `tf_efficientnet*` models."""
    del spec
    return _layout(_timm_name)


def torchvision_layout(spec: Spec) -> Layout:
    """torchvision's models; those of timm's ResNets are the same."""
    if spec.family == "resnet":
        return _layout(_resnet_name)
    return _torchvision_efficientnet(len(spec.rows))


def efficientnet_pytorch_layout(spec: Spec) -> Layout:
    """The package efficientnet_pytorch and those that are made after it."""
    del spec
    return _layout(_lukemelas_name)


def plain_pytorch_layout(spec: Spec) -> Layout:
    """The re-implementation with `stem`, `blocks` in one list, and `head`."""
    del spec
    return _layout(_plain_name)


def read_state_dict(path: str | os.PathLike[str]) -> Tensors:
    """Reads a state dict from a .safetensors, .pth, .pt or .bin file.

    A pickle is only read as tensors: one that asks for anything else is refused, not run.

    Raises:
      InputError: the file is missing, truncated, malicious, or holds no state dict.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise InputError(f"{name!r} is not a file: name a .safetensors or .pth file.")
    if name.endswith(".safetensors"):
        return read_safetensors(name)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{name!r} is a PyTorch file, and PyTorch is not installed: run `pip install torch`, "
            "or give a .safetensors file."
        ) from error
    try:
        loaded = torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on with advice that would run the file.
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        raise InputError(
            f"{name!r} is not a file of plain tensors and was not run ({reason}): save "
            "model.state_dict() alone and give that."
        ) from error
    except Exception as error:  # PyTorch raises RuntimeError, EOFError, ValueError and others.
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(f"{name!r} cannot be read ({reason}): fetch it again.") from error
    state = _unwrap(loaded)
    if not state:
        raise InputError(f"{name!r} holds no state dict: save model.state_dict() and give that.")
    for key, value in state.items():
        if not value.is_floating_point() and not key.endswith(IGNORED_SUFFIXES):
            raise _wrong_type(key, name, value.dtype)
    return {key: value.detach().cpu().float().numpy() for key, value in state.items()}


def _wrong_type(key: str, name: str, dtype: Any) -> InputError:
    return InputError(
        f"{key!r} in {name!r} is of type {dtype}, and weights are fractions: give float32 weights, "
        "not quantised ones."
    )


def _unwrap(loaded: Any) -> dict[str, Any]:
    """The tensors of a state dict, which may stand inside a training script's checkpoint."""
    if not isinstance(loaded, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            return _unwrap(loaded[wrapper])
    tensors = {key: value for key, value in loaded.items() if hasattr(value, "detach")}
    # DistributedDataParallel puts its own name before each.
    prefix = "module."
    if tensors and all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads a safetensors file as float32; a truncated one is an `InputError`."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    tensors = {}
    try:
        with safe_open(name, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                value = file.get_tensor(key)
                # ml_dtypes' bfloat16 is no np.floating, and its kind is "V".
                is_real = value.dtype.kind == "f" or value.dtype.name == "bfloat16"
                if not is_real and not key.endswith(IGNORED_SUFFIXES):
                    raise _wrong_type(key, name, value.dtype)
                tensors[key] = value.astype(np.float32)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(f"{name!r} cannot be read ({reason}): fetch it again.") from error
    return tensors
