"""Crops and resizes against NumPy, noise, and every kind of image file to RGB."""

import numpy as np
import pytest
from PIL import Image

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.preprocess import (
    decode,
    eval_crop,
    noise_cutout,
    random_flip,
    train_crop,
)


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


def resized_bicubic(pixels, size):
    """TensorFlow 1: Keys' kernel with A = -0.75 about whole places, on a grid of 1/1024."""

    def kernel(distance):
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        return np.where(distance <= 1, near, far)

    def weights(length):
        matrix = np.zeros((size, length))
        for row in range(size):
            place = row * length / size
            start = int(place)
            rest = np.rint((place - start) * 1024) / 1024
            for neighbour in (-1, 0, 1, 2):
                column = np.clip(start + neighbour, 0, length - 1)
                matrix[row, column] += kernel(np.abs(neighbour - rest))
        return matrix

    height, width, _ = pixels.shape
    exact = np.einsum("yh,hwc,xw->yxc", weights(height), pixels.astype(float), weights(width))
    return np.clip(exact, 0, 255)


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


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (31, 17)])
@pytest.mark.parametrize("size", [1, 13, 64])
def test_bilinear_keeps_to_the_range_of_its_pixels(shape, size):
    pixels = np.random.default_rng(5).choice(np.uint8([0, 1, 254, 255]), (*shape, 3))
    image = eval_crop(tf.constant(pixels), image_size=size, rule="squash").numpy()
    assert_truncates_to(image, resized(pixels, size))


@pytest.mark.parametrize("size", [24, 61])
def test_bicubic_is_the_kernel_of_tensorflow_1(size):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)
    arguments = {"image_size": size, "rule": "squash", "resize": "bicubic"}
    image = eval_crop(tf.constant(pixels), **arguments).numpy()
    assert_truncates_to(image, resized_bicubic(pixels, size))
    assert {0, 255} < set(np.unique(image))  # It overshoots, and is clipped.
    trained = train_crop(tf.constant(pixels), tf.constant([0, 0]), **arguments)
    np.testing.assert_array_equal(trained, image)


@pytest.mark.parametrize("shape", [(50, 80), (81, 50), (33, 33), (51, 80)])
@pytest.mark.parametrize("size", [16, 64, 224, 400])
def test_legacy_rounds_the_central_square_down_and_right(shape, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    side = int(size / (size + 32) * min(shape))
    top, left = ((length - side + 1) // 2 for length in shape)
    expected = resized(pixels[top : top + side, left : left + side], size)
    image = eval_crop(tf.constant(pixels), image_size=size, rule="legacy").numpy()
    assert_truncates_to(image, expected)


def test_legacy_decodes_only_its_part_of_a_jpeg(encode):
    pixels = np.random.default_rng(2).integers(0, 256, (61, 78, 3), dtype=np.uint8)
    jpeg = tf.constant(encode(pixels, subsampling="4:4:4"))
    for size in (16, 64):
        arguments = {"image_size": size, "rule": "legacy"}
        np.testing.assert_array_equal(
            eval_crop(jpeg, **arguments), eval_crop(decode(jpeg), **arguments)
        )


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
            train_crop(jpeg, **arguments), train_crop(decode(jpeg), **arguments)
        )


def test_cropping_while_decoding_subsampled_colour_changes_little(picture, encode):
    jpeg = tf.constant(encode(picture(6, 61, 77), subsampling="4:2:0"))
    for number in range(20):
        arguments = {"seed": tf.constant([number, 5]), "image_size": 20}
        fused, whole = train_crop(jpeg, **arguments), train_crop(decode(jpeg), **arguments)
        assert np.abs(fused.numpy().astype(int) - whole.numpy()).max() <= 8


def test_crops_keep_to_their_area_and_aspect_ratio():
    # Each pixel tells its row and column, so a resized crop tells its own corners.
    rows, columns = np.meshgrid(np.arange(100), np.arange(200), indexing="ij")
    pixels = tf.constant(np.stack([rows, columns, rows], axis=-1).astype(np.uint8))
    areas, ratios = [], []
    for number in range(200):
        image = train_crop(
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
    image = train_crop(
        pixels, tf.constant([0, 0]), image_size=32, area=(1.0, 1.0), aspect_ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(image, pixels)


def test_a_legacy_crop_that_finds_nothing_is_the_central_square(encode):
    # No part of a tenth or more has these areas; and the whole image is no part to train on.
    pixels = np.random.default_rng(3).integers(0, 256, (61, 78, 3), dtype=np.uint8)
    jpeg = tf.constant(encode(pixels, subsampling="4:4:4"))
    for image, limits in (
        (tf.constant(pixels), {"area": (0.01, 0.05)}),
        (tf.constant(pixels[:, :61]), {"area": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}),
        (jpeg, {"area": (0.01, 0.05)}),
    ):
        for resize in ("bilinear", "bicubic"):
            central = eval_crop(image, image_size=24, rule="legacy", resize=resize).numpy()
            for number in range(5):
                seed, arguments = tf.constant([number, 2]), {"image_size": 24, "resize": resize}
                crop = train_crop(image, seed, rule="legacy", **arguments, **limits)
                np.testing.assert_array_equal(crop, central)
                crop = train_crop(image, seed, rule="random", **arguments, **limits)
                assert (crop.numpy() != central).any()


def test_legacy_gives_up_after_ten_attempts():
    # Few attempts find such a part here.
    pixels = tf.constant(np.random.default_rng(4).integers(0, 256, (40, 80, 3), dtype=np.uint8))
    limits = {"image_size": 8, "area": (0.64, 1.0), "aspect_ratio": (0.75, 1.33)}
    central = eval_crop(pixels, image_size=8, rule="legacy").numpy()
    seeds = [tf.constant([number, 8]) for number in range(200)]
    gave_up = [
        (train_crop(pixels, seed, rule="legacy", **limits).numpy() == central).all()
        for seed in seeds
    ]
    assert 20 < sum(gave_up) < 120
    # What it does find is what a more patient search finds first.
    for seed, without in zip(seeds, gave_up, strict=True):
        if not without:
            patient = train_crop(pixels, seed, rule="random", **limits)
            np.testing.assert_array_equal(
                train_crop(pixels, seed, rule="legacy", **limits), patient
            )


def test_squash_trains_on_the_whole_image(picture):
    pixels = tf.constant(picture(1, 30, 50))
    whole = eval_crop(pixels, image_size=24, rule="squash")
    for number in range(3):
        crop = train_crop(pixels, tf.constant([number, 0]), image_size=24, rule="squash")
        np.testing.assert_array_equal(crop, whole)


@pytest.fixture(scope="module")
def holes():
    """Noise on 1,500 black images of 21 x 21; it is never black itself."""
    black = tf.zeros([21, 21, 3], tf.uint8)
    dataset = tf.data.Dataset.range(1500, output_type=tf.int32).map(
        lambda index: noise_cutout(black, tf.stack([index, 5]))
    )
    return dataset.batch(1500).get_single_element().numpy()


def test_noise_fills_a_square_of_half_the_side_about_a_uniform_pixel(holes):
    half = 21 // 4
    centres = np.zeros((21, 21), int)
    for image in holes:
        rows, columns = (np.flatnonzero((image > 0).any(axis=axis)) for axis in ((1, 2), (0, 2)))
        # A side at the border was clipped, so that the other one tells the centre.
        y, x = (
            place[0] + half if place[0] > 0 else place[-1] + 1 - half for place in (rows, columns)
        )
        expected = np.zeros((21, 21, 3), bool)
        expected[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = True
        np.testing.assert_array_equal(image > 0, expected)
        centres[y, x] += 1
    expected = len(holes) / 441
    deviation = ((centres - expected) ** 2 / expected).sum() - 440
    assert abs(deviation) < 5 * np.sqrt(2 * 440)


def test_noise_is_uniform_and_independent(holes):
    red, green, blue = holes[(holes > 0).all(axis=-1)].astype(float).T
    counts = np.bincount(np.concatenate([red, green, blue]).astype(int), minlength=256)
    assert counts[:128].sum() == 0
    # Rounded from 127.5 .. 255: the last grey level has half the width of the others.
    expected = counts.sum() / 127.5 * np.r_[np.ones(127), 0.5]
    deviation = ((counts[128:] - expected) ** 2 / expected).sum() - 127
    assert abs(deviation) < 5 * np.sqrt(2 * 127)
    for one, other in ((red, green), (green, blue), (red[1:], red[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


def test_noise_leaves_the_rest_and_repeats(picture):
    pixels = picture(7, 32, 32)
    images = [noise_cutout(tf.constant(pixels), tf.constant([s, 1])).numpy() for s in (1, 1, 2)]
    black = tf.zeros_like(pixels)
    noise = noise_cutout(black, tf.constant([1, 1])).numpy()
    np.testing.assert_array_equal(images[0], np.where(noise > 0, noise, pixels))
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any() and images[0].dtype == np.uint8


def test_a_seed_fixes_crop_and_flip(picture):
    pixels = tf.constant(picture(4, 40, 60))
    crops = [
        train_crop(pixels, tf.constant([s, 0]), image_size=16).numpy().tobytes()
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
    cropped = train_crop(content, tf.constant([0, 1]), image_size=8)
    assert cropped.shape == (8, 8, 3) and cropped.dtype == tf.uint8


@pytest.mark.parametrize("broken", [b"", b"garbage", b"BM", b"\xff\xd8\xff\xe0garbage"])
def test_bytes_that_are_no_image_raise(broken):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(broken))


def test_a_file_cut_short_raises(encode, picture):
    whole = encode(picture(5, 100, 100), "jpeg")
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(whole[: len(whole) // 2]))
