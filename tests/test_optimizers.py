"""RMSProp against a transcription of TF1's, and the learning rate against the released code's."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effnetv2_jax import create_model
from effnetv2_jax.errors import InputError
from effnetv2_jax.optimizers import decay_mask, learning_rate_schedule, make_optimizer

# ---------------------------------------------------------------------------------- RMSProp

PAPER = {"decay": 0.9, "momentum": 0.9, "epsilon": 1e-3, "weight_decay": 0.0, "clip_norm": 0.0}
NUM_STEPS = 20
RATES = np.linspace(0.0, 0.3, NUM_STEPS, dtype=np.float32)[::-1].copy()
RATES[:3] = (0.0, 0.01, 0.02)  # A warm-up, then a fall.


def schedule(step):
    return jnp.asarray(RATES)[step]


def initial_params():
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)},
        "bn": {
            "scale": np.ones(4, np.float32),
            "bias": rng.normal(size=4).astype(np.float32),
        },
    }


def gradients_over_time():
    """Gradients of changing scale: 0 at some steps, and for good in one entry."""
    rng = np.random.default_rng(1)

    def gradient(step):
        scale = 0.0 if step in (0, 7, 8) else 10.0 ** rng.integers(-3, 2)
        tree = jax.tree.map(
            lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), initial_params()
        )
        tree["conv"]["kernel"][0, 0] = 0.0
        return tree

    return [gradient(step) for step in range(NUM_STEPS)]


def follow(optimizer, gradients):
    """The parameters after every step."""
    params = jax.tree.map(jnp.asarray, initial_params())
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        path.append(jax.device_get(params))
    return path


def follow_tf1(gradients, weight_decay=0.0, clip_norm=math.inf):
    """tf.compat.v1.train.RMSPropOptimizer(lr, 0.9, 0.9, 1e-3) in float32 on loss + L2."""
    one = np.float32(1.0)
    decay, momentum, epsilon = np.float32(0.9), np.float32(0.9), np.float32(1e-3)
    params = initial_params()
    mean_square = jax.tree.map(np.ones_like, params)
    velocity = jax.tree.map(np.zeros_like, params)
    path = []
    for rate, gradient in zip(RATES, gradients, strict=True):
        gradient = jax.tree.map(np.copy, gradient)
        gradient["conv"]["kernel"] += np.float32(weight_decay) * params["conv"]["kernel"]
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
        if norm > clip_norm:
            gradient = jax.tree.map(lambda g, n=norm: g * np.float32(clip_norm / n), gradient)
        mean_square = jax.tree.map(
            lambda ms, g: ms + (g * g - ms) * (one - decay), mean_square, gradient
        )
        velocity = jax.tree.map(
            lambda mom, ms, g, lr=rate: momentum * mom + lr * g / np.sqrt(ms + epsilon),
            *(velocity, mean_square, gradient),
        )
        params = jax.tree.map(lambda p, mom: p - mom, params, velocity)
        path.append(params)
    return path


def largest_difference(path, other) -> float:
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), path, other)
    return max(jax.tree.leaves(differences))


TOLERANCE = 2e-5  # Of parameters that move by up to 10; float32 in another order.


def test_rmsprop_is_that_of_tf1():
    gradients = gradients_over_time()
    expected = follow_tf1(gradients)
    assert max(np.max(np.abs(p)) for p in jax.tree.leaves(expected)) > 1.0
    actual = follow(make_optimizer(schedule, **PAPER), gradients)
    assert largest_difference(actual, expected) < TOLERANCE
    # Without a gradient and a decay nothing moves, not even by rounding.
    assert {p["conv"]["kernel"][0, 0] for p in actual} == {initial_params()["conv"]["kernel"][0, 0]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_scale": 0.0},  # optax's default.
        {"eps_in_sqrt": False},
        {"momentum": None},
        {"nesterov": True},
        {"centered": True},
        {"decay": 0.99},
        {"eps": 1e-8},  # optax's default.
    ],
    ids=str,
)
def test_other_semantics_would_not_pass(wrong):
    right = {"decay": 0.9, "eps": 1e-3, "momentum": 0.9, "initial_scale": 1.0, "eps_in_sqrt": True}
    gradients = gradients_over_time()
    expected = follow_tf1(gradients)
    assert largest_difference(follow(optax.rmsprop(schedule, **right), gradients), expected) < (
        TOLERANCE
    )
    path = follow(optax.rmsprop(schedule, **(right | wrong)), gradients)
    assert largest_difference(path, expected) > 100 * TOLERANCE


def test_the_rate_applies_before_the_momentum():
    """A fallen rate does not slow down what was collected under the higher one."""
    gradients = gradients_over_time()
    late = optax.chain(
        optax.scale_by_rms(decay=0.9, eps=1e-3, initial_scale=1.0),
        optax.trace(0.9),
        optax.scale_by_learning_rate(schedule),
    )
    assert largest_difference(follow(late, gradients), follow_tf1(gradients)) > 100 * TOLERANCE


def test_weight_decay_is_l2_on_kernels_through_rmsprop():
    gradients = gradients_over_time()
    optimizer = make_optimizer(schedule, **(PAPER | {"weight_decay": 0.05}))
    path = follow(optimizer, gradients)
    assert largest_difference(path, follow_tf1(gradients, weight_decay=0.05)) < TOLERANCE
    plain = follow_tf1(gradients)
    kernels, plain_kernels = ([p["conv"] for p in steps] for steps in (path, plain))
    assert largest_difference(kernels, plain_kernels) > 100 * TOLERANCE
    others, plain_others = ([p["bn"] for p in steps] for steps in (path, plain))
    assert largest_difference(others, plain_others) < TOLERANCE

    decoupled = optax.chain(
        make_optimizer(optax.constant_schedule(1.0), **PAPER),
        optax.add_decayed_weights(-0.05, mask=decay_mask),
    )
    once = [jax.tree.map(np.zeros_like, initial_params())]
    coupled = make_optimizer(optax.constant_schedule(1.0), **(PAPER | {"weight_decay": 0.05}))
    assert largest_difference(follow(coupled, once), follow(decoupled, once)) > 1e-3


def test_decay_mask_takes_the_kernels_of_the_network():
    """171 of S's 452 tensors with 21,268,424 numbers, as counted in the released code."""
    model = create_model("efficientnetv2-s")
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    mask = decay_mask(params)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True))
    assert len(pairs) == 452
    sizes = [math.prod(leaf.shape) for leaf, decayed in pairs if decayed]
    assert (len(sizes), sum(sizes)) == (171, 21_268_424)
    # Biases and BatchNorm's scales are vectors; no kernel is one.
    assert all((len(leaf.shape) > 1) == decayed for leaf, decayed in pairs)


def test_clip_norm_bounds_the_global_norm():
    gradients = gradients_over_time()
    changes = {"weight_decay": 0.05, "clip_norm": 0.5}
    path = follow(make_optimizer(schedule, **(PAPER | changes)), gradients)
    assert largest_difference(path, follow_tf1(gradients, **changes)) < TOLERANCE
    unclipped = follow_tf1(gradients, weight_decay=0.05)
    assert largest_difference(path, unclipped) > 100 * TOLERANCE
    # A bound above every norm changes no bit.
    loose = follow(make_optimizer(schedule, **(PAPER | {"clip_norm": 1e9})), gradients)
    off = follow(make_optimizer(schedule, **PAPER), gradients)
    assert largest_difference(loose, off) == 0.0


@pytest.mark.parametrize("name", ["weight_decay", "clip_norm"])
def test_negative_settings_are_refused(name):
    with pytest.raises(InputError, match=f"optimizer.{name} -1.0.* must be 0 or more"):
        make_optimizer(schedule, **(PAPER | {name: -1.0}))


# ---------------------------------------------------------------------------- learning rate

IMAGENET_1K = {
    "peak": 0.256,
    "total_steps": 107_336,
    "steps_per_epoch": 1_256_144 / 4096,
    "schedule": "exponential",
    "warmup_epochs": 5.0,
    "decay_rate": 0.97,
    "decay_epochs": 2.4,
}
IMAGENET_21K = IMAGENET_1K | {
    "peak": 0.128,
    "total_steps": 186_332,
    "steps_per_epoch": 12_720_275 / 4096,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
}


@functools.cache
def rates_1k() -> np.ndarray:
    steps = jnp.arange(IMAGENET_1K["total_steps"])
    return np.asarray(jax.jit(learning_rate_schedule(**IMAGENET_1K))(steps))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 1.66993e-4),
        (766, 0.127917),
        (1532, 0.255833),  # The last step of the warm-up,
        (1533, 0.240870),  # whose end is a fall: two stairs have gone by.
        (2207, 0.240870),
        (26_834, 0.0855112),
        (53_668, 0.0285631),
        (80_502, 0.00925466),
        (107_335, 0.00309132),
    ],
)
def test_exponential_schedule_of_the_released_code(step, rate):
    assert float(learning_rate_schedule(**IMAGENET_1K)(step)) == pytest.approx(rate, rel=1e-5)
    assert rates_1k()[step] == pytest.approx(rate, rel=1e-5)


def test_the_warm_up_starts_at_exactly_zero():
    rate = learning_rate_schedule(**IMAGENET_1K)(0)
    assert rate == 0.0 and rate.dtype == jnp.float32


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (3104, 0.127959), (3105, 0.127912), (93_166, 0.064), (186_332, 0.0)],
)
def test_cosine_schedule_of_the_released_code(step, rate):
    actual = float(learning_rate_schedule(**IMAGENET_21K)(step))
    assert actual == pytest.approx(rate, rel=1e-5, abs=1e-9)


def stairs(total_steps: int, num_examples: int, batch_size: int) -> np.ndarray:
    """floor(step / (2.4 epochs in steps)) in whole numbers, without any rounding."""
    period = Fraction(12, 5) * Fraction(num_examples, batch_size)
    return np.arange(total_steps) * period.denominator // period.numerator


@pytest.mark.parametrize(
    ("num_examples", "batch_size"),
    [
        (1_256_144, 4096),
        (1_256_144, 2048),
        (50_000, 500),
        (1_281_167, 4096),
        (1_256_144, 256),
    ],
)
def test_every_stair_of_350_epochs_begins_at_its_step(num_examples, batch_size):
    """In float32, at every step, so also the step before each stair and the step at it."""
    steps_per_epoch = num_examples / batch_size
    total_steps = int(350 * steps_per_epoch)
    changes = {
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
        "warmup_epochs": 0.0,
    }
    steps = jnp.arange(total_steps)
    rates = jax.jit(learning_rate_schedule(**(IMAGENET_1K | changes)))(steps)
    expected = stairs(total_steps, num_examples, batch_size)
    assert np.array_equal(np.floor(np.arange(total_steps) / (2.4 * steps_per_epoch)), expected)
    assert expected[-1] == 145
    actual = np.rint(np.log(np.asarray(rates, np.float64) / 0.256) / np.log(0.97))
    np.testing.assert_array_equal(np.flatnonzero(actual != expected), [])
    np.testing.assert_allclose(rates, 0.256 * 0.97**expected, rtol=1e-5)


def test_the_rate_never_rises_after_the_warm_up():
    after = rates_1k()[1533:]
    assert np.all(np.diff(after) <= 0)
    assert np.count_nonzero(np.diff(after)) == 145 - 2  # Two stairs lie in the warm-up.
    assert np.all(np.diff(rates_1k()[:1533]) > 0)


def test_constant_schedule():
    rate = learning_rate_schedule(**(IMAGENET_1K | {"schedule": "constant"}))
    assert float(rate(766)) == pytest.approx(0.127917, rel=1e-5)
    assert {float(rate(step)) for step in (1533, 50_000, 107_335)} == {float(np.float32(0.256))}


@pytest.mark.parametrize("name", ["exponential", "cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(name):
    rate = learning_rate_schedule(**(IMAGENET_1K | {"schedule": name, "warmup_epochs": 0.0}))
    assert float(rate(0)) == pytest.approx(0.256)


def test_unknown_schedule():
    with pytest.raises(InputError, match=r"unknown learning_rate.schedule 'cosin'.*mean cosine"):
        learning_rate_schedule(**(IMAGENET_1K | {"schedule": "cosin"}))
