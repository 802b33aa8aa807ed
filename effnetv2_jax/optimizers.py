"""RMSProp as TensorFlow 1 computes it, its weight decay, and the learning-rate schedules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effnetv2_jax.errors import InputError, unknown_name


def learning_rate_schedule(
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: float,
    schedule: str,
    warmup_epochs: float,
    decay_rate: float,
    decay_epochs: float,
) -> optax.Schedule:
    """The learning rate as a function of the step.

    A linear warm-up from exactly 0 is followed by the decay, whose clock starts at step 0 and
    is not shifted by the warm-up: the rate drops where the warm-up ends (automl
    efficientnetv2/utils.py).

    Args:
      peak: the rate that the warm-up aims at.
      total_steps: length of training, for `cosine`.
      steps_per_epoch: examples / batch size, not rounded.
      schedule: `exponential` (staircase), `cosine` or `constant`.
      warmup_epochs: length of the warm-up; 0 for none.
      decay_rate: factor of one stair of `exponential`.
      decay_epochs: length of one stair.

    Raises:
      InputError: an unknown schedule, or a length that cannot be.
    """
    if warmup_epochs < 0:
        raise InputError(f"learning_rate.warmup_epochs is {warmup_epochs}: it must be 0 or more.")
    if decay_epochs <= 0:
        raise InputError(f"learning_rate.decay_epochs is {decay_epochs}: it must be above 0.")
    warmup_steps = int(warmup_epochs * steps_per_epoch)
    if schedule == "exponential":
        decayed = _staircase(peak, decay_rate, decay_epochs * steps_per_epoch, total_steps)
    elif schedule == "cosine":
        decayed = optax.cosine_decay_schedule(peak, max(1, total_steps))
    elif schedule == "constant":
        decayed = optax.constant_schedule(peak)
    else:
        known = ("exponential", "cosine", "constant")
        raise unknown_name("learning_rate.schedule", schedule, known)

    def learning_rate(step: Any) -> jax.Array:
        step = jnp.asarray(step)
        warm = peak * step.astype(jnp.float32) / max(1, warmup_steps)
        return jnp.where(step < warmup_steps, warm, decayed(step)).astype(jnp.float32)

    return learning_rate


def _staircase(
    peak: float, decay_rate: float, stair_steps: float, total_steps: int
) -> optax.Schedule:
    """peak * decay_rate ** floor(step / stair_steps).

    Each stair begins at an integer step that is computed here: dividing by the fractional length
    in float32, as optax does, lets a stair begin a step early every now and then.
    """
    num_stairs = int(total_steps / stair_steps)
    starts = jnp.asarray(np.ceil(stair_steps * np.arange(1, num_stairs + 1)), jnp.int32)

    def decayed(step: Any) -> jax.Array:
        return peak * decay_rate ** jnp.searchsorted(starts, step, side="right")

    return decayed


def decay_mask(params: Any) -> Any:
    """True for kernels; biases and BN scales are not decayed (automl efficientnetv2/hparams.py)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    decay: float,
    momentum: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """RMSProp with the semantics of TF1, after L2 and clipping.

    The second moment starts at 1, epsilon stands inside the square root, and the learning rate
    is applied before the momentum: ms = d ms + (1 - d) g^2; mom = m mom + lr g / sqrt(ms + eps);
    w -= mom (measured on the released code, automl efficientnetv2/utils.py). The weight decay is
    the gradient of weight_decay / 2 * |w|^2 over kernels, so it passes through RMSProp.

    Args:
      learning_rate: function of the step.
      decay: d above.
      momentum: m above.
      epsilon: eps above.
      weight_decay: 0 or more.
      clip_norm: largest global norm of a gradient; 0 turns clipping off.
    """
    if weight_decay < 0 or clip_norm < 0:
        raise InputError(
            f"optimizer.weight_decay {weight_decay} and optimizer.clip_norm {clip_norm} "
            "must be 0 or more."
        )
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.rmsprop(
            learning_rate,
            decay=decay,
            eps=epsilon,
            initial_scale=1.0,
            eps_in_sqrt=True,
            momentum=momentum,
        ),
    )
