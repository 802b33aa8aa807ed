"""The released TensorFlow 1 checkpoints (automl efficientnetv2, and EfficientNet V1's)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import Spec
from effnetv2_jax.weights.layout import Layer, Layout, Tensors

_EMA = "/ExponentialMovingAverage"
# The optimizer's slots and counters, which raw training checkpoints hold as well.
_IGNORED = re.compile(r"(^|/)(RMSProp(_\d+)?|Momentum|global_step|save_counter|_CHECKPOINTABLE.*)$")
_PARAMETERS = {"kernel": "kernel", "bias": "bias"}
_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
_ENDS = {
    "stem_conv": "stem/conv2d",
    "stem_bn": "stem/tpu_batch_normalization",
    "head_conv": "head/conv2d",
    "head_bn": "head/tpu_batch_normalization",
    "classifier": "head/dense",
}


def _name(layer: Layer) -> str:
    """effnetv2_model.py: Keras numbers the layers of a block in the order of their creation."""
    block = layer.block
    if block is None:
        return _ENDS[layer.role]
    if layer.role.startswith("se/"):
        name = "se/conv2d" if layer.role == "se/reduce" else "se/conv2d_1"
    elif layer.kind == "depthwise":
        name = "depthwise_conv2d"
    else:
        parts = [] if block.expansion == 1 else ["expand"]
        if layer.kind == "norm" and block.operation == "mbconv":
            parts.append("depthwise")
        part = layer.role.partition("_")[0]
        number = parts.index(part) if part in parts else len(parts)
        kind = "conv2d" if layer.kind == "conv" else "tpu_batch_normalization"
        name = f"{kind}_{number}" if number else kind
    return f"blocks_{layer.index}/{name}"


def released_layout(spec: Spec) -> Layout:
    """The names behind the prefix, which is the variant's."""
    del spec
    return Layout(
        _name,
        {
            "conv": _PARAMETERS,
            "depthwise": {"kernel": "depthwise_kernel"},
            "dense": _PARAMETERS,
            "norm": _NORM,
        },
        separator="/",
        # A depthwise kernel is [kh, kw, C, 1].
        axes={"depthwise": (0, 1, 3, 2)},
    )


def read_tf_checkpoint(path: str | os.PathLike[str]) -> Tensors:
    """Reads a TF1 bundle, the moving averages wherever there are any.

    Args:
      path: the folder that holds `checkpoint`, or the bundle's name without `.index`.

    Returns:
      Tensors by their names without the variant's prefix and without the averages' suffix.

    Raises:
      InputError: there is no bundle, it is damaged, or only a part of it is averaged.
    """
    from effnetv2_jax.data.host_tf import tf

    bundle = _find_bundle(Path(path))
    try:
        reader = tf.train.load_checkpoint(bundle)
        names = list(reader.get_variable_to_shape_map())
        averaged = {name.removesuffix(_EMA) for name in names if name.endswith(_EMA)}
        plain = {n for n in names if not n.endswith(_EMA) and not _IGNORED.search(n)}
        not_averaged = sorted(plain - averaged)
        if averaged and not_averaged:
            raise InputError(
                f"{bundle!r} has no moving average of {not_averaged[0]} (and of "
                f"{len(not_averaged) - 1} more tensors): give a checkpoint with all or none."
            )
        # Some files hold the averages alone.
        tensors = {
            n: np.asarray(reader.get_tensor(n + _EMA * (n in averaged)))
            for n in sorted(plain | averaged)
        }
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        # IndexError: "Read less bytes than requested".
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(f"{bundle!r} cannot be read ({reason}): fetch it again.") from error
    return {_without_prefix(name): value.astype(np.float32) for name, value in tensors.items()}


def _without_prefix(name: str) -> str:
    match = re.search(r"(?:^|/)((?:stem|blocks_\d+|head)/.*)$", name)
    return match[1] if match else name


def _find_bundle(path: Path) -> str:
    # "." has no name.
    if path.name and path.with_name(path.name + ".index").is_file():
        return str(path)
    if path.name.endswith(".index") and path.is_file():
        return str(path).removesuffix(".index")
    bundles = sorted(path.glob("*.index")) if path.is_dir() else []
    state = path / "checkpoint"
    if state.is_file():
        named = re.search(r'^model_checkpoint_path:\s*"([^"]+)"', state.read_text(errors="replace"))
        # Of an absolute or climbing path only the name counts: the bundle lies beside this file.
        bundles = [b for b in bundles if named and b.stem == Path(named[1]).name] or bundles
    if len(bundles) == 1:
        return str(bundles[0]).removesuffix(".index")
    found = ", ".join(b.name for b in bundles[:3]) or "none"
    raise InputError(
        f"{str(path)!r} holds {len(bundles)} TensorFlow checkpoints ({found}): name one, without "
        "its .index."
    )
