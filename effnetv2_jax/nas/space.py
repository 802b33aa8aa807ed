"""The stage-wise search space of section 3.3.

Each row of a backbone's table is a stage, and for each stage four choices are free: the operation,
the kernel size, the expansion ratio and the number of layers. Channels and strides are the
backbone's, which the paper says were searched before; choices that only pooling or skipping would
need are left out, as there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs

Choice = str | int
# Name of a parameter -> what is chosen.
Choices = Mapping[str, Choice]

# Section 3.3 of the paper, but for the layers, of which it gives no range.
OPERATIONS = ("mbconv", "fused")
KERNEL_SIZES = (3, 5)
EXPANSIONS = (1, 4, 6)
EXTRA_LAYERS = (-1, 0, 1)
# What a network's name has digits for.
_LARGEST = 99

_FIELDS = {
    "operation": "operation",
    "kernel_size": "kernel_size",
    "expansion": "expansion",
    "layers": "repeats",
}


@dataclasses.dataclass(frozen=True)
class Space:
    """Every network that a search may find; see `make_space`.

    Attributes:
      backbone: a name of `list_variants()`.
      parameters: name, as `stage3_expansion` -> what may be chosen, in order.
    """

    backbone: str
    parameters: Mapping[str, tuple[Choice, ...]]

    @property
    def size(self) -> int:
        """How many networks there are."""
        return math.prod(len(choices) for choices in self.parameters.values())

    def variant(self, choices: Choices) -> str:
        """The network's name, which `create_model` and every configuration take.

        Raises:
          InputError: a choice that the space does not have.
        """
        for name, allowed in self.parameters.items():
            if choices.get(name) not in allowed:
                raise InputError(
                    f"{name} is {choices.get(name)}: it must be one of "
                    f"{', '.join(map(str, allowed))}."
                )
        rows = []
        for number, row in enumerate(specs.get_spec(self.backbone).rows, 1):
            values: dict[str, Any] = {
                field: choices[f"stage{number}_{name}"] for name, field in _FIELDS.items()
            }
            rows.append(dataclasses.replace(row, **values))
        return f"{self.backbone.partition('@')[0]}@{specs.encode_rows(rows)}"

    def choices(self, variant: str) -> dict[str, Choice]:
        """The inverse of `variant`, also for a plain variant with as many rows as the backbone.

        Raises:
          InputError: the network is not in the space.
        """
        spec = specs.get_spec(variant)
        found: dict[str, Choice] = {
            f"stage{number}_{name}": (
                spec.scaled_repeats(number - 1) if name == "layers" else getattr(row, field)
            )
            for number, row in enumerate(spec.rows, 1)
            for name, field in _FIELDS.items()
        }
        if found.keys() != self.parameters.keys():
            raise InputError(
                f"{variant!r} has {len(spec.rows)} stages and the backbone {self.backbone!r} "
                f"{len(specs.get_spec(self.backbone).rows)}."
            )
        if _layers(specs.get_spec(self.variant(found))) != _layers(spec):
            raise InputError(
                f"{variant!r} differs from the backbone {self.backbone!r} in more than operations, "
                "kernel sizes, expansions and layers: give a network of that backbone."
            )
        return found

    def describe(self) -> dict[str, object]:
        """What tells this space from another one, as it stands in JSON."""
        return {
            "backbone": self.backbone,
            "parameters": {name: list(choices) for name, choices in self.parameters.items()},
        }


def make_space(
    backbone: str,
    *,
    operations: Sequence[str] = OPERATIONS,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    expansions: Sequence[int] = EXPANSIONS,
    extra_layers: Sequence[int] = EXTRA_LAYERS,
) -> Space:
    """The space around a backbone.

    Args:
      backbone: an EfficientNet, or one with other rows, `BACKBONE@ROWS`.
      operations: of `mbconv` and `fused`.
      kernel_sizes: odd, below 100.
      expansions: ratios, whole and below 100.
      extra_layers: how many more layers than the backbone a stage may have; at least one stays.

    Raises:
      InputError: an unknown backbone, or a choice that is empty or that no network can have.
    """
    spec = specs.get_spec(backbone)
    if spec.family != "efficientnet":
        raise InputError(
            f"backbone {backbone!r} is no EfficientNet: choose one, as efficientnet-b4."
        )
    options: dict[str, Sequence[Choice]] = {
        "operations": operations,
        "kernel_sizes": kernel_sizes,
        "expansions": expansions,
        "extra_layers": extra_layers,
    }
    for name, values in options.items():
        if not values or len(set(values)) != len(values):
            raise InputError(f"{name} of the space is {tuple(values)}: give each choice once.")
    for operation in operations:
        if operation not in ("mbconv", "fused"):
            raise InputError(f"operation {operation!r} of the space: choose mbconv, fused or both.")
    for name in ("kernel_sizes", "expansions", "extra_layers"):
        if any(type(value) is not int or abs(value) > _LARGEST for value in options[name]):
            raise InputError(
                f"{name} of the space is {tuple(options[name])}: give whole numbers below 100."
            )
    if any(size < 1 or size % 2 == 0 for size in kernel_sizes) or min(expansions) < 1:
        raise InputError(
            f"kernel_sizes {tuple(kernel_sizes)} must be odd, and expansions {tuple(expansions)} 1 "
            "or more."
        )
    parameters: dict[str, tuple[Choice, ...]] = {}
    for index in range(len(spec.rows)):
        layers = {max(1, spec.scaled_repeats(index) + extra) for extra in extra_layers}
        parameters |= {
            f"stage{index + 1}_operation": tuple(operations),
            f"stage{index + 1}_kernel_size": tuple(kernel_sizes),
            f"stage{index + 1}_expansion": tuple(expansions),
            f"stage{index + 1}_layers": tuple(sorted(layers)),
        }
    return Space(backbone, parameters)


def _layers(spec: specs.Spec) -> tuple[object, ...]:
    """All that a network is built from."""
    return specs.unroll(spec), spec.scaled_end(spec.head_filters), spec.activation
