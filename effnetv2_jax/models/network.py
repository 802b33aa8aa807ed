"""What the families of networks share: attributes, stochastic depth, endpoints, classifier.

A family is a subclass of `Network` in a file of its own, with its stem, its operations and its
head; its variants are rows of `specs.SPECS`, and `create.py` knows it by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.models.layers import BatchNorm, Conv, classifier_init, drop, example_uniforms

_ACTIVATIONS: dict[specs.Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "relu6": nn.relu6,
}


def _is_zero(rate: specs.Rate) -> bool:
    """Whether a rate is known to be 0 while tracing (a traced rate never is)."""
    return isinstance(rate, (int, float)) and rate == 0.0


def _keep_reduced(primitive: Any, *_: Any, **__: Any) -> bool:
    """What rematerialisation keeps: batch statistics, so that replicas exchange them once."""
    return bool(primitive.name.startswith("psum"))


class Network(nn.Module):
    """Images to classes; build one with `create.create_model`.

    A subclass has `OPERATIONS` (a block's operation -> its module, called with the block and the
    makers of convolutions, normalisations and activations) and the methods `stem`, `shortcut`,
    `after_block` and `head`. They get those makers as `conv`, `norm` and `act`.

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

    OPERATIONS: ClassVar[Mapping[specs.Operation, Any]] = {}

    @nn.nowrap
    def stem(self, images: jax.Array, conv: Any, norm: Any, act: Any) -> list[jax.Array]:
        """The first block's input, after any maps whose resolution the stem itself halves."""
        raise NotImplementedError

    @nn.nowrap
    def shortcut(
        self, block: specs.Block, index: int, inputs: jax.Array, conv: Any, norm: Any
    ) -> jax.Array | None:
        """What is added to the branch of a block, or None."""
        raise NotImplementedError

    @nn.nowrap
    def after_block(self, outputs: jax.Array, act: Any) -> jax.Array:
        """What follows the addition."""
        raise NotImplementedError

    @nn.nowrap
    def head(self, inputs: jax.Array, conv: Any, norm: Any, act: Any) -> jax.Array:
        """Maps the last block's output to the map that is averaged."""
        raise NotImplementedError

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

        *halved, x = self.stem(images.astype(self.dtype), conv, norm, act)

        drops_paths = train and not _is_zero(drop_path_rate)
        if drops_paths:
            # One draw for all blocks: a generator in each would dominate the compile time.
            path_draws = example_uniforms(self.make_rng("drop_path"), positions, len(blocks))
            path_draws = path_draws[:, :, None, None, None]
        rates = specs.drop_path_rates(len(blocks), drop_path_rate)
        for index, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
            operation: Any = self.OPERATIONS[block.operation]
            if block.row < self.remat_groups:
                operation = nn.remat(operation, policy=_keep_reduced)
            branch = operation(block, conv, norm, act, name=f"blocks_{index}")(x)
            shortcut = self.shortcut(block, index, x, conv, norm)
            if shortcut is not None:
                if drops_paths:
                    branch = drop(branch, path_draws[:, index], rate)
                branch = branch + shortcut
            x = self.after_block(branch, act)
            if index + 1 == len(blocks) or blocks[index + 1].stride > 1:
                halved.append(x)

        endpoints = {f"reduction_{number}": found for number, found in enumerate(halved, 1)}
        x = self.head(x, conv, norm, act)
        endpoints["features"] = x
        x = jnp.mean(x, axis=(1, 2))
        endpoints["pooled"] = x
        if train and not _is_zero(dropout_rate):
            draws = example_uniforms(self.make_rng("dropout"), positions, x.shape[-1])
            x = drop(x, draws, dropout_rate)
        x = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=classifier_init, name="classifier"
        )(x)
        endpoints["logits"] = x.astype(jnp.float32)
        return endpoints if return_features else endpoints["logits"]
