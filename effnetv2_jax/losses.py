"""Labels and the loss, in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from effnetv2_jax.errors import InputError, unknown_name

KINDS = ("softmax", "sigmoid", "sigmoid_sum")


def multi_hot(labels: jax.Array, num_classes: int) -> jax.Array:
    """Label weights float32 [N, classes] from int32 [N], or [N, K] padded with -1.

    Every label of an example weighs 1, also one that is listed twice.
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    return jnp.max(jax.nn.one_hot(labels, num_classes), axis=1)


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy [N] of float32 logits [N, classes] against label weights [N, classes]."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross entropies [N, classes] of float32 logits against labels in [0, 1]."""
    return jax.nn.softplus(logits) - labels * logits


@dataclasses.dataclass(frozen=True)
class Loss:
    """How logits are held against label weights that may be mixed and of several classes.

    Attributes:
      kind: `softmax`: cross entropy against weights that are first divided by their sum (the
        paper's section 5.2 and the released 21k config); `sigmoid`: binary cross entropy,
        averaged over the classes, with which the released ImageNet-21k checkpoints were trained
        in the end (automl efficientnetv2/README.md); `sigmoid_sum`: summed over them (that
        code's `custom`).
      label_smoothing: weight that moves evenly onto all classes (softmax), or from each class's
        label towards 1/2 (sigmoid). It follows mixing, as in the released code.

    Raises:
      InputError: an unknown kind, or smoothing outside [0, 1).
    """

    kind: str = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("loss.kind", self.kind, KINDS)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(
                f"loss.label_smoothing is {self.label_smoothing}: it must be at least 0 and "
                "below 1."
            )

    def targets(self, labels: jax.Array) -> jax.Array:
        """What the loss compares with: label weights [N, classes] before smoothing."""
        if self.kind == "softmax":
            return labels / jnp.sum(labels, axis=-1, keepdims=True)
        return labels

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """The loss [N] of float32 logits [N, classes]; `labels` [N, classes] from `targets`."""
        rest = 1.0 - self.label_smoothing
        if self.kind == "softmax":
            smooth = labels * rest + self.label_smoothing / labels.shape[-1]
            return softmax_cross_entropy(logits, smooth)
        losses = sigmoid_cross_entropy(logits, labels * rest + self.label_smoothing / 2)
        return jnp.mean(losses, -1) if self.kind == "sigmoid" else jnp.sum(losses, -1)
