"""Everything that training changes and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """State after `step` completed steps; plain arrays, the same on every replica.

    Attributes:
      step: int32 scalar.
      params: the network's parameters.
      batch_stats: running means and variances of BatchNorm.
      opt_state: the optimizer's slots.
      ema_params: moving average of `params`.
      ema_batch_stats: moving average of `batch_stats`; the released code averages both.
      window: sums of the training metrics since the last logging step. They are part of the
        state so that a resumed run logs the same numbers.
      nonfinite_step: the first step whose loss or gradient was not finite, or -1.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any
    ema_batch_stats: Any
    window: dict[str, jax.Array]
    nonfinite_step: jax.Array


WINDOW_METRICS = ("loss", "top1", "grad_norm", "steps")


def create_train_state(
    model: Any, optimizer: optax.GradientTransformation, key: jax.Array, image_size: int
) -> TrainState:
    """The state before the first step; the averages start at the initial values.

    Args:
      model: a network with collections `params` and `batch_stats`.
      optimizer: its slots are created here.
      key: for the initialisers.
      image_size: any size that the network takes; parameters do not depend on it.
    """
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32))
    params, batch_stats = variables["params"], variables["batch_stats"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats),
        window={name: jnp.zeros((), jnp.float32) for name in WINDOW_METRICS},
        nonfinite_step=jnp.full((), -1, jnp.int32),
    )


def initialise(new_state: Callable[[jax.Array], TrainState], key: jax.Array) -> TrainState:
    """The state that `create_train_state` creates, as NumPy arrays.

    Args:
      new_state: `create_train_state` but for the key.
      key: for the initialisers.
    """
    # One generator for each kernel: on CPU, optimising that code takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state: TrainState = jax.device_get(jax.jit(new_state, compiler_options=options)(key))
    return state


def update_ema(averages: Any, values: Any, num_updates: jax.Array, decay: float) -> Any:
    """Moving average with TF1's warm-up: the decay is min(decay, (1 + t) / (10 + t)).

    Args:
      averages: a tree.
      values: a tree of the same structure.
      num_updates: t, the number of completed steps including this one, so the first is 2/11.
      decay: 0.9999 in the paper (section 5.1).
    """
    t = num_updates.astype(jnp.float32)
    effective = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda a, v: a - (1.0 - effective) * (a - v), averages, values)
