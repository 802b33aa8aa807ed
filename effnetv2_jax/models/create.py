"""A network by its name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models import specs
from effnetv2_jax.models.convolutions import PADDINGS
from effnetv2_jax.models.efficientnet import EfficientNet
from effnetv2_jax.models.network import Network
from effnetv2_jax.models.resnet import ResNet

FAMILIES: dict[specs.Family, type[Network]] = {"efficientnet": EfficientNet, "resnet": ResNet}


def create_model(
    variant: str,
    *,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
    width_multiplier: float = 1.0,
    depth_multiplier: float = 1.0,
    **overrides: Any,
) -> Network:
    """Builds a network by name.

    Args:
      variant: one of `list_variants()`, for instance `efficientnetv2-s`.
      num_classes: width of the logits.
      dtype: type of activations, as a type or its name; parameters are always float32.
      width_multiplier: multiplies the variant's width coefficient (cut-down networks).
      depth_multiplier: multiplies the variant's depth coefficient.
      **overrides: other attributes of `Network`; an unknown one is an error.

    Returns:
      A Linen module with collections `params` and `batch_stats`; its call gives float32 logits.

    Raises:
      InputError: unknown variant, dtype or override.
    """
    spec = specs.get_spec(variant)
    fields = {field.name for field in dataclasses.fields(Network)}
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
    return FAMILIES[spec.family](
        spec=spec, num_classes=num_classes, dtype=types[type_name], **overrides
    )


def count_parameters(network: Network) -> int:
    """Trained parameters, from shapes alone; those of BatchNorm's statistics do not count."""
    image = jax.ShapeDtypeStruct((1, network.total_stride, network.total_stride, 3), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
