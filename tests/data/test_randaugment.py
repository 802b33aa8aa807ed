"""RandAugment against Pillow, a NumPy resampler and the promises of its table.

Where a test allows a difference it says why; everything else must agree in every pixel.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from effnetv2_jax.data import randaugment
from effnetv2_jax.data.randaugment import TABLES, apply_operation, draw_layers, rand_augment
from effnetv2_jax.errors import InputError

FORMS = list(TABLES)
OPERATIONS = TABLES["paper"]
NAMES = list(OPERATIONS)
WITHOUT_LEVEL = ["AutoContrast", "Equalize", "Invert"]
WITH_LEVEL = [name for name in NAMES if name not in WITHOUT_LEVEL]
SIGNED = [
    *("Rotate", "Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY"),
]
FACTORS = [0.0, 0.1, 0.55, 1.0, 1.2503, 1.9, 3.25]


def _noise(height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    random = np.random.default_rng(height * 1000 + width)
    return random.integers(low, high, (height, width, 3)).astype(np.uint8)


def _photo_like(height: int, width: int) -> np.ndarray:
    """Smooth, skewed and different in each channel, as histograms of photographs are."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = [60 + 150 * x * y, 20 + 180 * y**3, 255 * np.abs(np.sin(4 * x + y))]
    return np.stack(channels, axis=-1).astype(np.uint8)


IMAGES = {
    "noise": _noise(33, 47),
    "noise 8x8": _noise(8, 8),
    "low contrast": _noise(40, 30, 60, 180),
    "photo-like": _photo_like(64, 96),
    "flat": np.full((33, 20, 3), [0, 90, 255], np.uint8),
    "two levels": np.where(_noise(24, 31) < 50, 10, 200).astype(np.uint8),
}


@pytest.fixture(params=list(IMAGES))
def image(request: pytest.FixtureRequest) -> np.ndarray:
    return IMAGES[request.param]


# ------------------------------------------------------------------------------ against Pillow


def test_autocontrast_is_exact_and_pillow_within_one_level(image):
    ours = randaugment.autocontrast(tf.constant(image)).numpy().astype(int)
    wide = image.astype(int)
    low, high = wide.min((0, 1)), wide.max((0, 1))
    exact = np.where(high > low, (wide - low) * 255 // np.maximum(high - low, 1), wide)
    np.testing.assert_array_equal(ours, exact)
    # Pillow truncates a rounded product, so that a whole number may come out one level lower.
    pillow = np.asarray(ImageOps.autocontrast(Image.fromarray(image))).astype(int)
    assert set(np.unique(ours - pillow)) <= {0, 1}


def test_equalize_equals_pillow(image):
    pillow = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    np.testing.assert_array_equal(randaugment.equalize(tf.constant(image)), pillow)


def test_invert_equals_pillow(image):
    pillow = np.asarray(ImageOps.invert(Image.fromarray(image)))
    np.testing.assert_array_equal(randaugment.invert(tf.constant(image)), pillow)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_equals_pillow(bits):
    image = IMAGES["noise"]
    pillow = np.asarray(ImageOps.posterize(Image.fromarray(image), bits))
    np.testing.assert_array_equal(randaugment.posterize(tf.constant(image), bits), pillow)


@pytest.mark.parametrize("threshold", [0, 1, 42, 128, 255, 256])
def test_solarize_equals_pillow(threshold):
    image = IMAGES["noise"]
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(image), threshold))
    np.testing.assert_array_equal(randaugment.solarize(tf.constant(image), threshold), pillow)


@pytest.mark.parametrize("addition", [0, 1, 55, 110, 127, 128, 165, 255, 275])
def test_solarize_add_equals_its_definition(addition):
    image = IMAGES["noise"]
    wide = image.astype(int)
    expected = np.where(wide < 128, np.minimum(wide + addition, 255), wide)
    np.testing.assert_array_equal(randaugment.solarize_add(tf.constant(image), addition), expected)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("ours", "enhancer"),
    [
        (randaugment.color, ImageEnhance.Color),
        (randaugment.contrast, ImageEnhance.Contrast),
        (randaugment.brightness, ImageEnhance.Brightness),
        (randaugment.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_equal_pillow(image, ours, enhancer, factor):
    pillow = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
    np.testing.assert_array_equal(ours(tf.constant(image), factor), pillow)


def test_contrast_sums_a_large_image_exactly():
    # The mean is 250.5 less one pixel's share, which float32 cannot tell from 250.5 (and 251).
    image = np.full((500 * 600, 3), 251, np.uint8)
    image[: 500 * 600 // 2 + 1] = 250
    image = image.reshape(500, 600, 3)
    assert (randaugment.contrast(tf.constant(image), 0.0).numpy() == 250).all()


# ---------------------------------------------------------------------------- geometry


def _resample(image: np.ndarray, matrix: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest neighbour in float64, and which pixels are clear of a rounding tie."""
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width]
    a, b, c, d, e, f = matrix
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    clear = np.minimum(np.abs(source_x % 1 - 0.5), np.abs(source_y % 1 - 0.5)) > 1e-3
    column, row = np.rint(source_x).astype(int), np.rint(source_y).astype(int)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return np.where(inside[..., None], pixels, 128), clear


def _rotation(degrees: float, height: int, width: int) -> list[float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]


@pytest.mark.parametrize("level", [0.7, 7.777, 23.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("shape", [(8, 8), (33, 47)])
@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_geometry_equals_nearest_neighbour(name, shape, sign, level):
    height, width = shape
    image = _noise(*shape)
    matrix = {
        "Rotate": _rotation(sign * 3 * level, height, width),
        "ShearX": [1, sign * 0.03 * level, 0, 0, 1, 0],
        "ShearY": [1, 0, 0, sign * 0.03 * level, 1, 0],
        "TranslateX": [1, 0, -sign * 10 * level / 384 * width, 0, 1, 0],
        "TranslateY": [1, 0, 0, 0, 1, -sign * 10 * level / 384 * height],
    }[name]
    expected, clear = _resample(image, matrix)
    # float32 may round a source position on the edge of two pixels to the other one.
    assert clear.mean() > 0.8
    ours = apply_operation(name, image, level=level, sign=sign).numpy()
    np.testing.assert_array_equal(ours[clear], expected[clear])


def _round_half_away(places: np.ndarray) -> np.ndarray:
    """What the released code's kernel, ImageProjectiveTransformV3, does to a place."""
    wide = places.astype(np.float64)
    return np.copysign(np.floor(np.abs(wide) + 0.5), wide).astype(np.int64)


@pytest.mark.parametrize("length", [1, 2, 300])
def test_places_round_half_away_from_zero_and_stay_in_the_frame(length):
    halves = np.arange(-3, length + 3, dtype=np.float32) + np.float32(0.5)
    places = [np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf)]
    places = np.concatenate([halves, *places, np.float32([0, -1e9, 1e9])])
    expected = np.clip(_round_half_away(places), -1, length) + 1
    np.testing.assert_array_equal(randaugment._nearest(tf.constant(places), length), expected)


@pytest.mark.parametrize("level", [5.0, 10.0, 15.0, 1000.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (8, 8), (33, 47)])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_shear_and_translation_are_exact_at_ties(name, shape, sign, level):
    """float32 throughout, so that the places are the same to the last bit."""
    height, width = shape
    image = _noise(*shape)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    shear, fraction = np.float32(sign * 0.03 * level), np.float32(sign * 10 * level / 384)
    source_rows = {
        "ShearY": shear * columns + rows,
        "TranslateY": rows - fraction * np.float32(height),
    }.get(name, rows)
    source_columns = {
        "ShearX": columns + shear * rows,
        "TranslateX": columns - fraction * np.float32(width),
    }.get(name, columns)
    row, column = _round_half_away(source_rows), _round_half_away(source_columns)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    expected = image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    expected = np.where(inside[..., None], expected, 128)
    ours = apply_operation(name, image, level=level, sign=sign)
    np.testing.assert_array_equal(ours, expected)


def test_rotation_rounds_in_a_graph_as_outside():
    """TensorFlow's optimizer orders sums by their terms' shapes, which moves the ties of 45."""
    image = np.tile(_noise(300, 300)[None], (2, 1, 1, 1))
    degrees = np.float32([-45, 45])
    dataset = tf.data.Dataset.from_tensor_slices((image, degrees)).map(randaugment.rotate)
    for angle, rotated in zip(degrees, dataset, strict=True):
        np.testing.assert_array_equal(rotated, randaugment.rotate(image[0], angle))


def test_rotation_is_counter_clockwise_about_the_centre():
    image = _noise(17, 17)
    np.testing.assert_array_equal(randaugment.rotate(image, 90.0), np.rot90(image))
    np.testing.assert_array_equal(randaugment.rotate(image, 180.0), image[::-1, ::-1])


def test_translation_moves_right_and_down_and_leaves_grey():
    image = _noise(40, 20)
    right = randaugment.translate_x(image, 0.25).numpy()
    np.testing.assert_array_equal(right[:, 5:], image[:, :-5])
    assert (right[:, :5] == 128).all()
    down = randaugment.translate_y(image, 0.25).numpy()
    np.testing.assert_array_equal(down[10:], image[:-10])
    assert (down[:10] == 128).all()


@pytest.mark.parametrize("level", [0.0, 2.0, 10.0, 25.0, 60.0])
@pytest.mark.parametrize("centre", [(0.0, 0.0), (0.5, 0.25), (0.999999, 0.4)])
@pytest.mark.parametrize("shape", [(8, 8), (33, 47), (96, 64)])
def test_cutout_equals_a_clipped_square(shape, centre, level):
    image = _noise(*shape)
    side = round(min(8 * level / 384, 1) * min(shape))
    top, left = (int(c * s) - side // 2 for c, s in zip(centre, shape, strict=True))
    expected = image.copy()
    expected[max(top, 0) : top + side, max(left, 0) : left + side] = 128
    ours = apply_operation("Cutout", image, level=level, centre=centre)
    np.testing.assert_array_equal(ours, expected)


# ------------------------------------------------------------------------------------ the table


def test_table_holds_the_sixteen_operations_in_order():
    in_order = [
        *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color"),
        *("Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
        *("Cutout", "SolarizeAdd"),
    ]
    assert in_order == NAMES
    assert [name for name in NAMES if OPERATIONS[name].argument is None] == WITHOUT_LEVEL


@pytest.mark.parametrize(
    ("name", "at_5", "at_10", "at_25"),
    [
        ("Rotate", 15, 30, 75),
        ("Posterize", 6, 4, 1),
        ("Solarize", 128, 0, 0),
        ("Color", 1.45, 1.9, 3.25),
        ("Contrast", 1.45, 1.9, 3.25),
        ("Brightness", 1.45, 1.9, 3.25),
        ("Sharpness", 1.45, 1.9, 3.25),
        ("ShearX", 0.15, 0.3, 0.75),
        ("ShearY", 0.15, 0.3, 0.75),
        ("TranslateX", 50 / 384, 100 / 384, 250 / 384),
        ("TranslateY", 50 / 384, 100 / 384, 250 / 384),
        ("Cutout", 40 / 384, 80 / 384, 200 / 384),
        ("SolarizeAdd", 55, 110, 275),
    ],
)
def test_arguments_at_golden_levels(name, at_5, at_10, at_25):
    """The published ranges. A change here redefines every magnitude in every config."""
    arguments = [OPERATIONS[name].argument(level, 1.0) for level in (5.0, 10.0, 25.0)]
    assert arguments == pytest.approx([at_5, at_10, at_25])


@pytest.mark.parametrize("name", WITH_LEVEL)
def test_arguments_move_away_from_the_identity(name):
    identity = {"Posterize": 8, "Solarize": 256}
    identity |= dict.fromkeys(["Color", "Contrast", "Brightness", "Sharpness"], 1)
    for sign in (-1.0, 1.0):
        argument = OPERATIONS[name].argument
        strength = [
            abs(argument(level, sign) - identity.get(name, 0)) for level in np.arange(0, 25.1, 0.1)
        ]
        assert strength[0] == 0
        assert strength[250] >= strength[100] > strength[50] > strength[25]
        assert (np.diff(strength) >= 0).all()


@pytest.mark.parametrize("name", WITH_LEVEL)
def test_fractional_levels_are_used_as_they_are(name):
    steps = {OPERATIONS[name].argument(level, 1.0) for level in (8.0, 8.333, 8.667, 9.0)}
    assert len(steps) == (1 if name == "Posterize" else 4)  # Only bits come in larger steps.


@pytest.mark.parametrize("name", NAMES)
def test_sign_turns_exactly_the_two_way_operations(name):
    argument = OPERATIONS[name].argument
    assert (argument is not None and argument(5.0, -1.0) != argument(5.0, 1.0)) == (name in SIGNED)
    image = IMAGES["photo-like"]
    minus, plus = (apply_operation(name, image, level=5.0, sign=s).numpy() for s in (-1.0, 1.0))
    assert (minus != plus).any() == (name in SIGNED)


def test_factors_never_fall_below_zero():
    assert OPERATIONS["Brightness"].argument(10.0, -1.0) == pytest.approx(0.1)
    assert OPERATIONS["Brightness"].argument(25.0, -1.0) == 0.0
    assert not apply_operation("Brightness", IMAGES["noise"], level=25.0, sign=-1.0).numpy().any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", WITH_LEVEL)
def test_level_zero_is_the_identity(name, sign):
    for image in IMAGES.values():
        ours = apply_operation(name, image, level=0.0, sign=sign)
        np.testing.assert_array_equal(ours, image)


@pytest.mark.parametrize("name", WITH_LEVEL)
def test_images_change_more_with_the_level(name):
    """By the mean change; for solarize by the share of changed pixels, as mid-greys move little."""
    image = IMAGES["photo-like"].astype(int)
    changes = []
    for level in (0.0, 2.5, 5.0, 10.0):
        change = np.abs(apply_operation(name, IMAGES["photo-like"], level=level).numpy() - image)
        changes.append(np.mean(change > 0) if name == "Solarize" else np.mean(change))
    assert changes == sorted(changes) and changes[0] == 0 and changes[-1] > changes[1] > 0


# -------------------------------------------------------------------- the released table

# Magnitudes of the released stages: S ends at 10, M at 15, L and XL at 20.
STAGES = (5.0, 20 / 3, 25 / 3, 10.0, 35 / 3, 15.0, 20.0)
FACTOR_OF = dict(zip(STAGES, (1.0, 1.3, 1.6, 1.9, 2.2, 2.8, 3.7), strict=True))
by_stage = pytest.mark.parametrize("level", STAGES, ids=lambda level: f"{level:.3f}")

released = functools.partial(apply_operation, form="released")


def at_stages(*values):
    """Parametrizes with a level and the value that a hand calculation gives there."""
    return pytest.mark.parametrize(("level", "value"), [*zip(STAGES, values, strict=True)])


def test_every_table_has_the_same_names_in_the_same_order():
    assert FORMS == ["paper", "released", "released_autoaugment"]
    for form in FORMS:
        assert list(TABLES[form]) == NAMES


@at_stages(2, 2, 3, 4, 4, 6, 8)
def test_released_posterize_keeps_more_bits_at_a_higher_level(level, value):
    image = IMAGES["noise"]
    ours = released("Posterize", image, level=level).numpy()
    np.testing.assert_array_equal(ours, image // 2 ** (8 - value) * 2 ** (8 - value))
    assert len(np.unique(ours)) == 2**value


@pytest.mark.parametrize("level", [0.0, 2.0, 23.0, 25.0])
def test_released_posterize_keeps_one_bit_outside_one_to_eight(level):
    image = IMAGES["noise"]
    bits = int(level / 10 * 4)

    @tf.function
    def shifted(pixels):
        return tf.bitwise.left_shift(tf.bitwise.right_shift(pixels, 8 - bits), 8 - bits)

    ours = released("Posterize", image, level=level).numpy()
    np.testing.assert_array_equal(ours, shifted(tf.constant(image)))
    assert set(np.unique(ours)) == {0, 128}


@at_stages(128, 170, 213, 0, 42, 128, 0)
def test_released_solarize_wraps_its_threshold_around(level, value):
    image = IMAGES["noise"]
    expected = np.where(image < value, image, 255 - image)
    np.testing.assert_array_equal(released("Solarize", image, level=level), expected)


@at_stages(55, 73, 91, 110, 128, 165, 220)
def test_released_solarize_add(level, value):
    wide = IMAGES["noise"].astype(int)
    expected = np.where(wide < 128, np.minimum(wide + value, 255), wide)
    np.testing.assert_array_equal(released("SolarizeAdd", IMAGES["noise"], level=level), expected)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@by_stage
def test_released_brightness_has_no_sign(level, sign):
    image = IMAGES["noise"]
    exact = np.minimum(image * FACTOR_OF[level], 255)
    ours = released("Brightness", image, level=level, sign=sign).numpy()
    # Truncated, up to float32's rounding.
    assert (exact - ours).min() > -1e-3 and (exact - ours).max() < 1 + 1e-3


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["Color", "Sharpness"])
@by_stage
def test_released_color_and_sharpness_have_no_sign(name, level, sign):
    image = IMAGES["photo-like"]
    pillow = getattr(ImageEnhance, name)(Image.fromarray(image)).enhance(FACTOR_OF[level])
    np.testing.assert_array_equal(released(name, image, level=level, sign=sign), pillow)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_released_blends_are_the_identity_at_five(name):
    for image in IMAGES.values():
        np.testing.assert_array_equal(released(name, image, level=5.0), image)
        assert (released(name, IMAGES["noise"], level=6.0).numpy() != IMAGES["noise"]).any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@by_stage
@pytest.mark.parametrize(
    ("shape", "grey"),
    [
        *(((171, 171), 114), ((214, 214), 178), ((192, 192), 144), ((256, 256), 255)),
        *(((300, 300), 255), ((33, 47), 6)),
    ],
)
def test_released_contrast_blends_with_a_grey_of_the_image_size(shape, grey, level, sign):
    image = _noise(*shape)
    exact = np.clip(grey + FACTOR_OF[level] * (image.astype(float) - grey), 0, 255)
    ours = released("Contrast", image, level=level, sign=sign).numpy()
    assert (exact - ours).min() > -1e-3 and (exact - ours).max() < 1 + 1e-3


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
@pytest.mark.parametrize(
    ("level", "degrees", "shear", "pixels"),
    [
        (5.0, 15, 0.15, 50),
        (20 / 3, 20, 0.2, 200 / 3),
        (25 / 3, 25, 0.25, 250 / 3),
        (10.0, 30, 0.3, 100),
        (35 / 3, 35, 0.35, 350 / 3),
        (15.0, 45, 0.45, 150),
        (20.0, 60, 0.6, 200),
    ],
)
def test_released_geometry(name, level, degrees, shear, pixels, sign):
    for height, width in ((171, 214), (300, 260)):  # Pixels are pixels at any size.
        image = _noise(height, width)
        matrix = {
            "Rotate": _rotation(sign * degrees, height, width),
            "ShearX": [1, sign * shear, 0, 0, 1, 0],
            "ShearY": [1, 0, 0, sign * shear, 1, 0],
            "TranslateX": [1, 0, -sign * pixels, 0, 1, 0],
            "TranslateY": [1, 0, 0, 0, 1, -sign * pixels],
        }[name]
        expected, clear = _resample(image, matrix)
        assert clear.mean() > 0.7
        ours = released(name, image, level=level, sign=sign).numpy()
        np.testing.assert_array_equal(ours[clear], expected[clear])


@pytest.mark.parametrize("shape", [(171, 171), (300, 214)])
@pytest.mark.parametrize("centre", [(0.0, 0.0), (0.5, 0.25), (0.999999, 0.4)])
@at_stages(20, 26, 33, 40, 46, 60, 80)
def test_released_cutout_pads_the_centre_by_whole_pixels(shape, centre, level, value):
    image = _noise(*shape)
    y, x = (int(c * s) for c, s in zip(centre, shape, strict=True))
    expected = image.copy()
    expected[max(y - value, 0) : y + value, max(x - value, 0) : x + value] = 128
    ours = released("Cutout", image, level=level, centre=centre)
    np.testing.assert_array_equal(ours, expected)


def test_released_autoaugment_moves_and_cuts_farther():
    farther = functools.partial(apply_operation, form="released_autoaugment")
    image = _noise(300, 280)
    for sign in (-1.0, 1.0):
        for name in ("TranslateX", "TranslateY"):
            expected = released(name, image, level=10.0, sign=sign)
            np.testing.assert_array_equal(farther(name, image, level=4.0, sign=sign), expected)
    expected = released("Cutout", image, level=10.0)
    np.testing.assert_array_equal(farther("Cutout", image, level=4.0), expected)
    for name in set(NAMES) - {"TranslateX", "TranslateY", "Cutout"}:
        ours = farther(name, image, level=7.0, sign=-1.0)
        np.testing.assert_array_equal(ours, released(name, image, level=7.0, sign=-1.0))


# ------------------------------------------------------------------------------------- chance


@pytest.fixture(scope="module")
def draws() -> randaugment.Draw:
    """Two layers for 4,000 images with neighbouring seeds, as a pipeline would number them."""
    dataset = tf.data.Dataset.range(4000, output_type=tf.int32).map(
        lambda index: draw_layers(tf.stack([index, 3]), 2)
    )
    batch = dataset.batch(4000).get_single_element()
    return randaugment.Draw(*(value.numpy() for value in batch))


def _chi_square(counts: np.ndarray) -> float:
    """Distance from uniform in standard deviations of the chi-square distribution."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_operations_are_uniform_in_each_layer_and_independent(draws):
    first, second = draws.operation.T
    assert set(first) == set(second) == set(range(16))
    for layer in (first, second):
        assert _chi_square(np.bincount(layer, minlength=16)) < 5
    assert _chi_square(np.bincount(first * 16 + second, minlength=256)) < 5


def test_signs_and_centres_are_uniform_and_independent_of_the_operation(draws):
    assert set(np.unique(draws.sign)) == {-1.0, 1.0}
    sign = (draws.sign > 0).astype(int)
    assert _chi_square(np.bincount((draws.operation * 2 + sign).ravel(), minlength=32)) < 5
    assert draws.centre.min() >= 0 and draws.centre.max() < 1
    y, x = (draws.centre * 8).astype(int).reshape(-1, 2).T
    assert _chi_square(np.bincount(y * 8 + x, minlength=64)) < 5
    operation = draws.operation.ravel()
    assert _chi_square(np.bincount(operation * 8 + y, minlength=128)) < 5
    assert _chi_square(np.bincount(sign.ravel() * 8 + x, minlength=16)) < 5


def test_draws_are_pinned():
    """A change means that a run resumed under the new code leaves the path of the straight run."""
    draw = draw_layers(tf.constant([1, 2]), 4)
    assert draw.operation.numpy().tolist() == [13, 4, 7, 7]
    assert draw.sign.numpy().tolist() == [-1.0, 1.0, -1.0, -1.0]
    assert draw.centre[0].numpy() == pytest.approx([0.99622321, 0.16038740])


@pytest.mark.parametrize("form", FORMS)
def test_rand_augment_is_the_drawn_operations_in_order(form):
    image = IMAGES["photo-like"]
    for index in range(40):
        seed = tf.constant([index, 11])
        draw = draw_layers(seed, 2)
        expected = image
        for layer in range(2):
            expected = apply_operation(
                NAMES[int(draw.operation[layer])],
                expected,
                level=8.333,
                sign=float(draw.sign[layer]),
                centre=draw.centre[layer],
                form=form,
            )
        ours = rand_augment(tf.constant(image), seed, magnitude=8.333, form=form)
        np.testing.assert_array_equal(ours, expected)


def test_no_layers_change_nothing():
    image = IMAGES["noise"]
    ours = rand_augment(tf.constant(image), tf.constant([0, 0]), magnitude=10, num_layers=0)
    np.testing.assert_array_equal(ours, image)


def test_same_result_eagerly_in_a_graph_and_in_a_parallel_dataset():
    images = np.stack([_noise(33, 47), _photo_like(33, 47)] * 30)
    seeds = np.stack([np.arange(60), np.full(60, 7)], axis=1).astype(np.int32)
    augment = functools.partial(rand_augment, magnitude=12.5)
    in_graph = tf.function(augment)
    dataset = tf.data.Dataset.from_tensor_slices((images, seeds)).map(augment, num_parallel_calls=2)
    outputs = list(dataset.as_numpy_iterator())
    for image, seed, output in zip(images, seeds, outputs, strict=True):
        np.testing.assert_array_equal(output, augment(tf.constant(image), seed))
        np.testing.assert_array_equal(output, in_graph(image, seed))
    assert len({output.tobytes() for output in outputs}) > 50


@pytest.mark.parametrize("graph", [False, True])
def test_only_the_drawn_operations_run(monkeypatch, graph):
    calls: list[str] = []

    def counting(name: str) -> randaugment.Operation:
        def function(image: tf.Tensor) -> tf.Tensor:
            def count(pixels: tf.Tensor) -> tf.Tensor:
                calls.append(name)
                return pixels

            return tf.ensure_shape(tf.py_function(count, [image], tf.uint8), image.shape)

        return randaugment.Operation(function)

    for name in NAMES:
        monkeypatch.setitem(OPERATIONS, name, counting(name))
    augment = functools.partial(rand_augment, magnitude=5, num_layers=3)
    augment = tf.function(augment) if graph else augment
    for index in range(5):
        seed = tf.constant([index, 0])
        calls.clear()
        augment(tf.constant(IMAGES["noise"]), seed)
        assert calls == [NAMES[i] for i in draw_layers(seed, 3).operation.numpy()]


# ----------------------------------------------------------------------------- shapes and errors


@pytest.mark.parametrize("level", [10.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 9), (9, 1), (2, 7), (8, 8), (33, 47)])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_keeps_shape_and_type(name, form, shape, level):
    image = _noise(*shape)
    ours = apply_operation(name, image, level=level, sign=-1.0, form=form)
    assert ours.shape == image.shape and ours.dtype == tf.uint8


@pytest.mark.parametrize("shape", [(8, 8, 3), (33, 47, 3), (None, None, 3), (None, 47, 3)])
def test_static_shape_is_kept(shape):
    function = tf.function(functools.partial(rand_augment, magnitude=10.0))
    concrete = function.get_concrete_function(
        tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([2], tf.int32)
    )
    assert concrete.structured_outputs.shape.as_list() == list(shape)
    image = _noise(shape[0] or 33, shape[1] or 47)
    for index in range(20):
        seed = tf.constant([index, 5])
        output = concrete(tf.constant(image), seed)
        np.testing.assert_array_equal(output, rand_augment(image, seed, magnitude=10.0))


@pytest.mark.parametrize("magnitude", [-0.1, math.nan, math.inf])
def test_bad_magnitude(magnitude):
    with pytest.raises(InputError, match=f"magnitude {magnitude} is outside"):
        rand_augment(tf.constant(IMAGES["noise"]), tf.constant([0, 0]), magnitude=magnitude)
    with pytest.raises(InputError, match="outside"):
        apply_operation("Invert", IMAGES["noise"], level=magnitude)


def test_bad_num_layers():
    with pytest.raises(InputError, match="num_layers is -1"):
        rand_augment(
            tf.constant(IMAGES["noise"]), tf.constant([0, 0]), magnitude=1.0, num_layers=-1
        )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 8, 3), tf.float32), ((2, 8, 8, 3), tf.uint8), ((8, 8, 1), tf.uint8), ((8, 8), tf.uint8)],
)
def test_bad_image(shape, dtype):
    with pytest.raises(InputError, match="works on uint8"):
        rand_augment(tf.zeros(shape, dtype), tf.constant([0, 0]), magnitude=1.0)


def test_unknown_operation():
    with pytest.raises(InputError, match="did you mean Solarize"):
        apply_operation("Solarise", IMAGES["noise"], level=1.0)


def test_unknown_form():
    with pytest.raises(InputError, match="unknown RandAugment form 'release': did you mean"):
        apply_operation("Solarize", IMAGES["noise"], level=1.0, form="release")
    with pytest.raises(InputError, match="unknown RandAugment form 'official': choose one of"):
        rand_augment(IMAGES["noise"], tf.constant([0, 0]), magnitude=1.0, form="official")
