"""The EfficientNetV2 network: topology only, its numbers stand in `specs.py`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models import specs
from effnetv2_jax.models.convolutions import PADDINGS
from effnetv2_jax.models.layers import (
    BatchNorm,
    Conv,
    SqueezeExcite,
    classifier_init,
    drop,
    example_uniforms,
)


def _is_zero(rate: specs.Rate) -> bool:
    """Whether a rate is known to be 0 while tracing (a traced rate never is)."""
    return isinstance(rate, (int, float)) and rate == 0.0


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


_OPERATIONS = {"fused": FusedMBConv, "mbconv": MBConv}
_ACTIVATIONS = {"silu": nn.silu, "relu6": nn.relu6}


def _keep_reduced(primitive: Any, *_: Any, **__: Any) -> bool:
    """What rematerialisation keeps: batch statistics, so that replicas exchange them once."""
    return bool(primitive.name.startswith("psum"))


class EfficientNet(nn.Module):
    """An EfficientNetV2, EfficientNet V1 or EfficientNet-Lite; build it with `create_model`.

    Attributes:
      spec: the architecture table, coefficients included.
      num_classes: width of the logits.
      dtype: type of activations; parameters, BN statistics and logits stay float32.
      dropout_rate: head dropout, used unless a call gives its own.
      drop_path_rate: stochastic depth of the (virtual) last block, likewise.
      bn_decay: weight of the old value in the running statistics (0.99 in the paper's
        section 5.1, 0.9 in the released hparams.py).
      bn_epsilon: added to the variance (released: 1e-3).
      bn_group_size: replicas that share batch statistics, at most (None: all of them).
      axis_name: name of the replica axis when training on several devices.
      stem_stride: stride of the first convolution; 1 suits images of about 32 px.
      padding: `same` as TensorFlow, or `symmetric` as torchvision: a point of accuracy is lost
        by weights trained with the other one.
      remat_groups: in how many block groups, rows of the table from the first, the backward pass
        computes activations again instead of keeping them: less memory, more arithmetic.
    """

    spec: specs.Spec
    num_classes: int = 1000
    dtype: Any = jnp.float32
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-3
    bn_group_size: int | None = None
    axis_name: str | None = None
    stem_stride: int = 2
    padding: str = "same"
    remat_groups: int = 0

    @property
    def total_stride(self) -> int:
        """Image pixels per pixel of the last feature map."""
        stride = self.stem_stride
        for row in self.spec.rows:
            stride *= row.stride
        return stride

    def _bn_groups(self) -> list[list[int]] | None:
        if self.axis_name is None or self.bn_group_size is None or self.is_initializing():
            return None
        num_replicas = lax.axis_size(self.axis_name)
        size = min(self.bn_group_size, num_replicas)
        if num_replicas % size:
            raise InputError(
                f"model.bn_group_size {size} does not divide the {num_replicas} replicas: "
                f"choose a divisor of {num_replicas}."
            )
        if size == num_replicas:
            return None
        return [list(range(first, first + size)) for first in range(0, num_replicas, size)]

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        dropout_rate: specs.Rate | None = None,
        drop_path_rate: specs.Rate | None = None,
        positions: jax.Array | None = None,
        return_features: bool = False,
    ) -> jax.Array | dict[str, jax.Array]:
        """Classifies images.

        Args:
          images: [N, H, W, 3], normalised, of any height and width.
          train: whether batch statistics, dropout and stochastic depth are on. Training needs
            the rngs `dropout` and `drop_path` and the mutable collection `batch_stats`.
          dropout_rate: overrides the attribute; may be traced.
          drop_path_rate: overrides the attribute; may be traced.
          positions: int [N], of the images in the global batch, by which dropout and stochastic
            depth draw; None: 0 to N - 1.
          return_features: whether to return every endpoint instead of the logits alone.

        Returns:
          Float32 logits [N, num_classes], or a dict with `reduction_1` to `reduction_5` (the
          feature map before each halving of resolution, and the last), `features` (the head's
          map), `pooled` [N, C] and `logits`.
        """
        dropout_rate = self.dropout_rate if dropout_rate is None else dropout_rate
        drop_path_rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        positions = jnp.arange(images.shape[0]) if positions is None else positions
        conv = functools.partial(Conv, dtype=self.dtype, padding=self.padding)
        act = _ACTIVATIONS[self.spec.activation]
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            decay=self.bn_decay,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name if train else None,
            axis_index_groups=self._bn_groups() if train else None,
        )
        blocks = specs.unroll(self.spec)
        endpoints: dict[str, jax.Array] = {}

        x = images.astype(self.dtype)
        x = conv(blocks[0].in_filters, 3, self.stem_stride, name="stem_conv")(x)
        x = act(norm(name="stem_bn")(x))

        drops_paths = train and not _is_zero(drop_path_rate)
        if drops_paths:
            # One draw for all blocks: a generator in each would dominate the compile time.
            path_draws = example_uniforms(self.make_rng("drop_path"), positions, len(blocks))
            path_draws = path_draws[:, :, None, None, None]
        num_reductions = 0
        rates = specs.drop_path_rates(len(blocks), drop_path_rate)
        for index, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
            operation: Any = _OPERATIONS[block.operation]
            if block.row < self.remat_groups:
                operation = nn.remat(operation, policy=_keep_reduced)
            branch = operation(block, conv, norm, act, name=f"blocks_{index}")(x)
            if block.has_skip:
                if drops_paths:
                    branch = drop(branch, path_draws[:, index], rate)
                branch = branch + x
            x = branch
            if index + 1 == len(blocks) or blocks[index + 1].stride > 1:
                num_reductions += 1
                endpoints[f"reduction_{num_reductions}"] = x

        head_filters = self.spec.scaled_end(self.spec.head_filters)
        x = conv(head_filters, name="head_conv")(x)
        x = act(norm(name="head_bn")(x))
        endpoints["features"] = x
        x = jnp.mean(x, axis=(1, 2))
        endpoints["pooled"] = x
        if train and not _is_zero(dropout_rate):
            draws = example_uniforms(self.make_rng("dropout"), positions, head_filters)
            x = drop(x, draws, dropout_rate)
        x = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=classifier_init, name="classifier"
        )(x)
        endpoints["logits"] = x.astype(jnp.float32)
        return endpoints if return_features else endpoints["logits"]


def create_model(
    variant: str,
    *,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
    width_multiplier: float = 1.0,
    depth_multiplier: float = 1.0,
    **overrides: Any,
) -> EfficientNet:
    """Builds a network by name.

    Args:
      variant: one of `list_variants()`, for instance `efficientnetv2-s`.
      num_classes: width of the logits.
      dtype: type of activations, as a type or its name; parameters are always float32.
      width_multiplier: multiplies the variant's width coefficient (cut-down networks).
      depth_multiplier: multiplies the variant's depth coefficient.
      **overrides: other attributes of `EfficientNet`; an unknown one is an error.

    Returns:
      A Linen module with collections `params` and `batch_stats`; its call gives float32 logits.

    Raises:
      InputError: unknown variant, dtype or override.
    """
    spec = specs.get_spec(variant)
    fields = {field.name for field in dataclasses.fields(EfficientNet)}
    known = sorted(fields - {"spec", "parent", "name"})
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
            raise InputError(f"create_model has no override {name!r}: {hint}")
    types = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    type_name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if type_name not in types:
        raise unknown_name("dtype", type_name, types)
    if overrides.get("padding", "same") not in PADDINGS:
        raise unknown_name("padding", overrides["padding"], PADDINGS)
    spec = dataclasses.replace(
        spec, width=spec.width * width_multiplier, depth=spec.depth * depth_multiplier
    )
    overrides.setdefault("dropout_rate", spec.dropout_rate)
    return EfficientNet(spec=spec, num_classes=num_classes, dtype=types[type_name], **overrides)
