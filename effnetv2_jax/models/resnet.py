"""ResNet-50 and ResNet-152, the other networks that progressive learning is tried on (Table 12).

He et al. 2015, "Deep residual learning for image recognition", Table 1; a bottleneck that halves
the resolution does so in its 3x3 convolution, as torchvision's and most others' do ("v1.5").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from effnetv2_jax.models import specs
from effnetv2_jax.models.network import Network


class Bottleneck(nn.Module):
    """1x1 reduction, 3x3 convolution, 1x1 projection."""

    block: specs.Block
    conv: Any
    norm: Any
    act: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), out_filters]."""
        block = self.block
        filters = block.out_filters // block.expansion
        x = self.conv(filters, name="reduce_conv")(images)
        x = self.act(self.norm(name="reduce_bn")(x))
        x = self.conv(filters, block.kernel_size, block.stride, name="spatial_conv")(x)
        x = self.act(self.norm(name="spatial_bn")(x))
        x = self.conv(block.out_filters, name="project_conv")(x)
        # Every block begins as its shortcut (Goyal et al. 2017, section 5.1).
        return self.norm(scale_init=nn.initializers.zeros, name="project_bn")(x)


class Projection(nn.Module):
    """The shortcut of a block that changes the shape: a strided 1x1 convolution."""

    block: specs.Block
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), out_filters]."""
        x = self.conv(self.block.out_filters, 1, self.block.stride, name="conv")(images)
        return self.norm(name="bn")(x)


class ResNet(Network):
    """Bottlenecks after a 7x7 stem and a maximum pooling; it has no head."""

    OPERATIONS: ClassVar[Mapping[specs.Operation, Any]] = {"bottleneck": Bottleneck}

    @property
    def total_stride(self) -> int:
        """Image pixels per pixel of the last feature map; the pooling halves too."""
        return 2 * super().total_stride

    @nn.nowrap
    def stem(self, images: jax.Array, conv: Any, norm: Any, act: Any) -> list[jax.Array]:
        """A strided 7x7 convolution, then the maxima of 3x3 windows at every second pixel."""
        filters = self.spec.scaled_end(self.spec.stem_filters)
        x = conv(filters, 7, self.stem_stride, name="stem_conv")(images)
        x = act(norm(name="stem_bn")(x))
        pads: Any = "SAME" if self.padding == "same" else ((1, 1), (1, 1))
        return [x, nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)]

    @nn.nowrap
    def shortcut(
        self, block: specs.Block, index: int, inputs: jax.Array, conv: Any, norm: Any
    ) -> jax.Array | None:
        """The input, projected where the block changes its shape."""
        if block.has_skip:
            return inputs
        projected: jax.Array = Projection(block, conv, norm, name=f"shortcut_{index}")(inputs)
        return projected

    @nn.nowrap
    def after_block(self, outputs: jax.Array, act: Any) -> jax.Array:
        """The activation."""
        activated: jax.Array = act(outputs)
        return activated

    @nn.nowrap
    def head(self, inputs: jax.Array, conv: Any, norm: Any, act: Any) -> jax.Array:
        """Nothing."""
        del conv, norm, act
        return inputs
