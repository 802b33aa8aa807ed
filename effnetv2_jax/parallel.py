"""Replicas and hosts: the only file that knows pmap and shard_map.

The state is passed whole (`in_axes=None`) and comes back whole (`out_axes=None`), never as
stacked copies. pmap is built on shard_map and in maintenance mode, so its twin is here as well:
the same arguments, the same program, the same bits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.steps import Batch, EvalStep, Metrics, TrainStep
from effnetv2_jax.train_state import TrainState

AXIS = "replica"
FORMS = ("pmap", "shard_map")
STOP_SIGNUM = "stop_signum"
# Each has a copy of the weights.
_MAX_CPU_DEVICES = 8


def use_every_core() -> None:
    """Makes each core a CPU device, at most 8 of them; call it before JAX computes anything.

    XLA runs a good part of a network on one core (experiments/speed), so that images split over
    devices take less time. A choice of the user's, `JAX_NUM_CPU_DEVICES` or in `XLA_FLAGS`, stays.
    """
    is_chosen = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if not is_chosen and hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", min(num_cores, _MAX_CPU_DEVICES))


def parallel_train_step(
    train_step: TrainStep, devices: Sequence[Any] | None = None, *, form: str = "pmap"
) -> Any:
    """Maps a train step over devices; the old state's buffers are reused.

    The result takes (state, batch split by `split_batch`, strengths, key), with everything but
    the batch placed by `replicate`. A batch may carry `STOP_SIGNUM`; the metrics then hold the
    largest of all replicas.

    Args:
      train_step: for one replica.
      devices: None: all there are; or those of a topology that it is only compiled for.
      form: a name of `FORMS`.
    """
    step = _passing_on_requests(train_step)
    return _parallel(step, form, devices, batch_argument=1, num_arguments=4, donate=(0,))


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


def parallel_eval_step(
    eval_step: EvalStep, devices: Sequence[Any] | None = None, *, form: str = "pmap"
) -> Any:
    """Maps an evaluation step over devices; it takes (variables, split batch)."""
    return _parallel(eval_step, form, devices, batch_argument=1, num_arguments=2)


class ParallelForward:
    """A function of a batch of images, of which each device of this process computes a part.

    A batch that the devices do not divide runs on the first of them.

    Args:
      forward: of (variables, images [N, ...], **options) to a tree of arrays [N, ...], which
        knows nothing of devices.
      variables: any tree; it is placed on every device once.
      options: names of the keyword arguments; another value of one is another program.
    """

    def __init__(self, forward: Callable[..., Any], variables: Any, *, options: Sequence[str] = ()):
        devices = jax.local_devices()
        self.num_devices = len(devices)
        self._forward = forward
        mesh = Mesh(np.asarray(devices), (AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        self._on_first = jax.tree.map(lambda array: array.addressable_data(0), self._variables)
        self._on_one_device = jax.jit(forward, static_argnames=options)
        self._on_all_devices = jax.jit(self._mapped, static_argnames=options)

    def __call__(self, images: Any, **options: Any) -> Any:
        """The results of all images, in their order."""
        if self.num_devices == 1 or len(images) % self.num_devices:
            return self._on_one_device(self._on_first, images, **options)
        return self._on_all_devices(self._variables, jax.device_put(images, self._split), **options)

    def _mapped(self, variables: Any, images: jax.Array, **options: Any) -> Any:
        return jax.shard_map(
            functools.partial(self._forward, **options),
            mesh=self._split.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )(variables, images)


def _parallel(
    step: Callable[..., Any],
    form: str,
    devices: Sequence[Any] | None,
    *,
    batch_argument: int,
    num_arguments: int,
    donate: tuple[int, ...] = (),
) -> Any:
    check_form(form)
    if form == "shard_map":
        return _ShardMapped(step, devices, batch_argument, num_arguments, donate)
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=tuple(0 if i == batch_argument else None for i in range(num_arguments)),
        out_axes=None,
        donate_argnums=donate,
        devices=devices,
    )


class _ShardMapped:
    """A step mapped by shard_map that is called as a pmapped one is."""

    def __init__(
        self,
        step: Callable[..., Any],
        devices: Sequence[Any] | None,
        batch_argument: int,
        num_arguments: int,
        donate: tuple[int, ...],
    ):
        mesh = Mesh(np.asarray(_in_order_of_processes() if devices is None else devices), (AXIS,))
        specs = [PartitionSpec()] * num_arguments
        specs[batch_argument] = PartitionSpec(AXIS)

        def one_replica(*arguments: Any) -> Any:
            # pmap takes the axis of the devices away, shard_map leaves one of length 1.
            own = jax.tree.map(lambda array: array[0], arguments[batch_argument])
            return step(*arguments[:batch_argument], own, *arguments[batch_argument + 1 :])

        self._num_devices = mesh.devices.size
        self._shardings = [NamedSharding(mesh, spec) for spec in specs]
        self._step = jax.jit(
            jax.shard_map(
                one_replica,
                mesh=mesh,
                in_specs=tuple(specs),
                out_specs=PartitionSpec(),
                # The check refuses groups of replicas, which BatchNorm has.
                check_vma=False,
            ),
            donate_argnums=donate,
        )

    def lower(self, *arguments: Any) -> Any:
        """Lowers the step for arguments of these shapes, the batch's being those of a process."""

        def shape(sharding: NamedSharding, array: Any) -> jax.ShapeDtypeStruct:
            is_split = sharding.spec == PartitionSpec(AXIS)
            sides = (self._num_devices, *array.shape[1:]) if is_split else array.shape
            return jax.ShapeDtypeStruct(sides, array.dtype, sharding=sharding)

        return self._step.lower(*self._map(shape, arguments))

    def __call__(self, *arguments: Any) -> Any:
        def place(sharding: NamedSharding, array: Any) -> jax.Array:
            if isinstance(array, jax.Array) and array.sharding == sharding:
                return array
            if jax.process_count() == 1:
                return jax.device_put(array, sharding)
            return jax.make_array_from_process_local_data(sharding, np.asarray(array))

        return self._step(*self._map(place, arguments))

    def _map(self, function: Callable[[NamedSharding, Any], Any], arguments: Any) -> list[Any]:
        """Applies a function of (sharding, leaf) to each argument's leaves."""
        return [
            jax.tree.map(functools.partial(function, sharding), argument)
            for sharding, argument in zip(self._shardings, arguments, strict=True)
        ]


def _in_order_of_processes() -> list[Any]:
    """All devices in pmap's order, in which those of a process are neighbours.

    A process holds neighbouring examples of the global batch; on a TPU slice the numbers of its
    devices need not be neighbours.
    """
    return sorted(jax.devices(), key=lambda device: device.process_index)


def replicate(tree: Any) -> Any:
    """Places a tree on every device, as the steps return it.

    An initial state that is placed otherwise would make the first step compile twice. With
    several processes the values go in as NumPy once: a process-local array cannot be donated.
    """
    if jax.process_count() > 1:
        return jax.tree.map(np.asarray, tree)
    mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def stand_in(tree: Any) -> Any:
    """Arguments of a parallel step that is compiled and not called: shapes without values.

    What is compiled with them, a call with real arguments finds (jax 0.10 and 0.12). Several
    processes have to lower with NumPy arrays of their local shapes.
    """

    def shape(value: Any) -> Any:
        if jax.process_count() > 1 or not isinstance(value, jax.Array):
            return np.zeros(value.shape, value.dtype)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)

    return jax.tree.map(shape, tree)


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


def check_form(form: str) -> None:
    """Raises `InputError` unless `form` is one of `FORMS`."""
    if form not in FORMS:
        raise unknown_name("parallel", form, FORMS)


def wait_for_all_processes(name: str) -> None:
    """Returns once every process has reached the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def smallest_over_processes(number: int | None) -> int | None:
    """The smallest of every process's number, all of which call it; None if one has none."""
    if jax.process_count() == 1:
        return number
    smallest = int(np.min(multihost_utils.process_allgather(np.int64(number or 0))))
    return smallest or None


def sum_over_processes(count: int) -> int:
    """The sum of every process's number; all of them have to call it."""
    if jax.process_count() == 1:
        return count
    return int(np.sum(multihost_utils.process_allgather(np.int64(count))))
