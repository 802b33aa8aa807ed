"""How a foreign file names and orders the tensors of our networks.

A `Layout` is a name for each layer and an order of axes for each kind of tensor. From it follow
both directions: reading a foreign file and writing one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from effnetv2_jax.models.specs import Block, Spec, unroll

Kind = Literal["conv", "depthwise", "norm", "dense"]
Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with weights.

    Attributes:
      path: in our variables, for instance `blocks_3/se/reduce`.
      kind: what it computes.
      has_bias: of convolutions and the classifier.
      block: the block that it belongs to; None for stem, head and classifier.
      index: of that block in the network.
    """

    path: str
    kind: Kind
    has_bias: bool = False
    block: Block | None = None
    index: int = -1

    @property
    def role(self) -> str:
        """The path within its block, or the whole path outside of one."""
        return self.path if self.block is None else self.path.partition("/")[2]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of its tensors in our variables."""
        if self.kind == "norm":
            return ("scale", "bias", "mean", "var")
        return ("kernel", "bias") if self.has_bias else ("kernel",)


def list_layers(spec: Spec) -> tuple[Layer, ...]:
    """The layers of a variant in the order in which an image passes them."""
    layers = [Layer("stem_conv", "conv"), Layer("stem_bn", "norm")]
    for index, block in enumerate(unroll(spec)):
        for role, kind in _block_layers(block):
            layers.append(Layer(f"blocks_{index}/{role}", kind, "se/" in role, block, index))
        if block.operation == "bottleneck" and not block.has_skip:
            layers.append(Layer(f"shortcut_{index}/conv", "conv", block=block, index=index))
            layers.append(Layer(f"shortcut_{index}/bn", "norm", block=block, index=index))
    head = [Layer("head_conv", "conv"), Layer("head_bn", "norm")] if spec.head_filters else []
    return (*layers, *head, Layer("classifier", "dense", has_bias=True))


def _block_layers(block: Block) -> list[tuple[str, Kind]]:
    if block.operation == "fused" and block.expansion == 1:
        return [("conv", "conv"), ("bn", "norm")]
    layers: list[tuple[str, Kind]] = []
    if block.operation == "bottleneck":
        layers += [("reduce_conv", "conv"), ("reduce_bn", "norm")]
        layers += [("spatial_conv", "conv"), ("spatial_bn", "norm")]
    elif block.expansion != 1:
        layers += [("expand_conv", "conv"), ("expand_bn", "norm")]
    if block.operation == "mbconv":
        layers += [("depthwise_conv", "depthwise"), ("depthwise_bn", "norm")]
    if block.squeeze_filters is not None:
        layers += [("se/reduce", "conv"), ("se/expand", "conv")]
    return [*layers, ("project_conv", "conv"), ("project_bn", "norm")]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: our name, the foreign one, and the axes that turn theirs into ours."""

    ours: str
    theirs: str
    axes: tuple[int, ...] | None = None

    def from_theirs(self, value: np.ndarray) -> np.ndarray:
        """The foreign tensor in our order of axes."""
        return value if self.axes is None else np.transpose(value, self.axes)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our tensor in the foreign order of axes."""
        if self.axes is None:
            return value
        return np.ascontiguousarray(np.transpose(value, np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and axes of a foreign file.

    Attributes:
      layer_name: the foreign name of a layer.
      leaf_names: for each kind of layer, our name of a tensor -> the foreign one.
      separator: between the names of layer and tensor.
      axes: for each kind of layer, the foreign axes of the kernel in our order.
    """

    layer_name: Callable[[Layer], str]
    leaf_names: Mapping[Kind, Mapping[str, str]]
    separator: str
    axes: Mapping[Kind, tuple[int, ...]]

    def entries(self, spec: Spec) -> tuple[Entry, ...]:
        """Every tensor of a variant."""
        return tuple(
            Entry(
                _our_name(layer, leaf),
                self.layer_name(layer) + self.separator + self.leaf_names[layer.kind][leaf],
                self.axes.get(layer.kind) if leaf == "kernel" else None,
            )
            for layer in list_layers(spec)
            for leaf in layer.leaves
        )


def _our_name(layer: Layer, leaf: str) -> str:
    collection = "batch_stats" if leaf in ("mean", "var") else "params"
    return f"{collection}/{layer.path}/{leaf}"
