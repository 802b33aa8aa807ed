"""The layers that EfficientNetV2 is made of.

Random draws are keyed by (rng, position of the example in the global batch), so one device
and eight, one micro-batch and four draw the same numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effnetv2_jax.models.convolutions import convolution
from effnetv2_jax.models.specs import Rate

Initializer = Callable[..., jax.Array]


def conv_init(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, depthwise: bool = False
) -> jax.Array:
    """Normal, variance 2 / (kh * kw * filters) (automl efficientnetv2/effnetv2_model.py).

    The released depthwise kernel is [kh, kw, C, 1], whose last dimension is 1, so a depthwise
    kernel (here [kh, kw, 1, C]) has variance 2 / (kh * kw) whatever its width.
    """
    kernel_height, kernel_width, _, out_filters = shape
    fan_out = kernel_height * kernel_width * (1 if depthwise else out_filters)
    return math.sqrt(2.0 / fan_out) * jax.random.normal(key, shape, dtype)


def classifier_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform within 1 / sqrt(classes) of 0 (automl efficientnetv2/effnetv2_model.py)."""
    limit = 1.0 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Conv(nn.Module):
    """A padded convolution, lowered per platform; kernel [kh, kw, C / groups, C_out]."""

    filters: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    use_bias: bool = False
    dtype: Any = jnp.float32
    padding: str = "same"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), filters]."""
        in_filters = images.shape[-1]
        groups = in_filters if self.depthwise else 1
        shape = (self.kernel_size, self.kernel_size, in_filters // groups, self.filters)
        init = functools.partial(conv_init, depthwise=self.depthwise)
        kernel = self.param("kernel", init, shape)
        outputs = convolution(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            groups=groups,
            padding=self.padding,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.filters,))
            outputs += bias.astype(self.dtype)
        return outputs


class BatchNorm(nn.Module):
    """Batch normalisation over N, H and W; variables as those of `nn.BatchNorm`.

    Statistics are float32 and normalising is one multiply-add with two numbers a channel. The
    TPU compiler needs a tenth less memory for a step than with `nn.BatchNorm`, which
    subtracts the mean first (experiments/tpu_compile/levers.csv).

    Attributes:
      use_running_average: whether the running statistics normalise, and stay.
      decay: weight of the old value in the running statistics.
      epsilon: added to the variance.
      dtype: of the result.
      axis_name: the replica axis, along which statistics are shared (None: they are not).
      axis_index_groups: the replicas that share them; None: all.
      scale_init: of the scale.
    """

    use_running_average: bool
    decay: float
    epsilon: float
    dtype: Any = jnp.float32
    axis_name: str | None = None
    axis_index_groups: list[list[int]] | None = None
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to the same shape."""
        shape = (inputs.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        values = inputs.astype(jnp.float32)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            axes = (0, 1, 2)
            moments = jnp.stack([jnp.mean(values, axes), jnp.mean(jnp.square(values), axes)])
            if self.axis_name is not None and not self.is_initializing():
                moments = lax.pmean(
                    moments, self.axis_name, axis_index_groups=self.axis_index_groups
                )
            mean = moments[0]
            # Rounding may leave a constant channel just below 0.
            var = jnp.maximum(moments[1] - jnp.square(mean), 0.0)
            if not self.is_initializing():
                rest = 1.0 - self.decay
                running_mean.value = self.decay * running_mean.value + rest * mean
                running_var.value = self.decay * running_var.value + rest * var
        factor = scale * lax.rsqrt(var + self.epsilon)
        return self.normalise(values, factor, bias - mean * factor)

    def normalise(self, values: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
        """One multiply-add of float32 [N, H, W, C] with [C] numbers."""
        return (values * factor + offset).astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means; both layers are biased."""

    squeeze_filters: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to the same shape."""
        gate = jnp.mean(images, axis=(1, 2), keepdims=True)
        gate = Conv(self.squeeze_filters, use_bias=True, dtype=self.dtype, name="reduce")(gate)
        gate = nn.silu(gate)
        gate = Conv(images.shape[-1], use_bias=True, dtype=self.dtype, name="expand")(gate)
        return images * nn.sigmoid(gate)


def batch_positions(count: int, axis_name: str | None) -> jax.Array:
    """Positions [count] of this device's examples in the global batch."""
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * count
    return offset + jnp.arange(count)


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """One key for each example, by its position in the global batch."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def example_uniforms(key: jax.Array, positions: jax.Array, draws: int) -> jax.Array:
    """Uniform numbers [N, draws] in [0, 1) for the examples at `positions` [N].

    They are float32 in every compute type: compared in bfloat16, a keep probability of 0.995
    turns out as 0.992 (measured in the released code).
    """
    keys = example_keys(key, positions)
    return jax.vmap(lambda k: jax.random.uniform(k, (draws,)))(keys)


def drop(inputs: jax.Array, draws: jax.Array, rate: Rate) -> jax.Array:
    """Zeroes entries with probability `rate` and divides the rest by the probability to stay.

    Unlike `nn.Dropout` it takes a traced rate, so that a new rate compiles nothing.

    Args:
      inputs: the values.
      draws: uniform numbers of a shape that broadcasts to the inputs: [N, C] drops features,
        [N, 1, 1, 1] whole examples (stochastic depth, Huang et al. 2016).
      rate: the probability of dropping, in [0, 1).
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    return inputs * jnp.where(draws < keep, 1.0 / keep, 0.0).astype(inputs.dtype)
