"""Label weights and losses against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.losses import Loss, multi_hot, sigmoid_cross_entropy, softmax_cross_entropy


def soft_labels(num_examples, num_classes, seed=0):
    weights = np.random.default_rng(seed).random((num_examples, num_classes))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def numpy_cross_entropy(logits, labels):
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -(labels * log_softmax).sum(-1)


def test_multi_hot_of_single_and_of_several_labels():
    np.testing.assert_array_equal(multi_hot(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    several = multi_hot(jnp.array([[1, -1, -1], [2, 0, 2]]), 4)
    # A label that stands twice weighs once, and -1 is padding.
    np.testing.assert_array_equal(several, [[0, 1, 0, 0], [1, 0, 1, 0]])
    assert several.dtype == jnp.float32


def test_several_labels_share_the_weight_under_softmax_alone():
    """Section 5.2 of the paper: normalised to sum 1."""
    labels = jnp.array([[1.0, 0, 1, 1, 0], [0, 1.0, 0, 0, 0]])
    thirds = [[1 / 3, 0, 1 / 3, 1 / 3, 0], [0, 1, 0, 0, 0]]
    np.testing.assert_allclose(Loss("softmax").targets(labels), thirds, rtol=1e-6)
    np.testing.assert_array_equal(Loss("sigmoid").targets(labels), labels)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_softmax_with_smoothed_soft_labels(label_smoothing):
    """Smoothing follows mixing, so an example may have two labels."""
    logits = np.random.default_rng(1).normal(size=(6, 11)).astype(np.float32)
    labels = soft_labels(6, 11)
    smoothed = (1 - label_smoothing) * labels + label_smoothing / 11
    loss = Loss("softmax", label_smoothing)(logits, labels)
    np.testing.assert_allclose(loss, numpy_cross_entropy(logits, smoothed), rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_sum"])
def test_sigmoid_is_binary_cross_entropy_of_each_class(kind, label_smoothing):
    rng = np.random.default_rng(1)
    logits = 5 * rng.normal(size=(6, 11))
    labels = rng.integers(0, 2, (6, 11)).astype(np.float64)
    # Towards one half, not towards 1 / 11.
    smoothed = labels * (1 - label_smoothing) + label_smoothing / 2
    probability = 1 / (1 + np.exp(-logits))
    losses = -(smoothed * np.log(probability) + (1 - smoothed) * np.log(1 - probability))
    expected = losses.mean(-1) if kind == "sigmoid" else losses.sum(-1)
    loss = Loss(kind, label_smoothing)(jnp.float32(logits), jnp.float32(labels))
    assert loss.shape == (6,)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_sigmoid_cross_entropy_does_not_overflow():
    losses = sigmoid_cross_entropy(jnp.array([1e30, -1e30]), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(losses, [0.0, 0.0])


def test_losses_that_cannot_be():
    with pytest.raises(InputError, match=r"unknown loss\.kind 'softmx': did you mean softmax"):
        Loss("softmx")
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=f"label_smoothing is {value}: it must be at least 0"):
            Loss("softmax", value)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_cross_entropy(scale):
    logits = scale * np.random.default_rng(1).normal(size=(7, 13)).astype(np.float32)
    labels = soft_labels(7, 13)
    loss = softmax_cross_entropy(logits, labels)
    assert loss.shape == (7,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, numpy_cross_entropy(logits, labels), rtol=1e-5)


def test_cross_entropy_of_hard_labels():
    """The label's weight on the logarithm of its own probability."""
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]))
    loss = softmax_cross_entropy(logits + 3.0, jax.nn.one_hot(jnp.array([2, 0]), 3))
    np.testing.assert_allclose(loss, -np.log([0.7, 0.5]), rtol=1e-5)


def test_cross_entropy_does_not_overflow():
    logits = jnp.array([[1e30, 0.0, -1e30]])
    assert softmax_cross_entropy(logits, jnp.array([[1.0, 0.0, 0.0]]))[0] == 0.0
    assert softmax_cross_entropy(logits, jnp.array([[0.0, 1.0, 0.0]]))[0] == np.float32(1e30)


def test_equal_logits_cost_the_logarithm_of_the_classes():
    loss = softmax_cross_entropy(jnp.zeros((3, 1000)), soft_labels(3, 1000))
    np.testing.assert_allclose(loss, np.log(1000), rtol=1e-5)


def test_gradient_is_probability_minus_label():
    logits = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    labels = soft_labels(4, 6)
    gradient = jax.grad(lambda x: softmax_cross_entropy(x, labels).sum())(logits)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - labels, atol=1e-6)
