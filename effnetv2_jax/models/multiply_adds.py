"""Multiply-adds of a network's convolutions and dense layers, counted from its own topology.

The module is traced with abstract values, so a count costs no arithmetic and cannot drift from
the network. Normalisation, activations, biases, pooling and additions do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effnetv2_jax.models.layers import Conv


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One call of a convolution or a dense layer on one image; a dense layer has 1 x 1 pixels.

    Attributes:
      name: path of the module, for instance `blocks_5/se/reduce`.
      kernel_size: side of the kernel, pixels.
      stride: the step in both directions, pixels.
      groups: 1, or the number of channels for a depthwise convolution.
      in_channels: channels of the input.
      out_channels: channels of the output.
      in_height: height of the input, pixels.
      in_width: width of the input, pixels.
      out_height: height of the output, pixels.
      out_width: width of the output, pixels.
    """

    name: str
    kernel_size: int
    stride: int
    groups: int
    in_channels: int
    out_channels: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int

    @property
    def multiply_adds(self) -> int:
        """Every tap of the kernel at every output pixel, padding included (the usual count)."""
        taps = self.kernel_size**2 * self.out_height * self.out_width
        return taps * self._channel_products

    @property
    def padding_multiply_adds(self) -> int:
        """The part of `multiply_adds` whose factor is a zero of the SAME padding."""
        rows = _taps_inside(self.in_height, self.out_height, self.kernel_size, self.stride)
        columns = _taps_inside(self.in_width, self.out_width, self.kernel_size, self.stride)
        return self.multiply_adds - rows * columns * self._channel_products

    @property
    def _channel_products(self) -> int:
        return self.in_channels // self.groups * self.out_channels


def _taps_inside(in_size: int, out_size: int, kernel_size: int, stride: int) -> int:
    """Pairs of an output pixel and a tap on the image, along one direction of SAME padding."""
    before = max((out_size - 1) * stride + kernel_size - in_size, 0) // 2
    return sum(
        0 <= position * stride + tap - before < in_size
        for position in range(out_size)
        for tap in range(kernel_size)
    )


def count_multiply_adds(model: nn.Module, image_size: int) -> tuple[LayerCost, ...]:
    """The cost of every convolution and dense layer for one image, in the order they run.

    Squeeze-excitation's two layers are 1x1 convolutions of a 1 x 1 map and are among them. The
    total, `sum(cost.multiply_adds for cost in costs)`, is what papers call FLOPs.

    Args:
      model: a network made of `Conv` and `nn.Dense`, called with images [N, H, W, 3].
      image_size: side of the square image, pixels.

    Raises:
      TypeError: another kind of layer holds a kernel, so the count would miss it.
    """
    costs: list[LayerCost] = []

    def record(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        outputs = next_call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and layer.has_variable("params", "kernel"):
            name = "/".join(layer.path)
            if not isinstance(layer, Conv | nn.Dense):
                raise TypeError(
                    f"{name} is a {type(layer).__name__}, whose multiply-adds nobody can count "
                    f"here: build it from Conv or nn.Dense, or add its rule to {__name__}."
                )
            costs.append(_layer_cost(name, layer, args[0].shape, outputs.shape))
        return outputs

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return tuple(costs)


def _layer_cost(
    name: str, layer: Conv | nn.Dense, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> LayerCost:
    kernel_shape: tuple[int, ...] = layer.get_variable("params", "kernel").shape
    is_conv = isinstance(layer, Conv)
    in_channels = in_shape[-1]
    return LayerCost(
        name=name,
        kernel_size=kernel_shape[0] if is_conv else 1,
        stride=layer.stride if is_conv else 1,
        groups=in_channels // kernel_shape[-2],
        in_channels=in_channels,
        out_channels=out_shape[-1],
        in_height=in_shape[1] if is_conv else 1,
        in_width=in_shape[2] if is_conv else 1,
        out_height=out_shape[1] if is_conv else 1,
        out_width=out_shape[2] if is_conv else 1,
    )
