"""RandAugment on uint8 images, in the host input pipeline.

RandAugment (Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced
search space") applies `num_layers` operations one after the other. Each is drawn uniformly from
sixteen, and all work at one magnitude on AutoAugment's scale from 0 (no change) to 10 (Cubuk et
al. 2019, "AutoAugment: Learning augmentation policies from data", table of operations in the
appendix). EfficientNetV2 (Tan & Le 2021, section 4, Algorithm 1 and Table 6) raises the magnitude
from 5 to 15, 20 or 25 while it trains; above 10 the scale continues in a straight line.

`TABLES` says what every operation does at a level L, in three forms. `paper` is a clean definition:
every operation with a level is the identity at level 0, and gets stronger (or has reached its end)
with the level. `released` is what the official code does (google/automl,
efficientnetv2/autoaugment.py), on purpose or by accident, so the two must not be compared at equal
magnitude without this list:

* posterize keeps int(0.4 L) bits, and solarize inverts from int(25.6 L) up, so that both get weaker
  as L grows; from L = 10 the solarize threshold wraps around modulo 256;
* color, contrast, brightness and sharpness always use the factor 0.1 + 0.18 L, which is the
  identity at L = 5, and contrast blends with a constant that depends on the image size only;
* translate and cutout are in pixels, whatever the image size.

`released_autoaugment` is `released` with the longer distances that AutoAugment has there.

Pixel arithmetic follows Pillow in every form, which both papers used: blends and histogram tables
truncate, and grey is (19595 R + 38470 G + 7471 B) / 65536, rounded. The released code may be a
level away from that where it stretches contrast or takes a grey or smoothed level. The operations
are pure functions of an image and plain arguments. They avoid `tf.where` and table look-ups on
whole images, which cost several times more on a CPU than uint8 or float32 arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.errors import InputError, unknown_name

GREY = 128  # Fills empty pixels; autoaugment.py: `replace` of every geometric operation.
_GREY_WEIGHTS = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow, Image.convert("L").
_BELOW_HALF = 0.5 - 2.0**-25  # The float32 before 1/2.
_REFERENCE_SIZE = 384  # Pixels; the largest training size in the released hparams (M, L, XL).

# A number that a row of the table fixed, or one that the random sign chose between two.
Number: TypeAlias = float | tf.Tensor

# ---------------------------------------------------------------- operations on the grey levels


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel linearly to 0..255; a flat channel stays as it is."""
    # Rows of width * 3 numbers: reducing to an inner axis of 3 is slow, and so is broadcasting
    # over it.
    rows = tf.cast(_rows(image), tf.float32)
    low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, axis=0), [-1, 3]), axis=0)
    high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, axis=0), [-1, 3]), axis=0)
    flat = low >= high
    low, high = tf.where(flat, 0.0, low), tf.where(flat, 255.0, high)
    # The product is exact in float32 and the quotient correctly rounded, so the truncation is
    # that of exact arithmetic.
    width = tf.shape(image)[1]
    low, span = tf.tile(low, [width]), tf.tile(high - low, [width])
    stretched = (rows - low) * 255.0 / span
    return _restore(tf.cast(stretched, tf.uint8), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Gives each channel a histogram that is as flat as a table of grey levels can make it."""
    # One table of 3 * 256 entries serves the three channels.
    offsets = tf.tile(tf.constant([0, 256, 512]), [tf.shape(image)[1]])
    indices = tf.cast(_rows(image), tf.int32) + offsets
    histogram = tf.raw_ops.DenseBincount(
        input=tf.reshape(indices, [-1]), size=768, weights=tf.zeros([0], tf.int32)
    )
    histogram = tf.reshape(histogram, [3, 256])
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    # Pixels below the channel's highest level, shared out over 255 steps.
    step = tf.reduce_max(tf.where(histogram > 0, below, 0), axis=1, keepdims=True) // 255
    table = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, table, tf.range(256))
    table = tf.cast(tf.reshape(table, [-1]), tf.uint8)
    return _restore(tf.gather_nd(table, indices[..., None]), image)


def invert(image: tf.Tensor) -> tf.Tensor:
    """Turns each grey level v into 255 - v."""
    return tf.bitwise.invert(image)


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the `bits` highest bits (0..8) of each grey level."""
    return tf.bitwise.bitwise_and(image, _uint8(256 - 2 ** (8 - bits)))


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts the grey levels from `threshold` (0..256) up."""
    if threshold > 255:
        return image
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(image >= threshold, tf.uint8))


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    """Adds `addition` to the grey levels below 128, up to 255."""
    addition = min(addition, 255)
    # At most 255 after the addition, and never less than before: so the larger one is right.
    brighter = tf.minimum(image, _uint8(255 - addition)) + _uint8(addition)
    return tf.maximum(image, brighter * tf.cast(image < 128, tf.uint8))


# -------------------------------------------------- operations that blend with a poorer image


def color(image: tf.Tensor, factor: Number) -> tf.Tensor:
    """Blends with the grey image: factor 0 is grey, 1 the image, more is more colourful."""
    return _restore(_blend(_grey(image, copies=3), image, factor), image)


def contrast(image: tf.Tensor, factor: Number) -> tf.Tensor:
    """Blends with the image's mean grey level: factor 0 is flat, 1 the image."""
    total = tf.reduce_sum(tf.cast(_grey(image, copies=1), tf.int32))  # float32 would lose units
    mean = tf.cast(total, tf.float64) / tf.cast(tf.size(image) // 3, tf.float64)
    return _blend(tf.cast(tf.floor(mean + 0.5), tf.float32), image, factor)


def contrast_by_size(image: tf.Tensor, factor: Number) -> tf.Tensor:
    """Blends with grey level height * width / 256 (at most 255): factor 0 is flat, 1 the image."""
    height, width = tf.unstack(tf.shape(image)[:2])
    level = tf.minimum(height * width // 256, 255)
    return _blend(tf.cast(level, tf.float32), image, factor)


def brightness(image: tf.Tensor, factor: Number) -> tf.Tensor:
    """Blends with black: factor 0 is black, 1 the image."""
    return tf.cast(tf.minimum(tf.cast(image, tf.float32) * factor, 255.0), tf.uint8)


def sharpness(image: tf.Tensor, factor: Number) -> tf.Tensor:
    """Blends with the smoothed image: factor 0 is smooth, 1 the image. The border is kept."""
    weights = tf.constant([1.0, 1, 1, 1, 5, 1, 1, 1, 1]) / 13
    kernel = tf.tile(tf.reshape(weights, [3, 3, 1, 1]), [1, 1, 3, 1])
    means = tf.nn.depthwise_conv2d(tf.cast(image, tf.float32)[None], kernel, [1, 1, 1, 1], "SAME")
    # A mean is a whole number of thirteenths, never near a half: float32 rounds none wrongly.
    smooth = tf.floor(means[0] + 0.5)
    inner = _blend(smooth, image, factor)[1:-1, 1:-1]
    # `[1:][-1:]` is the last line, or none where the first line is also the last.
    middle = image[1:-1]
    inner = tf.concat([middle[:, :1], inner, middle[:, 1:][:, -1:]], axis=1)
    return _restore(tf.concat([image[:1], inner, image[1:][-1:]], axis=0), image)


# ------------------------------------------------------------------------- geometric operations


def rotate(image: tf.Tensor, degrees: Number) -> tf.Tensor:
    """Rotates counter-clockwise about the centre of the image."""
    rows, columns = _grid(image)
    height, width = _size(image)
    x, y = (width - 1) / 2, (height - 1) / 2
    radians = tf.cast(degrees, tf.float32) * (math.pi / 180)
    cos, sin = tf.cos(radians), tf.sin(radians)
    # The last term is subtracted, because TensorFlow's optimizer may add three in another order,
    # which rounds differently.
    return _resample(
        image,
        rows=sin * columns + cos * rows - (sin * x - y + cos * y),
        columns=cos * columns - sin * rows - (cos * x - x - sin * y),
    )


def shear_x(image: tf.Tensor, shear: Number) -> tf.Tensor:
    """Moves each row left by `shear` times its distance from the top row."""
    rows, columns = _grid(image)
    return _resample(image, rows=rows, columns=columns + shear * rows)


def shear_y(image: tf.Tensor, shear: Number) -> tf.Tensor:
    """Moves each column up by `shear` times its distance from the leftmost column."""
    rows, columns = _grid(image)
    return _resample(image, rows=shear * columns + rows, columns=columns)


def translate_x(image: tf.Tensor, fraction: Number) -> tf.Tensor:
    """Moves the image to the right by a fraction of its width."""
    _, width = _size(image)
    return shift_x(image, fraction * width)


def translate_y(image: tf.Tensor, fraction: Number) -> tf.Tensor:
    """Moves the image down by a fraction of its height."""
    height, _ = _size(image)
    return shift_y(image, fraction * height)


def shift_x(image: tf.Tensor, pixels: Number) -> tf.Tensor:
    """Moves the image to the right by a number of pixels."""
    rows, columns = _grid(image)
    return _resample(image, rows=rows, columns=columns - pixels)


def shift_y(image: tf.Tensor, pixels: Number) -> tf.Tensor:
    """Moves the image down by a number of pixels."""
    rows, _ = _grid(image)
    padded = tf.pad(image, [[1, 1], [0, 0], [0, 0]], constant_values=GREY)
    sources = _nearest(rows - pixels, tf.shape(image)[0])
    return _restore(tf.gather(padded, tf.reshape(sources, [-1])), image)


def cutout(image: tf.Tensor, fraction: float, centre: tf.Tensor) -> tf.Tensor:
    """Fills a square hole with grey; the image's border clips it.

    Args:
      image: uint8 [height, width, 3].
      fraction: side of the hole, as a fraction of the image's shorter side.
      centre: of the hole, (y, x) as fractions of height and width in [0, 1).
    """
    shorter = tf.cast(tf.reduce_min(tf.shape(image)[:2]), tf.float32)
    side = tf.cast(tf.round(min(fraction, 1.0) * shorter), tf.int32)
    return cut_square(image, side, centre)


def _grey_hole(shape: tf.Tensor) -> tf.Tensor:
    return tf.fill(shape, _uint8(GREY))


def cut_square(
    image: tf.Tensor,
    side: int | tf.Tensor,
    centre: tf.Tensor,
    filling: Callable[[tf.Tensor], tf.Tensor] = _grey_hole,
) -> tf.Tensor:
    """Fills a square hole; the image's border clips it.

    Args:
      image: uint8 [height, width, 3].
      side: of the hole, in pixels.
      centre: of the hole, (y, x) as fractions of height and width in [0, 1).
      filling: from the shape of what is left of the hole, int32 [3], to its uint8 pixels.
    """
    size = tf.shape(image)[:2]
    start = tf.cast(centre * tf.cast(size, tf.float32), tf.int32) - side // 2
    (top, left), (bottom, right) = (
        tf.unstack(tf.maximum(start, 0)),
        tf.unstack(tf.minimum(start + side, size)),
    )
    hole = filling(tf.stack([bottom - top, right - left, 3]))
    band = image[top:bottom]
    band = tf.concat([band[:, :left], hole, band[:, right:]], axis=1)
    return _restore(tf.concat([image[:top], band, image[bottom:]], axis=0), image)


# ------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the table: a function of an image, and its argument at a level.

    Attributes:
      function: image, then the argument if there is one, then the centre if `needs_centre`.
      argument: (level, sign) -> argument, in plain Python; the sign is -1.0 or 1.0. None where the
        operation has no level.
      needs_centre: whether the function also takes a random position.
    """

    function: Callable[..., tf.Tensor]
    argument: Callable[[float, float], float] | None = None
    needs_centre: bool = False


def _factor(level: float, sign: float) -> float:
    """AutoAugment's enhance range: 0.1 to 1.9 at level 10, 1 (the image) at level 0."""
    return max(0.0, 1.0 + sign * 0.09 * level)


# L is the level. "AutoAugment" is the range in its table of operations, which L = 10 reaches.
# The order fixes which random number means which operation: append, never sort.
_PAPER: dict[str, Operation] = {
    # No level. AutoAugment.
    "AutoContrast": Operation(autocontrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    # -30..30 degrees. AutoAugment.
    "Rotate": Operation(rotate, lambda level, sign: sign * 3.0 * level),
    # 8..4 bits; at least 1 is left beyond L = 17.5. AutoAugment; the released code counts upwards.
    "Posterize": Operation(posterize, lambda level, sign: max(1, 8 - int(0.4 * level))),
    # 256..0. AutoAugment; the released code counts upwards. All levels are inverted from L = 10 on.
    "Solarize": Operation(solarize, lambda level, sign: max(0, int(256 - 25.6 * level))),
    # 0.1..1.9. AutoAugment; the sign is ours, as the released 0.1 + 0.18 L has its identity at 5.
    "Color": Operation(color, _factor),
    "Contrast": Operation(contrast, _factor),
    "Brightness": Operation(brightness, _factor),
    "Sharpness": Operation(sharpness, _factor),
    # -0.3..0.3. AutoAugment.
    "ShearX": Operation(shear_x, lambda level, sign: sign * 0.03 * level),
    "ShearY": Operation(shear_y, lambda level, sign: sign * 0.03 * level),
    # 10 pixels a level in the released code (translate_const 100), as a fraction of its largest
    # training size: the same distance there, and in proportion on smaller images.
    "TranslateX": Operation(translate_x, lambda level, sign: sign * 10 * level / _REFERENCE_SIZE),
    "TranslateY": Operation(translate_y, lambda level, sign: sign * 10 * level / _REFERENCE_SIZE),
    # 4 pixels a level each way in the released code (cutout_const 40), as a fraction likewise.
    "Cutout": Operation(cutout, lambda level, sign: 8 * level / _REFERENCE_SIZE, needs_centre=True),
    # 0..110. Released code, `int((level / 10) * 110)`; not in AutoAugment.
    "SolarizeAdd": Operation(solarize_add, lambda level, sign: int(11 * level)),
}


def _released_factor(level: float, sign: float) -> float:
    """autoaugment.py, `_enhance_level_to_arg`: the image at level 5; the sign has no effect."""
    return level / 10 * 1.8 + 0.1


def _released_bits(level: float, sign: float) -> int:
    """autoaugment.py, `level_to_arg`: more bits at a higher level, all eight at 20."""
    bits = int(level / 10 * 4)
    # Its `posterize` shifts a uint8 by 8 - bits. TensorFlow shifts by at most 7, and a negative
    # number of places wraps around to a large one, so that one bit is left in both cases.
    return bits if 1 <= bits <= 8 else 1


def _released(*, translate_const: int, cutout_const: int) -> dict[str, Operation]:
    """The operations of automl efficientnetv2/autoaugment.py: `_PAPER`, but for these rows.

    Args:
      translate_const: how far translate moves at level 10, in pixels.
      cutout_const: half the side of cutout's hole at level 10, in pixels.
    """

    def pixels(level: float, sign: float) -> float:
        return sign * level / 10 * translate_const

    def side(level: float, sign: float) -> int:
        return 2 * int(level / 10 * cutout_const)

    # A union keeps the order of its left side.
    return _PAPER | {
        "Posterize": Operation(posterize, _released_bits),
        # The comparison is in uint8, where 256 is 0.
        "Solarize": Operation(solarize, lambda level, sign: int(level / 10 * 256) % 256),
        "Color": Operation(color, _released_factor),
        # `contrast` there averages the 256 counts of a histogram, not the grey levels.
        "Contrast": Operation(contrast_by_size, _released_factor),
        "Brightness": Operation(brightness, _released_factor),
        "Sharpness": Operation(sharpness, _released_factor),
        "TranslateX": Operation(shift_x, pixels),
        "TranslateY": Operation(shift_y, pixels),
        "Cutout": Operation(cut_square, side, needs_centre=True),
    }


# autoaugment.py: the constants of distort_image_with_randaugment and _with_autoaugment. Names and
# order are the same in every table, so that the same draw means the same operations.
TABLES: dict[str, dict[str, Operation]] = {
    "paper": _PAPER,
    "released": _released(translate_const=100, cutout_const=40),
    "released_autoaugment": _released(translate_const=250, cutout_const=100),
}


# ---------------------------------------------------------------------------------- public verbs


class Draw(NamedTuple):
    """What chance decides, for each layer of one image.

    Attributes:
      operation: int32 [num_layers], index into each of the tables.
      sign: float32 [num_layers], -1 or 1 with equal chance.
      centre: float32 [num_layers, 2], uniform in [0, 1).
    """

    operation: tf.Tensor
    sign: tf.Tensor
    centre: tf.Tensor


def draw_layers(seed: tf.Tensor, num_layers: int) -> Draw:
    """Draws the operations of one image; the same seed gives the same draw everywhere.

    Args:
      seed: int32 [2], used for nothing else.
      num_layers: how many operations to draw.
    """
    # The algorithm is named because the default may depend on the device.
    uniform = tf.random.stateless_uniform([num_layers, 4], seed, alg="philox")
    return Draw(
        operation=tf.cast(uniform[:, 0] * len(_PAPER), tf.int32),
        sign=tf.where(uniform[:, 1] < 0.5, -1.0, 1.0),
        centre=uniform[:, 2:],
    )


def apply_operation(
    name: str,
    image: tf.Tensor,
    *,
    level: float,
    sign: Number = 1.0,
    centre: Sequence[float] | tf.Tensor = (0.5, 0.5),
    form: str = "paper",
) -> tf.Tensor:
    """Applies one operation of a table, with nothing left to chance.

    Args:
      name: a key of the table.
      image: uint8 [height, width, 3].
      level: strength from 0 (none) to 10, or above.
      sign: -1 or 1, for the operations that go two ways.
      centre: (y, x) in [0, 1), for cutout.
      form: a key of `TABLES`.

    Raises:
      InputError: for an unknown name or form, or a level that is negative or not finite.
    """
    table = _table(form)
    if name not in table:
        raise unknown_name("RandAugment operation", name, table)
    level = _checked_level(level)
    image = tf.convert_to_tensor(image)
    row = table[name]
    arguments: list[Number] = []
    if row.argument is not None:
        negative, positive = row.argument(level, -1.0), row.argument(level, 1.0)
        # Most rows ignore the sign, and their functions need a plain number.
        same = negative == positive
        arguments.append(positive if same else tf.where(sign > 0, positive, negative))
    if row.needs_centre:
        arguments.append(tf.convert_to_tensor(centre, tf.float32))
    return row.function(image, *arguments)


def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    magnitude: float,
    num_layers: int = 2,
    form: str = "paper",
) -> tf.Tensor:
    """Applies `num_layers` random operations to one image; only the drawn ones run.

    Args:
      image: uint8 [height, width, 3].
      seed: int32 [2]; the same seed gives the same result. Use it for nothing else, or the
        operations depend on whatever else it decides.
      magnitude: the level of every operation, from 0 to 10 or above. A fraction is used as it is.
        At 0 the three operations without a level still act, and in the released form others too.
      num_layers: operations per image.
      form: a key of `TABLES`, what the operations do at that magnitude.

    Returns:
      A uint8 image of the same (static) shape.

    Raises:
      InputError: for a magnitude that is negative or not finite, a negative `num_layers`, an
        unknown form, or an image that is not uint8 with three channels.
    """
    magnitude = _checked_level(magnitude)
    if num_layers < 0:
        raise InputError(f"num_layers is {num_layers}, but must be 0 or more.")
    table = _table(form)
    image = checked_image("RandAugment", image)
    draw = draw_layers(seed, num_layers)
    for layer in range(num_layers):
        branches = [
            functools.partial(
                apply_operation,
                name,
                image,
                level=magnitude,
                sign=draw.sign[layer],
                centre=draw.centre[layer],
                form=form,
            )
            for name in table
        ]
        image = tf.switch_case(draw.operation[layer], branches)
    return image


def checked_image(policy: str, image: tf.Tensor) -> tf.Tensor:
    """`image` as a tensor, if it is uint8 [height, width, 3].

    Raises:
      InputError: it is not; the message names the `policy`.
    """
    image = tf.convert_to_tensor(image)
    if image.dtype != tf.uint8 or image.shape.rank != 3 or image.shape[-1] != 3:
        raise InputError(
            f"{policy} got a {image.dtype.name} image of shape {image.shape}, but works on uint8"
            " [height, width, 3]: apply it before normalisation and batching."
        )
    return image


# --------------------------------------------------------------------------------------- helpers


def _table(form: str) -> dict[str, Operation]:
    if form not in TABLES:
        raise unknown_name("RandAugment form", form, TABLES)
    return TABLES[form]


def _checked_level(level: float) -> float:
    if not (math.isfinite(level) and level >= 0):
        raise InputError(
            f"RandAugment magnitude {level} is outside its scale: give 0 (weakest) to 10, or up to"
            " 25 as in Table 6 of the EfficientNetV2 paper."
        )
    return float(level)


def _uint8(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint8)


def _rows(image: tf.Tensor) -> tf.Tensor:
    """[height, width, 3] -> [height, width * 3], without a copy."""
    shape = tf.shape(image)
    return tf.reshape(image, [shape[0], shape[1] * 3])


def _restore(pixels: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Gives `pixels` the shape of `image`; TensorFlow infers the static shape from this too."""
    return tf.reshape(pixels, tf.shape(image))


def _size(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width in float32."""
    shape = tf.cast(tf.shape(image), tf.float32)
    return shape[0], shape[1]


def _grey(image: tf.Tensor, copies: int) -> tf.Tensor:
    """Pillow's grey levels in float32, `copies` per pixel: [height, width, copies]."""
    # Exact: every weight has 15 or 16 bits and every pixel 8, so all sums fit into 24 bits.
    # A convolution, because a matrix product with few columns takes longer.
    kernel = tf.tile(tf.reshape(_GREY_WEIGHTS, [1, 1, 3, 1]), [1, 1, 1, copies])
    sums = tf.nn.conv2d(tf.cast(image, tf.float32)[None], kernel, strides=1, padding="VALID")
    return tf.floor(sums[0] + 0.5)


def _blend(poorer: tf.Tensor, image: tf.Tensor, factor: Number) -> tf.Tensor:
    """`poorer` (float32) at factor 0, the image at 1, straight on beyond; truncated like Pillow."""
    pixels = poorer + factor * (tf.cast(image, tf.float32) - poorer)
    return tf.cast(tf.clip_by_value(pixels, 0.0, 255.0), tf.uint8)


def _grid(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The row numbers [height, 1] and the column numbers [1, width] in float32."""
    height, width = _size(image)
    return tf.range(height)[:, None], tf.range(width)[None, :]


def _resample(image: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Fills each pixel from the nearest one to a place in the image; grey if that is outside.

    A gather of whole pixels takes a quarter of the time of ImageProjectiveTransformV3, which finds
    the place anew for each channel, and gives the same.

    Args:
      image: uint8 [height, width, 3].
      rows: float32, the places in pixels from the middle of the top left one; any shape that
        broadcasts to [height, width].
      columns: likewise.
    """
    # A grey frame takes what is outside.
    padded = tf.pad(image, [[1, 1], [1, 1], [0, 0]], constant_values=GREY)
    height, width = tf.unstack(tf.shape(image)[:2])
    indices = _nearest(rows, height) * (width + 2) + _nearest(columns, width)
    # `gather_nd`, because `gather` takes twice the time for slices of a few bytes.
    moved = tf.gather_nd(tf.reshape(padded, [-1, 3]), tf.reshape(indices, [-1, 1]))
    return _restore(moved, image)


def _nearest(places: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Rounds float32 places on a line of pixels to int32, where 0 and length + 1 are outside.

    Halves round away from zero. The largest float32 below 1/2 in place of 1/2 does that to every
    number: just below 1/2 the sum with 1/2 would round up to 1, and -1/2 is outside.
    """
    places = tf.maximum(tf.minimum(places, tf.cast(length, tf.float32)), -1.0)
    return tf.cast(tf.floor(places + _BELOW_HALF), tf.int32) + 1
