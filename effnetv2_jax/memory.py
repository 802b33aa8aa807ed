"""How a train step is made to fit into a device's memory: micro-batches and rematerialisation.

Both leave the global batch as it is. A batch cut into micro-batches keeps the activations of one
of them at a time; rematerialised block groups keep none and compute them again. A `Fit` is one
such setting, and every stage of progressive learning has its own. `auto` takes the cheapest that
the compiler accepts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.multiply_adds import count_multiply_adds
from effnetv2_jax.models.network import Network
from effnetv2_jax.models.specs import unroll
from effnetv2_jax.paths import write_json
from effnetv2_jax.progressive import Stage

AUTO = "auto"

# Measured with the TPU compiler on EfficientNetV2-S at 300 px, 32 images on a v3 core
# (experiments/tpu_compile/levers.csv): 2.5 GiB of temporary memory against 1.36 GiB of
# convolution outputs.
_BYTES_PER_OUTPUT_BYTE = 1.8
# The state holds parameters, two slots of RMSProp and an average; a step adds the gradients.
_COPIES_OF_PARAMETERS = 5
# Settings whose predicted need is above the limit by this factor are not even compiled.
_TRUST = 1.25
# Below this, matrix units wait: a v3 core works on 128 x 128 tiles, and late maps are 10 x 10.
_SMALL_MICRO_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a step is cut down to fit.

    Attributes:
      micro_batches: see `steps.make_train_step`.
      remat_groups: see `models.network.Network`.
    """

    micro_batches: int = 1
    remat_groups: int = 0

    def __str__(self) -> str:
        parts = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        groups = f"{self.remat_groups} block group{'s' if self.remat_groups > 1 else ''}"
        return f"{parts}, {groups} rematerialised" if self.remat_groups else parts


def parse_setting(key: str, text: str, num_stages: int) -> list[int | None]:
    """One number a stage from `auto` (None), `4` or `1,1,2,4`.

    Raises:
      InputError: not of that form.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1:
        parts *= num_stages
    if len(parts) != num_stages:
        raise InputError(
            f"memory.{key} {text!r} names {len(parts)} stages of {num_stages}: give one value for "
            "all, or one for each."
        )
    if not all(part == AUTO or part.isdecimal() for part in parts):
        raise InputError(
            f"memory.{key} is {text!r}: give auto, a number, or one of them for each stage."
        )
    return [None if part == AUTO else int(part) for part in parts]


class Fits:
    """The settings to try for each stage, cheapest first.

    Args:
      model: the network.
      per_device: images of a global batch on a device.
      num_stages: of progressive learning.
      limit: bytes of a device's memory; None: unknown, so nothing is cut down by itself.
      micro_batches: `auto`, a number or one for each stage.
      remat_groups: likewise.
      file: keeps what was found to fit, where the first to be tried did not. Compilation caches
        keep no refusals, and a large network takes minutes for each of them at every start.

    Raises:
      InputError: a setting that cannot be.
    """

    def __init__(
        self,
        model: Network,
        *,
        per_device: int,
        num_stages: int,
        limit: int | None,
        micro_batches: str = AUTO,
        remat_groups: str = AUTO,
        file: epath.Path | None = None,
    ):
        self.limit = limit
        self._file = file
        self._found = _read_fits(file)
        self._per_device = per_device
        self._model = model
        self._num_groups = len(model.spec.rows)
        self._micro_batches = parse_setting("micro_batches", micro_batches, num_stages)
        self._remat_groups = parse_setting("remat_groups", remat_groups, num_stages)
        for count in self._micro_batches:
            if count is not None and (count < 1 or per_device % count):
                raise InputError(
                    f"memory.micro_batches {count} does not divide the {per_device} images of a "
                    f"device: choose one of {', '.join(map(str, _divisors(per_device)))}."
                )
        for count in self._remat_groups:
            if count is not None and count > self._num_groups:
                raise InputError(
                    f"memory.remat_groups {count} is more than the network's {self._num_groups} "
                    f"block groups: choose 0 to {self._num_groups}."
                )

    def candidates(self, stage: Stage) -> list[Fit]:
        """What to try for a stage, cheapest first; never empty.

        Without a known limit that is one setting: what the configuration names, or nothing.
        """
        micro_batches, remat_groups = (
            self._micro_batches[stage.index],
            self._remat_groups[stage.index],
        )
        if self.limit is None or (micro_batches is not None and remat_groups is not None):
            return [Fit(micro_batches or 1, remat_groups or 0)]
        demand = _Demand(self._model, stage.image_size)
        fits = [
            Fit(parts, groups)
            for parts in ([micro_batches] if micro_batches else _divisors(self._per_device))
            for groups in (range(self._num_groups + 1) if remat_groups is None else [remat_groups])
        ]
        fits.sort(key=lambda fit: demand.cost(fit, self._per_device))
        likely = [
            fit for fit in fits if demand.memory(fit, self._per_device) <= _TRUST * self.limit
        ]
        likely = likely or [min(fits, key=lambda fit: demand.memory(fit, self._per_device))]
        found = self._found.get(self._case(stage))
        return likely[likely.index(found) :] if found in likely else likely

    def remember(self, stage: Stage, fit: Fit) -> None:
        """Starts with a setting from now on, unless it is what would be tried first anyway."""
        if self._file is None or fit == self.candidates(stage)[0]:
            return
        self._found[self._case(stage)] = fit
        if jax.process_index() == 0:
            write_json(
                self._file, {case: dataclasses.asdict(fit) for case, fit in self._found.items()}
            )

    def _case(self, stage: Stage) -> str:
        """What decides whether a setting fits, in one run."""
        return f"{stage.image_size} px, {self._per_device} images, {self.limit} bytes"


def _read_fits(file: epath.Path | None) -> dict[str, Fit]:
    """What `Fits.remember` wrote. All of it can be found again, so a damaged file holds nothing."""
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {case: Fit(**fit) for case, fit in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


class _Demand:
    """What a step of one image size needs, predicted from the network's table."""

    def __init__(self, model: Network, image_size: int):
        costs = count_multiply_adds(model, image_size)
        num_groups = len(model.spec.rows)
        rows = [block.row for block in unroll(model.spec)]
        self._multiply_adds = [0] * num_groups
        self._outputs = [0] * num_groups  # Of all convolutions of a block group, elements.
        self._kept = [0] * num_groups  # Of them, those that enter a block.
        self._largest = [0] * num_groups  # Of one block.
        self._rest = 0
        blocks: dict[int, int] = {}
        self._parameters = 0
        for cost in costs:
            outputs = cost.out_height * cost.out_width * cost.out_channels
            self._parameters += (
                cost.kernel_size**2 * (cost.in_channels // cost.groups) * cost.out_channels
            )
            head, _, layer = cost.name.partition("/")
            if not head.startswith("blocks_"):
                self._rest += outputs
                continue
            block = int(head.removeprefix("blocks_"))
            row = rows[block]
            self._multiply_adds[row] += cost.multiply_adds
            self._outputs[row] += outputs
            blocks[block] = blocks.get(block, 0) + outputs
            if layer in ("conv", "project_conv"):
                self._kept[row] += outputs
        for block, outputs in blocks.items():
            self._largest[rows[block]] = max(self._largest[rows[block]], outputs)
        self._bytes_per_element = jnp.dtype(model.dtype).itemsize

    def memory(self, fit: Fit, per_device: int) -> float:
        """Bytes on a device."""
        again = fit.remat_groups
        outputs = self._rest + sum(self._outputs[again:]) + sum(self._kept[:again])
        outputs += max(self._largest[:again], default=0)
        activations = (
            outputs
            * self._bytes_per_element
            * _BYTES_PER_OUTPUT_BYTE
            * (per_device / fit.micro_batches)
        )
        copies = _COPIES_OF_PARAMETERS + (fit.micro_batches > 1)
        return activations + 4.0 * copies * self._parameters

    def cost(self, fit: Fit, per_device: int) -> tuple[float, int]:
        """Time, relative to a step that is not cut down; of equal ones fewer parts are better."""
        # A forward pass is a third of a step.
        again = sum(self._multiply_adds[: fit.remat_groups]) / (3 * sum(self._multiply_adds))
        images = per_device / fit.micro_batches
        waiting = max(0.0, _SMALL_MICRO_BATCH / images - 1.0) if fit.micro_batches > 1 else 0.0
        # Sums of gradients are read and written once more for each part.
        return 1.0 + again + waiting + 0.01 * (fit.micro_batches - 1), fit.micro_batches


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def device_limit(device: Any) -> int | None:
    """Bytes of memory that a program may use on a device, or None where it does not say."""
    statistics = device.memory_stats()
    return None if statistics is None else statistics.get("bytes_limit")


class NoRoom(InputError):
    """A run needs more memory than its devices have, however its steps are cut down."""


class DoesNotFit(Exception):
    """A program needs more memory than a device has.

    Attributes:
      needed: bytes; 0 where the compiler does not say.
    """

    def __init__(self, message: str, needed: float):
        super().__init__(message)
        self.needed = needed


def compile_within(lowered: Any, limit: int | None) -> Any:
    """Compiles a program for devices that have `limit` bytes (None: unknown).

    Raises:
      DoesNotFit: it needs more. The TPU compiler refuses by itself, others do not.
    """
    try:
        compiled = lowered.compile()
    except Exception as error:  # XLA has one exception for everything.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise DoesNotFit(message, _memory_asked_for(str(error))) from error
    needed = used_memory(compiled)
    if limit is not None and needed > limit:
        raise DoesNotFit(f"{needed} of {limit} bytes", needed)
    return compiled


def used_memory(compiled: Any) -> int:
    """Bytes that a compiled program needs on a device, arguments included."""
    memory = compiled.memory_analysis()
    return int(
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _memory_asked_for(message: str) -> float:
    """Bytes, from XLA's message that memory does not suffice; 0 if it says none."""
    used = re.search(r"\(([\d.]+)([KMG])\) exceeds available", message)
    return float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]] if used else 0.0


def first_that_fits(
    fits: Sequence[Fit], compile_fit: Callable[[Fit], Any], on_refusal: Callable[[Fit, str], None]
) -> tuple[Fit, Any]:
    """Compiles one setting after the other until one fits.

    Args:
      fits: from `Fits.candidates`.
      compile_fit: compiles a setting, or raises `DoesNotFit`.
      on_refusal: gets a setting that did not fit and the reason.

    Returns:
      The setting, and what `compile_fit` returned for it.

    Raises:
      DoesNotFit: none fits.
    """
    for position, fit in enumerate(fits):
        try:
            return fit, compile_fit(fit)
        except DoesNotFit as refusal:
            if position == len(fits) - 1:
                raise
            on_refusal(fit, str(refusal))
    raise ValueError("there is no setting to try")
