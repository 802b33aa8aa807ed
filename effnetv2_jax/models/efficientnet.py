"""EfficientNetV2, EfficientNet V1 and EfficientNet-Lite: topology; numbers are in `specs.py`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from effnetv2_jax.models import specs
from effnetv2_jax.models.layers import SqueezeExcite
from effnetv2_jax.models.network import Network


class FusedMBConv(nn.Module):
    """Fused-MBConv: a full convolution in place of the 1x1 and the depthwise one (Figure 2)."""

    block: specs.Block
    conv: Any
    norm: Any
    act: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), out_filters]."""
        block = self.block
        if block.expansion == 1:
            # One convolution; its activation comes before the skip is added (effnetv2_model.py).
            x = self.conv(block.out_filters, block.kernel_size, block.stride, name="conv")(images)
            return self.act(self.norm(name="bn")(x))
        filters = block.in_filters * block.expansion
        x = self.conv(filters, block.kernel_size, block.stride, name="expand_conv")(images)
        x = self.act(self.norm(name="expand_bn")(x))
        if block.squeeze_filters is not None:
            x = SqueezeExcite(block.squeeze_filters, self.conv.keywords["dtype"], name="se")(x)
        x = self.conv(block.out_filters, name="project_conv")(x)
        return self.norm(name="project_bn")(x)


class MBConv(nn.Module):
    """MBConv: 1x1 expansion, depthwise convolution, squeeze-excitation, 1x1 projection."""

    block: specs.Block
    conv: Any
    norm: Any
    act: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), out_filters]."""
        block = self.block
        filters = block.in_filters * block.expansion
        x = images
        if block.expansion != 1:
            x = self.conv(filters, name="expand_conv")(x)
            x = self.act(self.norm(name="expand_bn")(x))
        depthwise = functools.partial(self.conv, depthwise=True, name="depthwise_conv")
        x = depthwise(filters, block.kernel_size, block.stride)(x)
        x = self.act(self.norm(name="depthwise_bn")(x))
        if block.squeeze_filters is not None:
            x = SqueezeExcite(block.squeeze_filters, self.conv.keywords["dtype"], name="se")(x)
        x = self.conv(block.out_filters, name="project_conv")(x)
        return self.norm(name="project_bn")(x)


class EfficientNet(Network):
    """Inverted bottlenecks between a 3x3 stem and a 1x1 head (Table 4)."""

    OPERATIONS: ClassVar[Mapping[specs.Operation, Any]] = {"fused": FusedMBConv, "mbconv": MBConv}

    @nn.nowrap
    def stem(self, images: jax.Array, conv: Any, norm: Any, act: Any) -> list[jax.Array]:
        """A strided 3x3 convolution."""
        filters = self.spec.scaled_end(self.spec.stem_filters)
        x = conv(filters, 3, self.stem_stride, name="stem_conv")(images)
        return [act(norm(name="stem_bn")(x))]

    @nn.nowrap
    def shortcut(
        self, block: specs.Block, index: int, inputs: jax.Array, conv: Any, norm: Any
    ) -> jax.Array | None:
        """The input, of a block that keeps its shape."""
        del index, conv, norm
        return inputs if block.has_skip else None

    @nn.nowrap
    def after_block(self, outputs: jax.Array, act: Any) -> jax.Array:
        """Nothing: projections are linear."""
        del act
        return outputs

    @nn.nowrap
    def head(self, inputs: jax.Array, conv: Any, norm: Any, act: Any) -> jax.Array:
        """A 1x1 convolution."""
        filters = self.spec.scaled_end(self.spec.head_filters)
        return act(norm(name="head_bn")(conv(filters, name="head_conv")(inputs)))
