"""Labels and the loss, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def smooth_labels(labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Moves `label_smoothing` of each row's weight evenly onto all classes.

    It follows mixing, as in the released code, so `labels` [N, classes] may be soft.
    """
    return labels * (1.0 - label_smoothing) + label_smoothing / labels.shape[-1]


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy [N] of float32 logits [N, classes] against label weights [N, classes]."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
