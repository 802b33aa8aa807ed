"""Exact numbers of a network: trainable parameters and multiply-adds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.multiply_adds import count_multiply_adds


def quantities(variant: str, image_size: int, num_classes: int = 1000) -> dict[str, float | int]:
    """What an experiment's rows say of a network at an image size (pixels)."""
    model = create_model(variant, num_classes=num_classes)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    multiply_adds = sum(cost.multiply_adds for cost in count_multiply_adds(model, image_size))
    return {
        "parameters": parameters,
        "parameters, M": parameters / 1e6,
        # The paper's word for multiply-adds.
        "FLOPs, G": multiply_adds / 1e9,
        "image size, px": image_size,
    }
