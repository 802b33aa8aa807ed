"""AutoAugment's policy `v0` on uint8 images, which the released EfficientNets were trained with.

AutoAugment (Cubuk et al. 2019, "AutoAugment: Learning augmentation policies from data") applies
one of 25 learned sub-policies to an image: two operations one after the other, each with its own
probability and level. `POLICY_V0` is not printed in that paper: it is the one of the released code
(google/automl, efficientnetv2/autoaugment.py, `policy_v0`), which took it over from the first
EfficientNet and trains EfficientNetV2-B0 to B3 with it. What the operations do at a level is
`randaugment.TABLES["released_autoaugment"]`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.randaugment import apply_operation, checked_image


class Step(NamedTuple):
    """One operation of a sub-policy.

    Attributes:
      operation: a key of the table.
      probability: that it is applied, from 0 to 1.
      level: its strength.
    """

    operation: str
    probability: float
    level: float


# autoaugment.py, `policy_v0`. The order fixes which random number means which sub-policy.
POLICY_V0: tuple[tuple[Step, Step], ...] = (
    (Step("Equalize", 0.8, 1), Step("ShearY", 0.8, 4)),
    (Step("Color", 0.4, 9), Step("Equalize", 0.6, 3)),
    (Step("Color", 0.4, 1), Step("Rotate", 0.6, 8)),
    (Step("Solarize", 0.8, 3), Step("Equalize", 0.4, 7)),
    (Step("Solarize", 0.4, 2), Step("Solarize", 0.6, 2)),
    (Step("Color", 0.2, 0), Step("Equalize", 0.8, 8)),
    (Step("Equalize", 0.4, 8), Step("SolarizeAdd", 0.8, 3)),
    (Step("ShearX", 0.2, 9), Step("Rotate", 0.6, 8)),
    (Step("Color", 0.6, 1), Step("Equalize", 1.0, 2)),
    (Step("Invert", 0.4, 9), Step("Rotate", 0.6, 0)),
    (Step("Equalize", 1.0, 9), Step("ShearY", 0.6, 3)),
    (Step("Color", 0.4, 7), Step("Equalize", 0.6, 0)),
    (Step("Posterize", 0.4, 6), Step("AutoContrast", 0.4, 7)),
    (Step("Solarize", 0.6, 8), Step("Color", 0.6, 9)),
    (Step("Solarize", 0.2, 4), Step("Rotate", 0.8, 9)),
    (Step("Rotate", 1.0, 7), Step("TranslateY", 0.8, 9)),
    (Step("ShearX", 0.0, 0), Step("Solarize", 0.8, 4)),
    (Step("ShearY", 0.8, 0), Step("Color", 0.6, 4)),
    (Step("Color", 1.0, 0), Step("Rotate", 0.6, 2)),
    (Step("Equalize", 0.8, 4), Step("Equalize", 0.0, 8)),
    (Step("Equalize", 1.0, 4), Step("AutoContrast", 0.6, 2)),
    (Step("ShearY", 0.4, 7), Step("SolarizeAdd", 0.6, 7)),
    (Step("Posterize", 0.8, 2), Step("Solarize", 0.6, 10)),
    (Step("Solarize", 0.6, 8), Step("Equalize", 0.6, 1)),
    (Step("Color", 0.8, 6), Step("Rotate", 0.4, 5)),
)


class Draw(NamedTuple):
    """What chance decides for one image.

    Attributes:
      sub_policy: int32 scalar, index into `POLICY_V0`.
      applies: bool [2], whether each of its operations is applied.
      sign: float32 [2], -1 or 1 with equal chance, for the operations that go two ways.
    """

    sub_policy: tf.Tensor
    applies: tf.Tensor
    sign: tf.Tensor


def draw_sub_policy(seed: tf.Tensor) -> Draw:
    """Draws the operations of one image; the same seed gives the same draw everywhere.

    Args:
      seed: int32 [2], used for nothing else.
    """
    # The algorithm is named because the default may depend on the device.
    uniform = tf.random.stateless_uniform([5], seed, alg="philox")
    sub_policy = tf.cast(uniform[0] * len(POLICY_V0), tf.int32)
    probabilities = tf.constant([[step.probability for step in steps] for steps in POLICY_V0])
    return Draw(
        sub_policy=sub_policy,
        applies=uniform[1:3] < probabilities[sub_policy],
        sign=tf.where(uniform[3:] < 0.5, -1.0, 1.0),
    )


def auto_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Applies one random sub-policy to an image; only the drawn operations run.

    Args:
      image: uint8 [height, width, 3].
      seed: int32 [2]; the same seed gives the same result. Use it for nothing else, or the
        operations depend on whatever else it decides.

    Returns:
      A uint8 image of the same (static) shape.

    Raises:
      InputError: for an image that is not uint8 with three channels.
    """
    image = checked_image("AutoAugment", image)
    draw = draw_sub_policy(seed)
    for position, steps in enumerate(zip(*POLICY_V0, strict=True)):
        branches = [
            functools.partial(
                apply_operation,
                step.operation,
                image,
                level=step.level,
                sign=draw.sign[position],
                form="released_autoaugment",
            )
            for step in steps
        ]
        # The last branch is the image as it is.
        branches.append(functools.partial(tf.identity, image))
        branch = tf.where(draw.applies[position], draw.sub_policy, len(POLICY_V0))
        image = tf.switch_case(branch, branches)
    return image
