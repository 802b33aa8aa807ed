"""Crops against NumPy, and every kind of image file to RGB."""

import numpy as np
import pytest
from PIL import Image

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.preprocess import decode, eval_crop, random_crop, random_flip


def resized(pixels, size):
    """Bilinear with half-pixel centres, borders repeated, no antialias; then truncated."""

    def weights(length):
        places = (np.arange(size) + 0.5) * length / size - 0.5
        low = np.floor(places).astype(int)
        matrix = np.zeros((size, length))
        for row, (place, start) in enumerate(zip(places, low, strict=True)):
            matrix[row, np.clip(start, 0, length - 1)] += 1 - (place - start)
            matrix[row, np.clip(start + 1, 0, length - 1)] += place - start
        return matrix

    height, width, _ = pixels.shape
    return np.einsum("yh,hwc,xw->yxc", weights(height), pixels.astype(float), weights(width))


def assert_truncates_to(image, exact):
    """`image` is the truncation of `exact`, up to float32's rounding."""
    assert image.dtype == np.uint8 and image.shape == exact.shape
    error = exact - image
    assert error.min() > -1e-3 and error.max() < 1 + 1e-3


@pytest.mark.parametrize("shape", [(50, 80), (81, 50), (33, 33)])
@pytest.mark.parametrize("size", [16, 64, 224])
def test_center_is_the_central_square(shape, size, picture):
    pixels = picture(0, *shape)
    side = int(size / (size + 32) * min(shape))
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = resized(pixels[top : top + side, left : left + side], size)
    for rule in ("center", "released"):
        image = eval_crop(tf.constant(pixels), image_size=size, rule=rule).numpy()
        assert_truncates_to(image, expected)


def test_squash_takes_the_whole_image(picture):
    pixels = picture(1, 30, 50)
    image = eval_crop(tf.constant(pixels), image_size=24, rule="squash").numpy()
    assert_truncates_to(image, resized(pixels, 24))


@pytest.mark.parametrize(("size", "same_as"), [(319, "center"), (320, "squash")])
def test_released_squashes_from_320_pixels(size, same_as, picture):
    pixels = tf.constant(picture(2, 40, 60))
    released = eval_crop(pixels, image_size=size, rule="released")
    np.testing.assert_array_equal(released, eval_crop(pixels, image_size=size, rule=same_as))


def test_the_two_rules_differ(picture):
    pixels = tf.constant(picture(2, 40, 60))
    center, squash = (eval_crop(pixels, image_size=32, rule=r) for r in ("center", "squash"))
    assert (center.numpy() != squash.numpy()).any()


@pytest.mark.parametrize("grey", [False, True])
def test_cropping_while_decoding_a_jpeg_changes_nothing(grey, encode):
    pixels = np.random.default_rng(0).integers(0, 256, (61, 77, 3), dtype=np.uint8)
    jpeg = tf.constant(encode(pixels[..., 0] if grey else pixels, subsampling="4:4:4"))
    for number in range(20):
        arguments = {"seed": tf.constant([number, 5]), "image_size": 20}
        np.testing.assert_array_equal(
            random_crop(jpeg, **arguments), random_crop(decode(jpeg), **arguments)
        )


def test_cropping_while_decoding_subsampled_colour_changes_little(picture, encode):
    jpeg = tf.constant(encode(picture(6, 61, 77), subsampling="4:2:0"))
    for number in range(20):
        arguments = {"seed": tf.constant([number, 5]), "image_size": 20}
        fused, whole = random_crop(jpeg, **arguments), random_crop(decode(jpeg), **arguments)
        assert np.abs(fused.numpy().astype(int) - whole.numpy()).max() <= 8


def test_crops_keep_to_their_area_and_aspect_ratio():
    # Each pixel tells its row and column, so a resized crop tells its own corners.
    rows, columns = np.meshgrid(np.arange(100), np.arange(200), indexing="ij")
    pixels = tf.constant(np.stack([rows, columns, rows], axis=-1).astype(np.uint8))
    areas, ratios = [], []
    for number in range(200):
        image = random_crop(
            pixels,
            tf.constant([number, 1]),
            image_size=200,
            area=(0.1, 0.5),
            aspect_ratio=(0.5, 2.0),
        ).numpy()
        height = np.ptp(image[..., 0].astype(int)) + 1
        width = np.ptp(image[..., 1].astype(int)) + 1
        areas.append(height * width / 20000)
        ratios.append(width / height)
    assert 0.09 < min(areas) < 0.15 and 0.4 < max(areas) < 0.52
    assert 0.45 < min(ratios) < 0.7 and 1.5 < max(ratios) < 2.1


def test_a_crop_of_everything_is_the_image(picture):
    pixels = tf.constant(picture(3, 32, 32))
    image = random_crop(
        pixels, tf.constant([0, 0]), image_size=32, area=(1.0, 1.0), aspect_ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(image, pixels)


def test_a_seed_fixes_crop_and_flip(picture):
    pixels = tf.constant(picture(4, 40, 60))
    crops = [
        random_crop(pixels, tf.constant([s, 0]), image_size=16).numpy().tobytes()
        for s in (1, 1, 2, 3)
    ]
    assert crops[0] == crops[1] and len(set(crops)) == 3
    mirrored = pixels.numpy()[:, ::-1]
    flips = 0
    for seed in range(100):
        image = random_flip(pixels, tf.constant([seed, 0])).numpy()
        flipped = (image == mirrored).all()
        assert flipped or (image == pixels.numpy()).all()
        flips += flipped
    assert 30 < flips < 70


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *[("jpeg", mode) for mode in ("L", "RGB", "CMYK")],
        *[("png", mode) for mode in ("L", "RGB", "LA", "RGBA", "P")],
        *[("bmp", mode) for mode in ("L", "RGB", "RGBA", "P")],
        *[("gif", mode) for mode in ("L", "RGB", "P")],
    ],
)
def test_every_kind_of_file_becomes_rgb(file_format, mode, encode):
    colour = (200, 200, 200) if "L" in mode else (200, 100, 20)
    source = Image.new("RGB", (17, 13), colour)
    source = source.quantize() if mode == "P" else source.convert(mode)
    content = tf.constant(encode(source, file_format))
    image = decode(content).numpy()
    assert image.dtype == np.uint8 and image.shape == (13, 17, 3)
    assert np.abs(image.astype(int) - colour).max() <= 4  # JPEG's error
    for size in (8, 400):
        assert eval_crop(content, image_size=size, rule="released").shape == (size, size, 3)
    cropped = random_crop(content, tf.constant([0, 1]), image_size=8)
    assert cropped.shape == (8, 8, 3) and cropped.dtype == tf.uint8


@pytest.mark.parametrize("broken", [b"", b"garbage", b"BM", b"\xff\xd8\xff\xe0garbage"])
def test_bytes_that_are_no_image_raise(broken):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(broken))


def test_a_file_cut_short_raises(encode, picture):
    whole = encode(picture(5, 100, 100), "jpeg")
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(whole[: len(whole) // 2]))
