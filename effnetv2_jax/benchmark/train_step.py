"""The train step of a configuration, with one batch that is on the host each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from effnetv2_jax.losses import Loss
from effnetv2_jax.models.create import create_model
from effnetv2_jax.optimizers import make_optimizer
from effnetv2_jax.parallel import AXIS, parallel_train_step, replicate
from effnetv2_jax.steps import make_train_step
from effnetv2_jax.train_state import create_train_state, initialise


def make_step_runner(
    config: ConfigDict,
    *,
    num_classes: int,
    image_size: int,
    batch_size: int,
    devices: Sequence[Any] | None = None,
) -> Callable[[int], None]:
    """The step that `main` runs, without mixing, on a batch of noise.

    Args:
      config: of a run.
      num_classes: outputs of the network.
      image_size: pixels.
      batch_size: images, over all devices.
      devices: that share the batch; None: all of this process.

    Returns:
      A function that takes so many steps and returns when the last one is done.
    """
    used = list(devices or jax.local_devices())
    model = create_model(**config.model, num_classes=num_classes, axis_name=AXIS)
    optimizer = make_optimizer(lambda _: 1e-3, **config.optimizer)
    step = parallel_train_step(
        make_train_step(
            model,
            optimizer,
            **config.normalize,
            loss=Loss(**config.loss),
            ema_decay=config.ema_decay,
            mixing=None,
            window_steps=config.log_every_steps,
            axis_name=AXIS,
        ),
        devices=used,
    )
    key = jax.random.PRNGKey(0)
    new_state = functools.partial(create_train_state, model, optimizer, image_size=image_size)
    state = initialise(new_state, key)
    if devices is None:
        state, key = replicate(state), replicate(key)
    shape = (len(used), batch_size // len(used), image_size, image_size, 3)
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "label": np.arange(batch_size, dtype=np.int32).reshape(len(used), -1) % num_classes,
    }
    strengths = {"dropout_rate": np.float32(0.2)}
    compiled = step.lower(state, batch, strengths, key).compile()
    held = [state]

    def run(repetitions: int) -> None:
        state = held.pop()
        for _ in range(repetitions):
            state, _ = compiled(state, batch, strengths, key)
        held.append(jax.block_until_ready(state))

    return run
