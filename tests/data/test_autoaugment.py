"""AutoAugment: its table, its chances, and that an image gets exactly what was drawn."""

from __future__ import annotations

import collections
import hashlib
import math

import numpy as np
import pytest
import tensorflow as tf

from effnetv2_jax.data import autoaugment
from effnetv2_jax.data.autoaugment import POLICY_V0, Draw, auto_augment, draw_sub_policy
from effnetv2_jax.data.randaugment import TABLES, apply_operation
from effnetv2_jax.errors import InputError

# High enough that the one translation of the policy, by 225 pixels, leaves something.
IMAGE = np.random.default_rng(0).integers(0, 256, (240, 20, 3)).astype(np.uint8)


def test_the_policy_is_the_released_one():
    """A change here redefines the training of B0 to B3, and every resumed run."""
    text = ";".join(
        " ".join(f"{step.operation} {step.probability:.1f} {step.level}" for step in steps)
        for steps in POLICY_V0
    )
    assert text.startswith("Equalize 0.8 1 ShearY 0.8 4;Color 0.4 9 Equalize 0.6 3;")
    assert text.endswith(";Solarize 0.6 8 Equalize 0.6 1;Color 0.8 6 Rotate 0.4 5")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "60f0c7ce79b1be1d"


def test_the_policy_uses_these_operations():
    steps = [step for steps in POLICY_V0 for step in steps]
    assert len(POLICY_V0) == 25 and len(steps) == 50
    counts = collections.Counter(step.operation for step in steps)
    often = {"Equalize": 12, "Color": 9, "Solarize": 8, "Rotate": 7, "ShearY": 4}
    twice = dict.fromkeys(["SolarizeAdd", "ShearX", "Posterize", "AutoContrast"], 2)
    assert counts == often | twice | {"Invert": 1, "TranslateY": 1}
    assert {step.operation for step in steps} <= set(TABLES["released_autoaugment"])


@pytest.fixture(scope="module")
def draws() -> Draw:
    """For 20,000 images with neighbouring seeds, as a pipeline would number them."""
    dataset = tf.data.Dataset.range(20_000, output_type=tf.int32).map(
        lambda index: draw_sub_policy(tf.stack([index, 3]))
    )
    return Draw(*(value.numpy() for value in dataset.batch(20_000).get_single_element()))


def _chi_square(counts: np.ndarray) -> float:
    """Distance from uniform in standard deviations of the chi-square distribution."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_sub_policies_and_signs_are_uniform_and_independent(draws):
    assert _chi_square(np.bincount(draws.sub_policy, minlength=25)) < 5
    assert set(np.unique(draws.sign)) == {-1.0, 1.0}
    first, second = (draws.sign > 0).astype(int).T
    assert _chi_square(np.bincount(draws.sub_policy * 4 + first * 2 + second, minlength=100)) < 5


def test_each_operation_applies_with_its_probability(draws):
    for index, steps in enumerate(POLICY_V0):
        applies = draws.applies[draws.sub_policy == index]
        for step, rate in zip(steps, applies.mean(axis=0), strict=True):
            deviation = math.sqrt(step.probability * (1 - step.probability) / len(applies))
            assert abs(rate - step.probability) <= 4.5 * deviation
        # Independent: both apply as often as the product says.
        both = math.prod(step.probability for step in steps)
        deviation = math.sqrt(both * (1 - both) / len(applies))
        assert abs(applies.all(axis=1).mean() - both) <= 4.5 * deviation + 1e-6


def test_signs_do_not_depend_on_whether_an_operation_applies(draws):
    sign, applies = draws.sign[draws.sub_policy == 7], draws.applies[draws.sub_policy == 7]
    for position in range(2):  # ShearX 0.2, Rotate 0.6.
        positive = sign[applies[:, position], position] > 0
        assert abs(positive.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(positive))


def test_draws_are_pinned():
    """A change means that a run resumed under the new code leaves the path of the straight run."""
    draws = [draw_sub_policy(tf.constant([1, second])) for second in range(6)]
    assert [int(draw.sub_policy) for draw in draws] == [21, 2, 21, 21, 1, 12]
    assert "".join(str(int(a)) for draw in draws for a in draw.applies) == "001110101011"
    assert "".join("+-"[int(s < 0)] for draw in draws for s in draw.sign) == "--------+-+-"


def _by_hand(image: np.ndarray, draw: Draw) -> tf.Tensor:
    for position, step in enumerate(POLICY_V0[int(draw.sub_policy)]):
        if draw.applies[position]:
            image = apply_operation(
                step.operation,
                image,
                level=step.level,
                sign=float(draw.sign[position]),
                form="released_autoaugment",
            )
    return image


def test_an_image_gets_the_drawn_operations_in_order():
    seen = set()
    for index in range(120):
        seed = tf.constant([index, 11])
        draw = draw_sub_policy(seed)
        seen.add(int(draw.sub_policy))
        np.testing.assert_array_equal(auto_augment(IMAGE, seed), _by_hand(IMAGE, draw))
    assert len(seen) == 25


def test_same_result_in_a_graph_and_in_a_parallel_dataset():
    in_graph = tf.function(auto_augment)
    seeds = np.stack([np.arange(60), np.full(60, 7)], axis=1).astype(np.int32)
    dataset = tf.data.Dataset.from_tensor_slices(seeds)
    dataset = dataset.map(lambda seed: auto_augment(tf.constant(IMAGE), seed), num_parallel_calls=2)
    outputs = list(dataset.as_numpy_iterator())
    for seed, output in zip(seeds, outputs, strict=True):
        np.testing.assert_array_equal(output, auto_augment(IMAGE, seed))
        np.testing.assert_array_equal(output, in_graph(tf.constant(IMAGE), seed))
    assert len({output.tobytes() for output in outputs}) > 20


@pytest.mark.parametrize("graph", [False, True])
def test_only_the_drawn_operations_run(monkeypatch, graph):
    calls: list[tuple[str, float]] = []

    def counting(name: str, image: tf.Tensor, *, level: float, **_) -> tf.Tensor:
        def count(pixels: tf.Tensor) -> tf.Tensor:
            calls.append((name, level))
            return pixels

        return tf.ensure_shape(tf.py_function(count, [image], tf.uint8), image.shape)

    monkeypatch.setattr(autoaugment, "apply_operation", counting)
    augment = tf.function(auto_augment) if graph else auto_augment
    for index in range(20):
        seed = tf.constant([index, 0])
        calls.clear()
        augment(tf.constant(IMAGE), seed)
        draw = draw_sub_policy(seed)
        steps = zip(POLICY_V0[int(draw.sub_policy)], draw.applies, strict=True)
        assert calls == [(step.operation, step.level) for step, applies in steps if applies]


@pytest.mark.parametrize("shape", [(240, 20, 3), (None, None, 3)])
def test_static_shape_is_kept(shape):
    concrete = tf.function(auto_augment).get_concrete_function(
        tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([2], tf.int32)
    )
    assert concrete.structured_outputs.shape.as_list() == list(shape)
    assert concrete.structured_outputs.dtype == tf.uint8


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 3), tf.float32), ((2, 8, 8, 3), tf.uint8)])
def test_bad_image(shape, dtype):
    with pytest.raises(InputError, match=r"AutoAugment got a .* works on uint8"):
        auto_augment(tf.zeros(shape, dtype), tf.constant([0, 0]))
