"""From a found S to larger networks: compound scaling with the paper's two changes.

    python -m effnetv2_jax.nas.scaling                # S to the sizes of M and L, beside both
    python -m effnetv2_jax.nas.scaling VARIANT        # another network, as a search found it

A network's name says nothing of model.width_multiplier and model.stem_stride: it is scaled at the
full width and the image size of its backbone.

Section 3.3: EfficientNet's compound scaling, but inference images have at most 480 px, and later
stages, "e.g., stage 5 and 6 in Table 4", get more layers. The paper gives no coefficients.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.models.create import count_parameters, create_model
from effnetv2_jax.models.multiply_adds import count_multiply_adds
from effnetv2_jax.models.network import Network

MAX_SIZE = 480
# Tan & Le 2019, section 3.3: what depth, width and image size grow by as FLOPs double.
DEPTH, WIDTH, SIZE = 1.2, 1.1, 1.15
# By which late stages grow besides. A choice of this project: the paper has none.
LATE_DEPTH = 1.1
_FIRST_LATE_STAGE = 5
_TARGETS = ("efficientnetv2-m", "efficientnetv2-l")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A network that was scaled up.

    Attributes:
      variant: as `create_model` and every configuration take it, with the layers in it.
      width_multiplier: see there.
      eval_size: of inference, pixels.
    """

    variant: str
    width_multiplier: float
    eval_size: int

    def layers(self) -> list[int]:
        """Of each stage."""
        spec = specs.get_spec(self.variant)
        return [spec.scaled_repeats(row) for row in range(len(spec.rows))]

    def channels(self) -> list[int]:
        """Of each stage."""
        spec = specs.get_spec(self.variant)
        width = spec.width * self.width_multiplier
        return [
            specs.scale_filters(row.filters, width, keep_filters=spec.keep_filters)
            for row in spec.rows
        ]

    def network(self) -> Network:
        """The network, with 1,000 classes."""
        return create_model(self.variant, width_multiplier=self.width_multiplier)

    def multiply_adds(self) -> int:
        """At the image size."""
        costs = count_multiply_adds(self.network(), self.eval_size)
        return sum(cost.multiply_adds for cost in costs)


def scale_up(variant: str, steps: float, *, late_depth: float = LATE_DEPTH) -> Scaled:
    """Scales a network up.

    Args:
      variant: of EfficientNet's family, with the size of its `eval_size`.
      steps: the exponent of the coefficients, phi; 0 leaves the network as it is.
      late_depth: how much more the layers of stage 5 and later grow a step, as a factor.

    Raises:
      InputError: another family, or a negative exponent.
    """
    spec = specs.get_spec(variant)
    if spec.family != "efficientnet":
        raise InputError(f"{variant!r} cannot be scaled: give an EfficientNet.")
    if steps < 0:
        raise InputError(f"{variant!r} cannot be scaled by {steps:g} steps: give 0 or more.")
    rows = []
    for index, row in enumerate(spec.rows):
        factor = DEPTH**steps * (late_depth**steps if index + 1 >= _FIRST_LATE_STAGE else 1.0)
        rows.append(dataclasses.replace(row, repeats=round(spec.scaled_repeats(index) * factor)))
    backbone = variant.partition("@")[0]
    largest = max(MAX_SIZE, spec.eval_size)
    return Scaled(
        f"{backbone}@{specs.encode_rows(rows)}",
        round(WIDTH**steps, 3),  # As it is printed.
        min(largest, round(spec.eval_size * SIZE**steps)),
    )


def scale_to(variant: str, multiply_adds: float) -> Scaled:
    """The largest network of that scaling with at most so many multiply-adds."""

    def fits(steps: float) -> bool:
        return scale_up(variant, steps).multiply_adds() <= multiply_adds

    if not fits(0.0):
        raise InputError(
            f"{variant!r} has more than {multiply_adds:.3g} multiply-adds already: give a smaller "
            "network."
        )
    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
    while high - low > 0.02:
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return scale_up(variant, low)


def compare(variant: str) -> str:
    """A network scaled to the FLOPs of M and L, beside those that are larger, as text.

    Raises:
      InputError: neither of them is.
    """
    own = scale_up(variant, 0.0).multiply_adds()
    lines = []
    for target in _TARGETS:
        published = Scaled(target, 1.0, specs.get_spec(target).eval_size)
        if target != _TARGETS[-1] and published.multiply_adds() < own:
            lines += [f"{target} has fewer FLOPs than {variant}.", ""]
            continue
        scaled = scale_to(variant, published.multiply_adds())
        for name, network in ((target, published), (f"{variant} scaled", scaled)):
            lines += [
                f"{name}: {network.eval_size} px, "
                f"{count_parameters(network.network()) / 1e6:.1f}M parameters, "
                f"{network.multiply_adds() / 1e9:.1f}G FLOPs",
                f"  layers   {' '.join(f'{count:>4}' for count in network.layers())}"
                f"  ({sum(network.layers())})",
                f"  channels {' '.join(f'{count:>4}' for count in network.channels())}",
            ]
        lines += [
            f"  scaled / published: {_ratios(scaled, published)}",
            f"  train it: --config.model.variant={scaled.variant} "
            f"--config.model.width_multiplier={scaled.width_multiplier:g} "
            f"--config.eval.image_size={scaled.eval_size}",
            "",
        ]
    return "\n".join(lines).rstrip()


def _ratios(scaled: Scaled, published: Scaled) -> str:
    parameters = [count_parameters(each.network()) for each in (scaled, published)]
    return (
        f"parameters {parameters[0] / parameters[1]:.2f}, "
        f"FLOPs {scaled.multiply_adds() / published.multiply_adds():.2f}, "
        f"layers {sum(scaled.layers()) / sum(published.layers()):.2f}"
    )


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    print(compare(arguments[0] if arguments else "efficientnetv2-s"))


if __name__ == "__main__":
    command_line.run(
        main,
        lambda: None,
        num_arguments=(0, 1),
        usage=f"{sys.executable} -m effnetv2_jax.nas.scaling efficientnetv2-s",
    )
