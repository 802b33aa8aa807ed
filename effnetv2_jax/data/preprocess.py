"""Crops and flips: from an encoded image or a uint8 array to a square RGB uint8 image.

The numbers are those of automl efficientnetv2/preprocessing.py. It keeps floats after the
resize where no augmentation follows; here the result is always uint8, by the same clip and
truncation that it uses before augmentation, so that a quarter of the bytes go to the device.
"""

from __future__ import annotations

from collections.abc import Callable

from effnetv2_jax.data.host_tf import tf

EVAL_CROPS = ("released", "center", "squash")

# automl efficientnetv2/preprocessing.py, preprocess_for_train: the share of the image's area
# that a crop covers. The aspect ratios and the attempts are TensorFlow's defaults, used there.
CROP_AREA = (0.05, 1.0)
CROP_ASPECT_RATIO = (0.75, 1.33)
_CROP_ATTEMPTS = 100

# The same file, preprocess_for_eval: the margin of the centre crop in pixels at `image_size`,
# and the size from which it squashes the whole image instead.
_CENTER_MARGIN = 32
_SQUASH_FROM = 320


def decode(image: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP or GIF (its first frame) string to uint8 [height, width, 3].

    Grey images get three equal channels and an alpha channel is dropped. A uint8 tensor is
    returned as it is.

    Raises:
      tf.errors.InvalidArgumentError: the bytes are no such image, or are cut short.
    """
    if image.dtype != tf.string:
        return image

    def bmp() -> tf.Tensor:
        # TensorFlow converts the channels of every format but this one, and takes the colour
        # numbers of a file with a palette for grey levels.
        pixels = tf.io.decode_bmp(image)
        return tf.cond(
            tf.shape(pixels)[2] == 1, lambda: with_palette(pixels), lambda: pixels[..., :3]
        )

    def with_palette(pixels: tf.Tensor) -> tf.Tensor:
        # At byte 10 is the place of the pixels, at 14 the length of the second header; the
        # palette, blue-green-red-unused, lies between that header and the pixels.
        first = 14 + tf.io.decode_raw(tf.strings.substr(image, 14, 4), tf.int32)[0]
        last = tf.io.decode_raw(tf.strings.substr(image, 10, 4), tf.int32)[0]
        palette = tf.io.decode_raw(tf.strings.substr(image, first, last - first), tf.uint8)
        colours = tf.reshape(palette, [-1, 4])[:, 2::-1]
        return tf.gather(colours, tf.cast(pixels[..., 0], tf.int32))

    def other() -> tf.Tensor:
        return tf.io.decode_image(image, channels=3, expand_animations=False)

    pixels = tf.cond(tf.strings.substr(image, 0, 2) == b"BM", bmp, other)
    pixels.set_shape([None, None, 3])
    return pixels


def random_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    image_size: int,
    area: tuple[float, float] = CROP_AREA,
    aspect_ratio: tuple[float, float] = CROP_ASPECT_RATIO,
) -> tf.Tensor:
    """A random part of the image, resized to a square.

    Of a JPEG only that part is decoded, which is several times faster and gives the same
    pixels, except that colour stored at half the resolution is not blended with its
    neighbours outside the part: its first and last columns may differ by a few levels.

    Args:
      image: an encoded image (scalar string) or uint8 [height, width, 3].
      seed: int32 [2]; the crop is a pure function of it and of the image's shape.
      image_size: the side of the result in pixels.
      area: the lowest and highest share of the image's area.
      aspect_ratio: the lowest and highest width / height of the part, before the resize.

    Returns:
      uint8 [image_size, image_size, 3].
    """

    def window(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.stack([height, width, 3]),
            bounding_boxes=tf.zeros([0, 0, 4]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=aspect_ratio,
            area_range=area,
            max_attempts=_CROP_ATTEMPTS,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], axis=0)

    return _resize(_decode_window(image, window), image_size)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors uint8 [height, width, 3] left to right with probability 1/2, keyed by `seed`."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def eval_crop(image: tf.Tensor, *, image_size: int, rule: str) -> tf.Tensor:
    """The part of an image that is evaluated, resized to a square.

    Args:
      image: an encoded image (scalar string) or uint8 [height, width, 3].
      image_size: the side of the result in pixels.
      rule: `center` takes the central square of side image_size / (image_size + 32) times
        the short side; `squash` takes the whole image and does not keep its aspect ratio;
        `released` is `center` below 320 px and `squash` from there, as the released code.

    Returns:
      uint8 [image_size, image_size, 3].
    """
    pixels = decode(image)
    if rule == "center" or (rule == "released" and image_size < _SQUASH_FROM):
        height, width = tf.unstack(tf.shape(pixels)[:2])
        # In float32 as the released code, so that truncation gives its side to the pixel.
        ratio = image_size / (image_size + _CENTER_MARGIN)
        side = tf.cast(ratio * tf.cast(tf.minimum(height, width), tf.float32), tf.int32)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    return _resize(pixels, image_size)


def _decode_window(
    image: tf.Tensor, window: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Decodes the part [top, left, height, width] that `window` picks from (height, width)."""

    def decode_then_crop() -> tf.Tensor:
        pixels = decode(image)
        shape = tf.shape(pixels)
        part = window(shape[0], shape[1])
        return tf.slice(pixels, [part[0], part[1], 0], [part[2], part[3], 3])

    def decode_only_the_crop() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(image)
        return tf.io.decode_and_crop_jpeg(image, window(shape[0], shape[1]), channels=3)

    if image.dtype != tf.string:
        return decode_then_crop()
    return tf.cond(tf.io.is_jpeg(image), decode_only_the_crop, decode_then_crop)


def _resize(pixels: tf.Tensor, image_size: int) -> tf.Tensor:
    """Bilinear with half-pixel centres and without antialiasing, then clip and truncate."""
    pixels.set_shape([None, None, 3])
    pixels = tf.image.resize(pixels, [image_size, image_size], "bilinear", antialias=False)
    return tf.cast(tf.clip_by_value(pixels, 0.0, 255.0), tf.uint8)
