"""Crops and flips: from an encoded image or a uint8 array to a square RGB uint8 image.

The numbers are those of the released code, which has three ways from a file to a square:

* automl efficientnetv2/preprocessing.py trains on crop `random` and evaluates on `released`;
* preprocess_legacy.py, of the first EfficientNet and of V2-B0 to B3 on ImageNet-1k, has `legacy`
  for both, with resize `bicubic`;
* preprocess_for_finetune, in the first file, has `squash` for both, and `noise_cutout` in training.

All of them keep floats after the resize where no augmentation follows; here the result is always
uint8, by the same clip and truncation that they use before augmentation, so that a quarter of the
bytes go to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.randaugment import cut_square

TRAIN_CROPS = ("random", "legacy", "squash")
EVAL_CROPS = ("released", "center", "squash", "legacy")
RESIZES = ("bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias")

# automl efficientnetv2/preprocessing.py, preprocess_for_train: the share of the image's area
# that a crop covers. The aspect ratios are TensorFlow's defaults, used there.
CROP_AREA = (0.05, 1.0)
CROP_ASPECT_RATIO = (0.75, 1.33)

# The least share of the image that a crop must cover, and the attempts to find one. `random`: the
# same function, and TensorFlow's default; `legacy`: preprocess_legacy.py, _decode_and_random_crop.
_SAMPLING = {"random": (0.0, 100), "legacy": (0.1, 10)}

# preprocessing.py, preprocess_for_eval, and preprocess_legacy.py, _decode_and_center_crop: the
# margin of the centre crop in pixels at `image_size`; the former squashes the whole image instead
# from this size up.
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


def train_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    image_size: int,
    rule: str = "random",
    area: tuple[float, float] = CROP_AREA,
    aspect_ratio: tuple[float, float] = CROP_ASPECT_RATIO,
    resize: str = "bilinear",
) -> tf.Tensor:
    """The part of an image to train on, resized to a square.

    Of a JPEG only that part is decoded, which is several times faster and gives the same
    pixels, except that colour stored at half the resolution is not blended with its
    neighbours outside the part: its first and last columns may differ by a few levels.

    Args:
      image: an encoded image (scalar string) or uint8 [height, width, 3].
      seed: int32 [2]; the crop is a pure function of it and of the image's shape.
      image_size: the side of the result in pixels.
      rule: `random` takes any part of that area and aspect ratio; `legacy` too, but gives up
        after 10 attempts in place of 100, and takes the square of `eval_crop`'s `legacy` where
        it gave up or drew the whole image; `squash` takes the whole image.
      area: the lowest and highest share of the image's area, for all but `squash`.
      aspect_ratio: the lowest and highest width / height of the part, before the resize,
        likewise.
      resize: one of `RESIZES`, see `eval_crop`.

    Returns:
      uint8 [image_size, image_size, 3].
    """
    if rule == "squash":
        return _resize(decode(image), image_size, resize)
    min_covered, attempts = _SAMPLING[rule]

    def window(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.stack([height, width, 3]),
            bounding_boxes=tf.zeros([0, 0, 4]),
            seed=seed,
            min_object_covered=min_covered,
            aspect_ratio_range=aspect_ratio,
            area_range=area,
            max_attempts=attempts,
            use_image_if_no_bounding_boxes=True,
        )
        part = tf.concat([begin[:2], size[:2]], axis=0)
        if rule == "random":
            return part
        is_whole = tf.reduce_all(size[:2] == tf.stack([height, width]))
        return tf.where(is_whole, _legacy_square(height, width, image_size), part)

    return _resize(_decode_window(image, window), image_size, resize)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors uint8 [height, width, 3] left to right with probability 1/2, keyed by `seed`."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def noise_cutout(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Fills a square of up to half the image's side with noise; the border clips it.

    The released fine-tuning draws the noise uniformly from [0, 1] for each pixel and channel when
    the image already is (v / 255 - 0.5) / 0.5 (automl efficientnetv2/preprocessing.py,
    preprocess_for_finetune). In grey levels v that is 127.5 .. 255.

    Args:
      image: uint8 [size, size, 3].
      seed: int32 [2]; fixes the place, uniform over the pixels, and the noise.

    Returns:
      uint8 [size, size, 3].
    """
    place_seed, noise_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))

    def noise(shape: tf.Tensor) -> tf.Tensor:
        uniform = tf.random.stateless_uniform(shape, noise_seed, alg="philox")
        return tf.cast(127.5 + 127.5 * uniform + 0.5, tf.uint8)  # Rounded.

    side = 2 * (tf.shape(image)[0] // 4)
    centre = tf.random.stateless_uniform([2], place_seed, alg="philox")
    return cut_square(image, side, centre, noise)


def eval_crop(
    image: tf.Tensor,
    *,
    image_size: int,
    rule: str,
    fraction: float | None = None,
    resize: str = "bilinear",
) -> tf.Tensor:
    """The part of an image that is evaluated, resized to a square.

    Args:
      image: an encoded image (scalar string) or uint8 [height, width, 3].
      image_size: the side of the result in pixels.
      rule: `center` takes the central square of side image_size / (image_size + 32) times
        the short side; `squash` takes the whole image and does not keep its aspect ratio;
        `released` is `center` below 320 px and `squash` from there, as the released code;
        `legacy` is `center` at every size, half a pixel down and right rather than up and left
        where the margin is odd, and decodes only that part of a JPEG (see `train_crop`).
      fraction: of `center`: the side of the square as a share of the short side, in place of
        the one above.
      resize: `bilinear` has its pixel centres at halves, `bicubic` is TensorFlow 1's, which
        has them at whole numbers; neither smooths before it makes an image smaller, which
        `bilinear_antialias` and `bicubic_antialias` do, as Pillow and so PyTorch's users.

    Returns:
      uint8 [image_size, image_size, 3].
    """
    if rule == "legacy":
        window = functools.partial(_legacy_square, image_size=image_size)
        return _resize(_decode_window(image, window), image_size, resize)
    pixels = decode(image)
    if rule == "center" or (rule == "released" and image_size < _SQUASH_FROM):
        height, width = tf.unstack(tf.shape(pixels)[:2])
        side = _central_side(height, width, image_size, fraction)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    return _resize(pixels, image_size, resize)


def _central_side(
    height: tf.Tensor, width: tf.Tensor, image_size: int, fraction: float | None = None
) -> tf.Tensor:
    # In float32 as the released code, so that truncation gives its side to the pixel.
    ratio = image_size / (image_size + _CENTER_MARGIN) if fraction is None else fraction
    side = tf.cast(ratio * tf.cast(tf.minimum(height, width), tf.float32), tf.int32)
    # An image of a few pixels has a central pixel at least.
    return tf.maximum(side, 1)


def _legacy_square(height: tf.Tensor, width: tf.Tensor, image_size: int) -> tf.Tensor:
    """The part [top, left, side, side] of preprocess_legacy.py, _decode_and_center_crop."""
    side = _central_side(height, width, image_size)
    return tf.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])


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


def _resize(pixels: tf.Tensor, image_size: int, method: str) -> tf.Tensor:
    """To a square, then clip and truncate."""
    pixels.set_shape([None, None, 3])
    size = [image_size, image_size]
    if method == "bicubic":
        # preprocess_legacy.py: TensorFlow 1's kernel, which no newer function has.
        pixels = tf.raw_ops.ResizeBicubic(
            images=pixels[None], size=size, align_corners=False, half_pixel_centers=False
        )[0]
    else:
        kernel, _, antialias = method.partition("_")
        # TensorFlow's loop for float32 takes half the time of that for uint8.
        pixels = tf.cast(pixels, tf.float32)
        pixels = tf.image.resize(pixels, size, kernel, antialias=bool(antialias))
    if method == "bilinear":
        # A mean of four pixels cannot leave 0 .. 255 far enough for truncation to show it.
        return tf.cast(pixels, tf.uint8)
    return tf.cast(tf.clip_by_value(pixels, 0.0, 255.0), tf.uint8)
