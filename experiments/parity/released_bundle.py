"""Writes the weights of `plain_pytorch.py` as a TensorFlow 1 checkpoint with the released names.

The names are written down here by hand, from automl efficientnetv2/effnetv2_model.py, and know
nothing of `effnetv2_jax.weights.released`, which they test.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

EMA = "/ExponentialMovingAverage"
_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_BN = "tpu_batch_normalization"
# (convolution of the plain network, its released name, the released name of its normalisation).
_FUSED_1 = [("project_conv", "conv2d", _BN)]
_FUSED = [("expand_conv", "conv2d", _BN), ("project_conv", "conv2d_1", f"{_BN}_1")]
_MBCONV_1 = [("dwconv", "depthwise_conv2d", _BN), ("project_conv", "conv2d", f"{_BN}_1")]
_MBCONV = [
    ("expand_conv", "conv2d", _BN),
    ("dwconv", "depthwise_conv2d", f"{_BN}_1"),
    ("project_conv", "conv2d_1", f"{_BN}_2"),
]


def released_names(state: Mapping[str, np.ndarray], variant: str) -> dict[str, np.ndarray]:
    """The tensors of a plain state dict under the released names and in TensorFlow's axes."""
    tensors: dict[str, np.ndarray] = {}

    def add(plain: str, conv: str, norm: str) -> None:
        kernel = state[f"{plain}.conv.weight"]
        if conv.endswith("depthwise_conv2d"):
            # [C, 1, kh, kw] -> [kh, kw, C, 1].
            tensors[f"{conv}/depthwise_kernel"] = kernel.transpose(2, 3, 0, 1)
        else:
            tensors[f"{conv}/kernel"] = kernel.transpose(2, 3, 1, 0)
        for theirs, name in _NORM.items():
            tensors[f"{norm}/{name}"] = state[f"{plain}.bn.{theirs}"]

    add("stem", "stem/conv2d", f"stem/{_BN}")
    num_blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(num_blocks):
        plain, released = f"blocks.{index}", f"blocks_{index}"
        expands = f"{plain}.expand_conv.conv.weight" in state
        is_fused = f"{plain}.dwconv.conv.weight" not in state
        kind = {
            (True, False): _FUSED_1,
            (True, True): _FUSED,
            (False, False): _MBCONV_1,
            (False, True): _MBCONV,
        }[is_fused, expands]
        for part, conv, norm in kind:
            add(f"{plain}.{part}", f"{released}/{conv}", f"{released}/{norm}")
        if not is_fused:
            for part, name in (("conv_reduce", "conv2d"), ("conv_expand", "conv2d_1")):
                kernel = state[f"{plain}.se.{part}.weight"]
                tensors[f"{released}/se/{name}/kernel"] = kernel.transpose(2, 3, 1, 0)
                tensors[f"{released}/se/{name}/bias"] = state[f"{plain}.se.{part}.bias"]
    add("head.project_conv", "head/conv2d", f"head/{_BN}")
    tensors["head/dense/kernel"] = state["head.classifier.weight"].T
    tensors["head/dense/bias"] = state["head.classifier.bias"]
    return {f"{variant}/{name}": value for name, value in tensors.items()}


def write_bundle(prefix: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `prefix`.index and .data, and the file `checkpoint` that names them.

    The averages are right, and the plain tensors under the same names are not: a reader that
    takes those gets other logits. The optimizer's slots are there too, as in a raw checkpoint.
    """
    everything: dict[str, np.ndarray] = {"global_step": np.array(1, np.int64)}
    for name, value in tensors.items():
        everything[name + EMA] = value
        everything[name] = 1.25 * value + 0.1
        everything[f"{name}/RMSProp"] = np.ones_like(value)
        everything[f"{name}/RMSProp_1"] = np.zeros_like(value)
    save_tensors(prefix, everything)
    (prefix.parent / "checkpoint").write_text(f'model_checkpoint_path: "{prefix.name}"\n')


def save_tensors(prefix: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a bundle with exactly these tensors."""
    from effnetv2_jax.data.host_tf import tf

    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(np.ascontiguousarray(tensors[name])) for name in names],
    )
