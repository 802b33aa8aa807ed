"""The moving average against TF1's, and the state before the first step."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effnetv2_jax.train_state import WINDOW_METRICS, create_train_state, update_ema


def rate_of_change(num_updates: int, decay: float) -> float:
    """1 - the effective decay, which a step from 0 towards 1 shows without rounding."""
    return float(update_ema(jnp.float32(0), jnp.float32(1), jnp.int32(num_updates), decay))


@pytest.mark.parametrize(
    ("num_updates", "decay"),
    [(1, 2 / 11), (2, 3 / 12), (10, 11 / 20), (100, 101 / 110), (10_000, 10_001 / 10_010)],
)
def test_decay_of_the_first_updates(num_updates, decay):
    assert rate_of_change(num_updates, 0.9999) == pytest.approx(1 - decay, rel=1e-3)


def test_the_cap_is_reached_at_step_89990():
    capped = rate_of_change(10**9, 0.9999)
    assert capped == pytest.approx(1e-4, rel=1e-3)  # float32 gives 1.00017e-4, as in TF1.
    assert rate_of_change(89_990, 0.9999) == capped
    # Nearer to it, float32 does not tell the two apart.
    assert rate_of_change(89_000, 0.9999) > capped
    assert rate_of_change(89_990, 0.99995) == pytest.approx(1e-4, rel=1e-3)
    # The released fine-tuning runs, of 10,000 steps, never reach theirs.
    assert rate_of_change(22_490, 0.9996) == pytest.approx(4e-4, rel=1e-3)
    assert rate_of_change(10_000, 0.9996) == pytest.approx(9 / 10_010, rel=1e-3)


def test_decay_0_follows_the_values():
    assert rate_of_change(1000, 0.0) == 1.0


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_average_is_that_of_tf1(decay):
    """tf.compat.v1.train.ExponentialMovingAverage(decay, num_updates) over 50 steps."""
    rng = np.random.default_rng(0)
    values = [
        {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": {"c": np.float32(step)}}
        for step in range(51)
    ]
    average = jax.tree.map(jnp.asarray, values[0])
    expected = values[0]
    update = jax.jit(update_ema, static_argnums=3)
    for step in range(1, 51):
        average = update(average, values[step], jnp.int32(step), decay)
        rate = np.float32(1) - np.float32(min(decay, (1 + step) / (10 + step)))
        expected = jax.tree.map(lambda e, v, r=rate: e - (e - v) * r, expected, values[step])
        for actual, wanted in zip(jax.tree.leaves(average), jax.tree.leaves(expected), strict=True):
            assert actual.dtype == jnp.float32
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(average) == jax.tree.structure(expected)


def test_an_average_of_equal_values_stays_put():
    value = jnp.float32(0.1)
    for step in (1, 50, 100_000):
        assert update_ema(value, value, jnp.int32(step), 0.9999) == value


class Small(nn.Module):
    """The two collections that create_train_state expects."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), name="conv")(images)
        return nn.BatchNorm(use_running_average=True, name="bn")(x).mean((1, 2))


@pytest.fixture(scope="module")
def state():
    return create_train_state(Small(), optax.sgd(0.1, 0.9), jax.random.key(0), image_size=8)


def test_counters_and_window_before_the_first_step(state):
    assert state.step == 0 and state.step.dtype == jnp.int32 and state.step.shape == ()
    assert state.nonfinite_step == -1 and state.nonfinite_step.dtype == jnp.int32
    assert set(state.window) == set(WINDOW_METRICS)
    assert all(value == 0 and value.dtype == jnp.float32 for value in state.window.values())


def test_initial_values_are_those_of_the_model(state):
    variables = Small().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, variables["batch_stats"])
    other = create_train_state(Small(), optax.identity(), jax.random.key(1), image_size=8)
    assert np.any(other.params["conv"]["kernel"] != state.params["conv"]["kernel"])
    slots = [s for s in jax.tree.leaves(state.opt_state) if s.ndim]
    assert len(slots) == len(jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("averages", "values"), [("ema_params", "params"), ("ema_batch_stats", "batch_stats")]
)
def test_averages_start_at_the_values_in_buffers_of_their_own(state, averages, values):
    averages, values = getattr(state, averages), getattr(state, values)
    assert jax.tree.structure(averages) == jax.tree.structure(values)
    pairs = list(zip(jax.tree.leaves(averages), jax.tree.leaves(values), strict=True))
    assert len(pairs) >= 2
    for average, value in pairs:
        np.testing.assert_array_equal(average, value)
        assert average is not value
        assert average.unsafe_buffer_pointer() != value.unsafe_buffer_pointer()


def test_no_buffer_occurs_twice(state):
    """The train step takes over the buffers of its state, each of which it can do once."""
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
