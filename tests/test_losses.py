"""Label smoothing and cross entropy against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.losses import smooth_labels, softmax_cross_entropy


def soft_labels(num_examples, num_classes, seed=0):
    weights = np.random.default_rng(seed).random((num_examples, num_classes))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def numpy_cross_entropy(logits, labels):
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -(labels * log_softmax).sum(-1)


def test_smoothing_of_a_hard_label():
    smoothed = smooth_labels(jax.nn.one_hot(jnp.array([2]), 4), 0.1)
    np.testing.assert_allclose(smoothed, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)
    assert smoothed.dtype == jnp.float32


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_smoothing_of_soft_labels(label_smoothing):
    """It follows mixing, so an example may have two labels."""
    labels = soft_labels(6, 11)
    smoothed = np.asarray(smooth_labels(labels, label_smoothing))
    expected = (1 - label_smoothing) * labels + label_smoothing / 11
    np.testing.assert_allclose(smoothed, expected, rtol=1e-6)
    np.testing.assert_allclose(smoothed.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(smoothed), np.argsort(labels))
    assert smoothed.min() >= label_smoothing / 11


def test_no_smoothing_changes_no_bit():
    labels = soft_labels(6, 11)
    np.testing.assert_array_equal(smooth_labels(labels, 0.0), labels)


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
