"""Progressive learning (Algorithm 1 of the paper) as pure Python: a stage is a value.

Training is cut into stages of equal length in steps. Image size and regularisation rise
together from stage to stage; weights, optimizer state and averages carry over. The stage is
a function of the global step alone, so every host and every resumed run agrees on it.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from effnetv2_jax.errors import InputError, unknown_name

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One period of training with one image size and one strength of each regulariser.

    Attributes:
      index: 0 for the first stage.
      first_step: the first step of the stage; a step's number counts the steps before it.
      last_step: the first step that no longer belongs to the stage.
      image_size: side of the square training images, pixels.
      dropout_rate: probability of dropping a feature before the classifier.
      randaug_magnitude: strength of RandAugment, of which 10 was the original maximum.
      mixup_alpha: both parameters of mixup's Beta distribution; 0 turns it off.
      cutmix_alpha: likewise for cutmix.
    """

    index: int
    first_step: int
    last_step: int
    image_size: int
    dropout_rate: float
    randaug_magnitude: float
    mixup_alpha: float
    cutmix_alpha: float

    @property
    def num_steps(self) -> int:
        """Number of training steps in the stage."""
        return self.last_step - self.first_step


def _paper_size(low: float, high: float, index: int, num_stages: int) -> int:
    """S_i = S_0 + (S_e - S_0) * i / (M - 1), to the nearest pixel (Algorithm 1)."""
    return round(_interpolate((low, high), index, num_stages))


def _released_size(low: float, high: float, index: int, num_stages: int) -> int:
    """Truncated, and one stage ahead, so the minimum never occurs (efficientnetv2/main.py)."""
    return int(low + (high - low) * (index + 1) / num_stages)


_SIZE_RULES = {"paper": _paper_size, "released": _released_size}
ORDERS = ("rising", "random")


def _interpolate(ends: Range, index: int, num_stages: int) -> float:
    """phi_i = phi_0 + (phi_e - phi_0) * i / (M - 1); a single stage sits at the end value."""
    low, high = ends
    if num_stages == 1:
        return float(high)
    return low + (high - low) * index / (num_stages - 1)


def make_stages(
    total_steps: int,
    *,
    form: str,
    num_stages: int,
    image_size: tuple[int, int],
    dropout_rate: Range,
    randaug_magnitude: Range,
    mixup_alpha: Range,
    cutmix_alpha: Range,
    size_multiple: int = 1,
    order: str = "rising",
    num_draws: int = 1,
    draw_seed: int = 0,
) -> tuple[Stage, ...]:
    """Cuts training into stages; every range is (value of the first stage, of the last).

    Args:
      total_steps: length of the whole training.
      form: `paper` (Algorithm 1: the first stage is at the minimum size) or `released`
        (the official code's sizes, whose first stage is a step above the minimum).
      num_stages: M in Algorithm 1.
      image_size: pixels.
      dropout_rate: probability of dropping, in [0, 1).
      randaug_magnitude: 0 or more.
      mixup_alpha: 0 or more; 0 is off.
      cutmix_alpha: 0 or more; 0 is off.
      size_multiple: image sizes are rounded to the nearest multiple of this many pixels.
      order: `rising` (Algorithm 1), or `random` (Table 13): training is cut into `num_draws`
        periods instead, each with the size and strengths of one of the stages, drawn at random.
      num_draws: of `random`.
      draw_seed: likewise.

    Raises:
      InputError: a value outside its range, or more stages than steps.
    """
    if form not in _SIZE_RULES:
        raise unknown_name("progressive.form", form, _SIZE_RULES)
    if num_stages < 1:
        raise InputError(f"progressive.num_stages is {num_stages}: it must be at least 1.")
    if order not in ORDERS:
        raise unknown_name("progressive.order", order, ORDERS)
    if num_draws < 1:
        raise InputError(f"progressive.num_draws is {num_draws}: it must be at least 1.")
    settings = list(range(num_stages))
    if order == "random":
        settings = random.Random(draw_seed).choices(settings, k=num_draws)
    if total_steps < len(settings):
        count = "num_stages" if order == "rising" else "num_draws"
        raise InputError(
            f"{total_steps} training steps cannot be cut into {len(settings)} stages: "
            f"raise num_epochs or lower batch_size or progressive.{count}."
        )
    if size_multiple < 1:
        raise InputError(f"progressive.size_multiple is {size_multiple}: it must be at least 1.")
    if len(image_size) != 2 or min(image_size) < 1:
        raise InputError(
            f"progressive.image_size is {tuple(image_size)}: give two positive numbers of pixels."
        )
    _check_range("dropout_rate", dropout_rate, below=1.0)
    _check_range("randaug_magnitude", randaug_magnitude)
    _check_range("mixup_alpha", mixup_alpha)
    _check_range("cutmix_alpha", cutmix_alpha)

    stages = []
    for index, setting in enumerate(settings):
        size = _SIZE_RULES[form](*image_size, setting, num_stages)
        multiple = max(1, round(size / size_multiple)) * size_multiple
        stages.append(
            Stage(
                index=index,
                first_step=index * total_steps // len(settings),
                last_step=(index + 1) * total_steps // len(settings),
                image_size=multiple,
                dropout_rate=_interpolate(dropout_rate, setting, num_stages),
                randaug_magnitude=_interpolate(randaug_magnitude, setting, num_stages),
                mixup_alpha=_interpolate(mixup_alpha, setting, num_stages),
                cutmix_alpha=_interpolate(cutmix_alpha, setting, num_stages),
            )
        )
    return tuple(stages)


def _check_range(name: str, ends: Range, below: float = math.inf) -> None:
    if len(ends) != 2 or not all(0.0 <= end < below for end in ends):
        limit = "0 or more" if below == math.inf else f"at least 0 and below {below:g}"
        raise InputError(f"progressive.{name} is {tuple(ends)}: give two numbers, each {limit}.")


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that step number `step` belongs to."""
    for stage in stages:
        if stage.first_step <= step < stage.last_step:
            return stage
    raise ValueError(f"step {step} is outside the {stages[-1].last_step} steps of training")


def format_stages(stages: Sequence[Stage]) -> str:
    """The stages as a table for people."""
    lines = ["stage        steps  image size  dropout  randaug  mixup  cutmix"]
    for stage in stages:
        steps = f"{stage.first_step}-{stage.last_step - 1}"
        lines.append(
            f"{stage.index + 1:>5}  {steps:>13}  {stage.image_size:>7} px"
            f"  {stage.dropout_rate:>7.3g}  {stage.randaug_magnitude:>7.4g}"
            f"  {stage.mixup_alpha:>5.3g}  {stage.cutmix_alpha:>6.3g}"
        )
    return "\n".join(lines)
