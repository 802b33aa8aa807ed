"""Predictions against the network applied to images that NumPy and Pillow prepared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from effnetv2_jax.data.label_space import LabelSpace, imagenet1k_label_space
from effnetv2_jax.errors import InputError
from effnetv2_jax.prediction import (
    Predictor,
    class_labels,
    grad_cam,
    overlay,
    stack_endpoints,
)
from tests.tiny_model import EVAL_SIZE, save_tiny_model, tiny_spec, tiny_variables


def noise(seed, height=64, width=96):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven PNG files of 64 x 96 pixels, with blanks and other letters in their names."""
    folder = tmp_path_factory.mktemp("images with blanks")
    paths = [folder / f"Größe {number} 猫.png" for number in range(11)]
    for number, path in enumerate(paths):
        Image.fromarray(noise(number)).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def model():
    spec = tiny_spec()
    return spec.create_model(), tiny_variables(spec), spec


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model, batch_size=4)


def squashed(pixels):
    """64 x 96 to 32 x 32, bilinear: the mean of two rows, and the middle of three columns."""
    middle = pixels[:, 1::3].astype(int)
    return (middle[::2] + middle[1::2]) // 2


def expected_endpoints(model, prepared):
    """All endpoints of uint8 images [N, S, S, 3]."""
    network, variables, spec = model
    normalized = (np.asarray(prepared, np.float32) - spec.mean) / spec.std
    return network.apply(variables, jnp.asarray(normalized, jnp.float32), return_features=True)


def softmax(logits):
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def assert_classes(prediction, probabilities, count=5):
    best = np.argsort(-probabilities)[:count]
    assert [scored.index for scored in prediction.classes] == best.tolist()
    found = [scored.probability for scored in prediction.classes]
    np.testing.assert_allclose(found, probabilities[best], rtol=1e-4, atol=1e-6)


def center(pixels, top, left, side=32):
    return pixels[top : top + side, left : left + side]


# Sizes at which the rule's resize keeps every pixel or has a simple form. The central square of
# 64 rows has 32 at 32 px.
CROPS = {
    "squash": (64, 96, {"crop": "squash"}, squashed),
    "center": (64, 81, {"crop": "center"}, functools.partial(center, top=16, left=24)),
    "released": (64, 81, {"crop": "released"}, functools.partial(center, top=16, left=24)),
    "legacy": (
        64,
        81,
        {"crop": "legacy", "resize": "bicubic"},
        functools.partial(center, top=16, left=25),
    ),
    "fraction": (
        40,
        50,
        {"crop": "center", "crop_fraction": 0.8},
        functools.partial(center, top=4, left=9),
    ),
}


@pytest.mark.parametrize(
    ("crop", "scores"), [("squash", "sigmoid"), *((crop, "softmax") for crop in CROPS)]
)
def test_a_prediction_is_the_network_on_the_prepared_image(tmp_path, crop, scores):
    height, width, overrides, prepare = CROPS[crop]
    pixels = noise(3, height, width)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    spec = tiny_spec(scores=scores, **overrides)
    model = spec.create_model(), tiny_variables(spec), spec
    (prediction,) = Predictor(model).predict([tmp_path / "image.png"])
    logits = np.asarray(expected_endpoints(model, prepare(pixels)[None])["logits"][0], float)
    assert_classes(prediction, (softmax if scores == "softmax" else sigmoid)(logits))
    assert prediction.path == str(tmp_path / "image.png")


def test_antialias_is_pillows(tmp_path):
    pixels = noise(4, 80, 100)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    spec = tiny_spec(resize="bicubic_antialias")
    model = spec.create_model(), tiny_variables(spec), spec
    (prediction,) = Predictor(model).predict([tmp_path / "image.png"], cam=True)
    small = Image.fromarray(pixels).resize((EVAL_SIZE, EVAL_SIZE), Image.Resampling.BICUBIC)
    # Pillow rounds where we truncate.
    assert np.abs(prediction.image.astype(int) - np.asarray(small)).max() <= 1


def test_a_model_folder_predicts_as_its_parts(tmp_path, images, predictor):
    folder = save_tiny_model(tmp_path / "model")
    for ours, theirs in zip(
        Predictor(folder).predict(images[:2]), predictor.predict(images[:2]), strict=True
    ):
        assert ours.classes == theirs.classes


@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_batch_size_and_padding_change_nothing(images, model, batch_size):
    predictions = list(Predictor(model, batch_size=batch_size).predict(images, top_k=7))
    assert [prediction.path for prediction in predictions] == images
    logits = expected_endpoints(model, [squashed(noise(number)) for number in range(11)])["logits"]
    for prediction, probabilities in zip(predictions, softmax(np.asarray(logits)), strict=True):
        assert_classes(prediction, probabilities, count=7)
        found = {scored.index: scored.probability for scored in prediction.classes}
        np.testing.assert_allclose([found[i] for i in range(7)], probabilities, atol=1e-5)


class Counted:
    """A network that counts how often it is traced, and for how many images."""

    def __init__(self, network):
        self.network, self.traced = network, []

    def apply(self, variables, images, **options):
        self.traced.append(len(images))
        return self.network.apply(variables, images, **options)


def test_every_batch_of_a_call_is_one_program(images, model):
    network, variables, spec = model
    counted = Counted(network)
    predictor = Predictor((counted, variables, spec), batch_size=4)
    list(predictor.predict(images))
    list(predictor.predict(images[:3]))
    assert counted.traced == [4]
    list(predictor.predict(images[:1]))  # One image is not padded to four.
    assert counted.traced == [4, 1]


def test_devices_share_a_batch_that_they_divide(images, model):
    network, variables, spec = model
    assert jax.device_count() == 8
    counted = Counted(network)
    predictor = Predictor((counted, variables, spec), batch_size=19)  # 16 of them at once.
    shared = predictor.predict(images, endpoints=["pooled"], cam=True)
    alone = Predictor(model, batch_size=3).predict(images, endpoints=["pooled"], cam=True)
    for one, other in zip(shared, alone, strict=True):
        assert one.path == other.path
        np.testing.assert_allclose(
            one.endpoints["pooled"], other.endpoints["pooled"], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(one.cam, other.cam, rtol=1e-4, atol=1e-5)
    assert counted.traced == [1, 2]  # The shapes of the endpoints, then two images each.


def test_a_broken_image_is_named_and_the_others_go_on(tmp_path, images, predictor):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing more")
    paths = [*images[:5], str(broken), *images[5:]]
    predictions = list(predictor.predict(paths, endpoints=["pooled"], cam=True))
    assert [prediction.path for prediction in predictions] == paths
    assert predictions[5].error == "is no JPEG, PNG, BMP or GIF image, or is damaged"
    assert predictions[5].classes == () and predictions[5].cam is None
    rest = [p for p in predictions if p.error is None]
    for prediction, alone in zip(rest, predictor.predict(images), strict=True):
        np.testing.assert_allclose(
            [scored.probability for scored in prediction.classes],
            [scored.probability for scored in alone.classes],
            atol=1e-6,
        )


def test_no_images_are_no_predictions(predictor):
    assert list(predictor.predict([])) == []


def test_features_are_the_endpoints_of_the_network(images, model, predictor):
    names = ("pooled", "reduction_1", "reduction_3", "features", "logits")
    expected = expected_endpoints(model, [squashed(noise(number)) for number in range(11)])
    shapes = {name: predictor.endpoint_shapes()[name] for name in names}
    arrays = stack_endpoints(predictor.predict(images, endpoints=names), shapes)
    assert arrays.pop("paths").tolist() == images
    assert list(arrays) == list(names)
    for name in names:
        assert arrays[name].shape == (11, *shapes[name]) and arrays[name].dtype == np.float32
        np.testing.assert_allclose(arrays[name], expected[name], rtol=1e-4, atol=1e-5)


def test_features_of_no_image_keep_their_shape(predictor):
    arrays = stack_endpoints([], {"pooled": (5,)})
    assert arrays["pooled"].shape == (0, 5) and arrays["paths"].shape == (0,)


def test_the_map_of_a_class_that_sees_one_channel_is_that_channel(images, model):
    network, variables, spec = model
    height, width, channels = 2, 2, variables["params"]["classifier"]["kernel"].shape[0]
    features = np.asarray(
        expected_endpoints(model, [squashed(noise(number)) for number in range(4)])["features"]
    )
    # A channel with values of both signs in one image, so that the relu matters.
    signs = (features.min(axis=(1, 2)) < 0) & (features.max(axis=(1, 2)) > 0)
    image, channel = np.argwhere(signs)[0]
    kernel = np.zeros((channels, spec.num_classes), np.float32)
    kernel[channel, 2] = 3.0
    params = {
        **variables["params"],
        "classifier": {"kernel": kernel, "bias": np.eye(7, dtype=np.float32)[2] * 100},
    }
    predictor = Predictor((network, {**variables, "params": params}, spec), batch_size=2)
    prediction = list(predictor.predict(images[:4], cam=True))[image]
    assert prediction.classes[0].index == 2
    low = np.maximum(features[image, :, :, channel], 0) * 3.0 / (height * width)
    assert low.max() > 0 and low.min() == 0
    assert prediction.cam.shape == (EVAL_SIZE, EVAL_SIZE) and prediction.cam.dtype == np.float32
    # Bilinear interpolation keeps the centre of each quarter's outer part.
    corners = prediction.cam[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, low.reshape(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(prediction.cam.mean(), low.mean(), rtol=1e-4)
    assert prediction.image.shape == (EVAL_SIZE, EVAL_SIZE, 3)
    np.testing.assert_array_equal(prediction.image, squashed(noise(image)))


def test_grad_cam_is_what_automatic_differentiation_finds(images, model):
    found = expected_endpoints(model, [squashed(noise(number)) for number in range(4)])
    kernel, bias = (model[1]["params"]["classifier"][name] for name in ("kernel", "bias"))
    classes = jnp.array([0, 3, 3, 6])

    def head(features):
        return features.mean(axis=(1, 2)) @ kernel + bias

    # The head above is the network's.
    np.testing.assert_allclose(head(found["features"]), found["logits"], atol=1e-5)
    gradient = jax.grad(lambda f: head(f)[jnp.arange(4), classes].sum())(found["features"])
    weights = gradient.mean(axis=(1, 2))  # Equation 1 of the paper.
    expected = np.maximum(np.einsum("nhwc,nc->nhw", found["features"], weights), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(
        grad_cam(found["features"], kernel, classes), expected, rtol=1e-4, atol=1e-6
    )


def test_an_overlay_is_half_image_and_half_colour():
    image = np.full((4, 4, 3), 100, np.uint8)
    cam = np.zeros((4, 4), np.float32)
    cam[1, 2] = 1e-3
    painted = overlay(image, cam)
    assert painted.shape == (4, 4, 3) and painted.dtype == np.uint8
    # Inferno begins near black and ends in a light yellow.
    assert painted[0, 0].tolist() == [50, 50, 52]
    assert painted[1, 2].min() > 125 and painted[1, 2].argmin() == 2
    np.testing.assert_array_equal(overlay(image, np.zeros((4, 4))), painted[0, 0] + image * 0)


def test_bfloat16_features_are_float32(images, model):
    _, variables, spec = model
    half = Predictor((spec.create_model(dtype="bfloat16"), variables, spec))
    (prediction,) = half.predict(images[:1], endpoints=["pooled"], cam=True)
    assert prediction.endpoints["pooled"].dtype == np.float32
    assert prediction.cam.dtype == np.float32


def test_bad_arguments_are_refused_before_any_image_is_read(model, predictor):
    with pytest.raises(InputError, match="batch_size 0 must be 1 or more"):
        Predictor(model, batch_size=0)
    with pytest.raises(InputError, match="top_k 0 must be 1 or more classes"):
        predictor.predict(["gone"], top_k=0)
    with pytest.raises(InputError, match="unknown endpoint 'poled': did you mean pooled"):
        predictor.predict(["gone"], endpoints=["poled"])
    network, variables, spec = model
    unknown = dataclasses.replace(spec, crop="centre")
    with pytest.raises(InputError, match="unknown evaluation crop 'centre'"):
        Predictor((network, variables, unknown)).predict(["gone"])


def test_more_classes_than_there_are(images, predictor):
    (prediction,) = predictor.predict(images[:1], top_k=100)
    assert len(prediction.classes) == 7
    assert sum(scored.probability for scored in prediction.classes) == pytest.approx(1)


LETTERS = tuple("abcdefg")
SYNSETS = tuple(f"n0000000{number}" for number in range(7))


def test_where_class_names_come_from():
    indices = tuple(map(str, range(7)))
    assert class_labels(tiny_spec()) == (indices, indices)
    assert class_labels(tiny_spec(classes=LETTERS)) == (LETTERS, LETTERS)
    assert class_labels(tiny_spec(class_names=LETTERS)) == (indices, LETTERS)
    assert class_labels(tiny_spec(classes=SYNSETS, class_names=LETTERS)) == (SYNSETS, LETTERS)
    # Outputs beyond the classes stand for none.
    spare = (*LETTERS[:5], "5", "6")
    assert class_labels(tiny_spec(classes=LETTERS[:5])) == (spare, spare)
    # What the user gives goes before what the model says.
    spec = tiny_spec(classes=LETTERS)
    assert class_labels(spec, LabelSpace("mine", SYNSETS)) == (SYNSETS, SYNSETS)
    assert class_labels(spec, LabelSpace("mine", SYNSETS, LETTERS)) == (SYNSETS, LETTERS)


def test_a_thousand_classes_are_those_of_imagenet_unless_the_model_says_otherwise():
    known = imagenet1k_label_space()
    imagenet = (known.synsets, known.human_names)
    assert class_labels(tiny_spec(num_classes=1000)) == imagenet
    assert class_labels(tiny_spec(num_classes=1000, label_space="imagenet2012")) == imagenet
    assert class_labels(tiny_spec(num_classes=1000, classes=known.synsets)) == imagenet
    assert class_labels(tiny_spec(num_classes=1000, label_space="tfrecord:/data")) == imagenet
    numbers = tuple(map(str, range(1000)))
    assert class_labels(tiny_spec(num_classes=1000, label_space="folder")) == (numbers, numbers)
    letters = tuple(f"class {number}" for number in range(1000))
    assert class_labels(tiny_spec(num_classes=1000, classes=letters)) == (letters, letters)
    assert class_labels(tiny_spec(num_classes=1000, class_names=letters)) == (numbers, letters)


def test_some_synsets_of_imagenet_have_their_words():
    ids = (*LETTERS[:6], "n02123394")
    assert class_labels(tiny_spec(classes=ids)) == (ids, (*LETTERS[:6], "Persian cat"))


def test_a_label_space_of_another_size_is_refused(model):
    space = LabelSpace("mine", SYNSETS[:3])
    with pytest.raises(InputError, match="'mine' has 3 classes and the model 7: give the one"):
        Predictor(model, label_space=space)
