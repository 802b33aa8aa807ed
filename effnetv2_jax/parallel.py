"""Replicas and hosts: the only file that knows pmap.

The state is passed whole (`in_axes=None`) and comes back whole (`out_axes=None`), never as
stacked copies. pmap is built on shard_map and in maintenance mode, so everything that would
change with another wrapper stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effnetv2_jax.errors import InputError
from effnetv2_jax.steps import Batch, EvalStep, Metrics, TrainStep
from effnetv2_jax.train_state import TrainState

AXIS = "replica"
STOP_SIGNUM = "stop_signum"


def parallel_train_step(train_step: TrainStep, devices: Sequence[Any] | None = None) -> Any:
    """Maps a train step over devices; the old state's buffers are reused.

    The result takes (state, batch split by `split_batch`, strengths, key), with everything but
    the batch placed by `replicate`.

    A batch may carry `STOP_SIGNUM`; the metrics then hold the largest of all replicas.

    Args:
      train_step: for one replica.
      devices: None: all there are; or those of a topology that it is only compiled for.
    """
    return jax.pmap(
        _passing_on_requests(train_step),
        axis_name=AXIS,
        in_axes=(None, 0, None, None),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=devices,
    )


def _passing_on_requests(train_step: TrainStep) -> TrainStep:
    def step(
        state: TrainState, batch: Batch, strengths: Metrics, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        examples = {name: array for name, array in batch.items() if name != STOP_SIGNUM}
        state, metrics = train_step(state, examples, strengths, key)
        if STOP_SIGNUM in batch:
            metrics = {**metrics, STOP_SIGNUM: lax.pmax(batch[STOP_SIGNUM][0], AXIS)}
        return state, metrics

    return step


def parallel_eval_step(eval_step: EvalStep, devices: Sequence[Any] | None = None) -> Any:
    """Maps an evaluation step over devices; it takes (variables, split batch)."""
    return jax.pmap(eval_step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def replicate(tree: Any) -> Any:
    """Places a tree on every device, as the steps return it.

    An initial state that is placed otherwise would make the first step compile twice. With
    several processes the values go in as NumPy once: a process-local array cannot be donated.
    """
    if jax.process_count() > 1:
        return jax.tree.map(np.asarray, tree)
    mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_host(tree: Any) -> Any:
    """Copies a replicated tree to NumPy arrays."""

    def fetch(value: Any) -> np.ndarray:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = value.addressable_data(0)
        return np.asarray(value)

    return jax.tree.map(fetch, tree)


def split_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes this host's batch from [n, ...] to [local devices, n / local devices, ...]."""
    num_devices = jax.local_device_count()
    return {name: a.reshape(num_devices, -1, *a.shape[1:]) for name, a in batch.items()}


def check_batch_size(batch_size: int, num_devices: int) -> None:
    """Raises `InputError` unless the devices divide a global batch."""
    if batch_size < 1 or batch_size % num_devices:
        raise InputError(
            f"batch_size {batch_size} cannot be split over {num_devices} devices: "
            f"choose a multiple of {num_devices}."
        )


def on_first_process(action: Callable[[], None]) -> None:
    """Runs an action on process 0 while all wait for it; an `InputError` of it is everyone's."""
    if jax.process_count() == 1:
        action()
        return
    message = ""
    if jax.process_index() == 0:
        try:
            action()
        except InputError as error:
            message = str(error)
    text = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(message.encode(), np.uint8)[: text.size]
    text[: encoded.size] = encoded
    text = multihost_utils.broadcast_one_to_all(text)
    message = bytes(text).rstrip(b"\0").decode(errors="ignore")
    if message:
        raise InputError(message)


def wait_for_all_processes(name: str) -> None:
    """Returns once every process has reached the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def sum_over_processes(count: int) -> int:
    """The sum of every process's number; all of them have to call it."""
    if jax.process_count() == 1:
        return count
    return int(np.sum(multihost_utils.process_allgather(np.int64(count))))
