"""Mixup and cutmix: what an example keeps, what its label says, and how strong they are.

All tests share one compiled program of one shape: 48 examples of 16 x 16 pixels, so that the
share of a pixel, 1/256, is exact in float32, and every example is of a class of its own, so
that the label tells which examples were mixed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.mixing import mix
from effnetv2_jax.models.layers import batch_positions

NUM, SIZE = 48, 16  # Three pairs on each of eight devices, so parity differs among them.
PARTNER = np.arange(NUM) ^ 1
# Pairs 0 and 1, 4 and 5, ... are left to mixup where both are on.
IN_CUTMIX_HALF = np.arange(NUM) // 2 % 2 == 1
traces = []


@jax.jit
def jitted(images, labels, key, mixup_alpha, cutmix_alpha):
    traces.append(images.shape)
    positions = jnp.arange(len(images))
    return mix(images, labels, key, positions, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)


def run(images, labels, mixup=0.0, cutmix=0.0, seed=0):
    alphas = np.float32(mixup), np.float32(cutmix)
    return [np.asarray(a) for a in jitted(images, labels, jax.random.key(seed), *alphas)]


def flat_batch():
    """Each example of one colour, 1 or 0 by turns, so that a pixel shows its weight."""
    colours = np.tile(np.float32([1, 0]), NUM // 2)
    return np.broadcast_to(colours[:, None, None, None], (NUM, SIZE, SIZE, 3)), np.eye(
        NUM, dtype=np.float32
    )


def noisy_batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM, SIZE, SIZE, 3)).astype(np.float32)
    return (images - 128) / 128, np.eye(NUM, dtype=np.float32)


@functools.cache
def kept_shares(mixup, cutmix, num_seeds=1):
    """Shares [num_seeds, NUM] that examples keep: of the label, and of each pixel."""
    images, labels = flat_batch()
    own_label, own_pixel = [], []
    for seed in range(num_seeds):
        mixed, weights = run(images, labels, mixup, cutmix, seed)
        # A flat example of colour 1 has its share as colour, one of colour 0 the rest.
        pixels = np.where(images[..., 0] == 1, mixed[..., 0], 1 - mixed[..., 0])
        own_pixel.append(pixels)
        own_label.append(weights[np.arange(NUM), np.arange(NUM)])
    return np.stack(own_label), np.stack(own_pixel)


STRENGTHS = [(0.2, 0.0), (0.0, 0.5), (0.4, 0.4), (0.05, 1.0)]


def test_off_is_the_identity_bit_for_bit():
    images, labels = noisy_batch()
    for seed in range(5):
        mixed, weights = run(images, labels, seed=seed)
        np.testing.assert_array_equal(mixed.view(np.uint32), images.view(np.uint32))
        np.testing.assert_array_equal(weights.view(np.uint32), labels.view(np.uint32))


def test_new_strengths_trace_nothing():
    images, labels = noisy_batch()
    run(images, labels)
    before = len(traces)
    for mixup in (0.0, 0.0667, 0.2, 0.5):
        for cutmix in (0.0, 0.1667, 1.0):
            mixed, weights = run(images, labels, mixup, cutmix)
            assert np.all(np.isfinite(mixed)) and np.all(np.isfinite(weights))
    assert len(traces) == before == 1


@pytest.mark.parametrize("alpha", [1e-3, 0.0667, 10.0])
def test_any_strength_is_finite(alpha):
    """Beta draws of tiny parameters underflow, which must give 0 or 1 and no NaN."""
    for strengths in ((alpha, 0.0), (0.0, alpha)):
        mixed, weights = run(*noisy_batch(), *strengths)
        assert np.all(np.isfinite(mixed)) and np.all(np.isfinite(weights))
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), STRENGTHS)
def test_the_partner_is_the_neighbour(mixup, cutmix):
    images, labels = noisy_batch()
    mixed, weights = run(images, labels, mixup, cutmix)
    own = weights[np.arange(NUM), np.arange(NUM)]
    neighbour = weights[np.arange(NUM), PARTNER]
    assert np.count_nonzero(neighbour) > NUM // 4
    np.testing.assert_allclose(own + neighbour, 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    assert weights.min() >= 0.0

    # Every pixel lies between the two, and mixup's at the place that the label says.
    low, high = np.minimum(images, images[PARTNER]), np.maximum(images, images[PARTNER])
    assert np.all(mixed >= low - 1e-6) and np.all(mixed <= high + 1e-6)
    by_mixup = np.full(NUM, True) if cutmix == 0 else ~IN_CUTMIX_HALF & (mixup > 0)
    share = own[:, None, None, None]
    blend = images * share + images[PARTNER] * (1 - share)
    np.testing.assert_allclose(mixed[by_mixup], blend[by_mixup], atol=1e-6)
    is_own, is_neighbours = mixed == images, mixed == images[PARTNER]
    assert np.all((is_own | is_neighbours)[~by_mixup])


def test_mixup_keeps_at_least_half():
    label, pixels = kept_shares(0.4, 0.0)
    assert label.min() >= 0.5 and pixels.min() >= 0.5
    assert label.min() < 0.7 and label.max() <= 1.0


def test_mixup_weighs_images_and_labels_alike():
    label, pixels = kept_shares(0.4, 0.0)
    assert len(np.unique(label)) > NUM // 2  # Each example draws for itself.
    np.testing.assert_allclose(pixels.min((2, 3)), label, atol=1e-6)
    np.testing.assert_allclose(pixels.max((2, 3)), label, atol=1e-6)


def test_cutmix_label_is_exactly_the_share_of_own_pixels():
    label, pixels = kept_shares(0.0, 1.0, 4)
    assert set(np.unique(pixels)) == {0.0, 1.0}
    np.testing.assert_array_equal(pixels.mean((2, 3)), label)
    assert len(np.unique(label)) > NUM // 2 and label.min() < 0.5


def test_cutmix_cuts_a_clipped_rectangle():
    _, pixels = kept_shares(0.0, 1.0, 4)
    at_the_border = 0
    for own in pixels.reshape(-1, SIZE, SIZE):
        rows, columns = np.flatnonzero((own == 0).any(1)), np.flatnonzero((own == 0).any(0))
        if rows.size:
            box = own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert np.all(box == 0)
            at_the_border += rows[0] == 0
            # A square, but where the border or the pixel grid cuts it off.
            inside = rows[0] > 0 and rows[-1] < SIZE - 1 and columns[0] > 0
            if inside and columns[-1] < SIZE - 1:
                assert abs(len(rows) - len(columns)) <= 1
    assert at_the_border > 0


def test_with_both_every_other_pair_is_cut():
    label, pixels = kept_shares(0.4, 0.4, 4)
    is_cut = np.isin(pixels, (0.0, 1.0)).all((2, 3))
    assert np.all(is_cut[:, IN_CUTMIX_HALF])
    blended = ~is_cut & (label < 1)
    assert np.count_nonzero(blended[:, ~IN_CUTMIX_HALF]) > NUM
    assert label[:, ~IN_CUTMIX_HALF].min() >= 0.5 > label[:, IN_CUTMIX_HALF].min()
    # With one strength alone, all examples get it, and with it the same draws.
    for strengths, half in (((0.4, 0.0), ~IN_CUTMIX_HALF), ((0.0, 0.4), IN_CUTMIX_HALF)):
        alone, _ = kept_shares(*strengths, 4)
        np.testing.assert_array_equal(alone[:, half], label[:, half])
        assert np.count_nonzero(alone[:, ~half] < 1) > NUM


def test_keys_and_positions_decide_the_draws():
    label, _ = kept_shares(0.4, 0.0, 4)
    again = run(*flat_batch(), 0.4, 0.0, seed=2)[1][np.arange(NUM), np.arange(NUM)]
    np.testing.assert_array_equal(label[2], again)
    assert np.count_nonzero(label[0] == label[1]) < NUM // 4
    # The two of a pair draw apart: neither the same share nor its complement.
    assert np.count_nonzero(label[:, ::2] == label[:, 1::2]) < NUM // 4


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NUM_SEEDS = 70  # Times 48 examples: a standard error of 0.006 and less.


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_are_of_the_beta_distribution(alpha):
    label, _ = kept_shares(alpha, 0.0, NUM_SEEDS)
    share = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    expected = np.maximum(share, 1 - share)
    assert np.mean(label) == pytest.approx(np.mean(expected), abs=0.02)
    np.testing.assert_allclose(
        np.quantile(label, QUANTILES), np.quantile(expected, QUANTILES), atol=0.04
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_areas_are_those_of_clipped_boxes(alpha):
    label, _ = kept_shares(0.0, alpha, NUM_SEEDS)
    rng = np.random.default_rng(0)
    half_side = np.sqrt(1 - rng.beta(alpha, alpha, 200_000)) / 2
    centres = rng.random((2, 200_000))
    sides = np.minimum(centres + half_side, 1) - np.maximum(centres - half_side, 0)
    expected = 1 - sides.prod(0)
    assert np.mean(label) == pytest.approx(np.mean(expected), abs=0.02)
    np.testing.assert_allclose(
        np.quantile(label, QUANTILES), np.quantile(expected, QUANTILES), atol=0.05
    )


@functools.cache
def on_eight_devices():
    def mix_shard(images, labels, key, mixup_alpha, cutmix_alpha):
        strengths = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}
        positions = batch_positions(len(images), "replica")
        return mix(images, labels, key, positions, **strengths, axis_name="replica")

    return jax.pmap(mix_shard, axis_name="replica", in_axes=(0, 0, None, None, None))


@pytest.mark.parametrize(("mixup", "cutmix"), [*STRENGTHS, (0.0, 0.0)])
def test_one_device_and_eight_mix_the_same_way(mixup, cutmix):
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    images, labels = noisy_batch()
    expected = run(images, labels, mixup, cutmix)
    split = [a.reshape(8, NUM // 8, *a.shape[1:]) for a in (images, labels)]
    alphas = jnp.float32(mixup), jnp.float32(cutmix)
    mixed, weights = on_eight_devices()(*split, jax.random.key(0), *alphas)
    np.testing.assert_array_equal(np.reshape(weights, expected[1].shape), expected[1])
    # The draws agree in every bit. A blended pixel is a sum of two products, one of which XLA
    # fuses with the sum, not always the same one; 0 and 1 as weights leave nothing to round.
    rounding = 5e-7 if mixup else 0.0
    np.testing.assert_allclose(
        np.reshape(mixed, expected[0].shape), expected[0], rtol=0, atol=rounding
    )


@functools.cache
def released_shares(cutmix_alpha, mixup_alpha=0.0, seed=0):
    """As `kept_shares` of one seed, in the form of the released code."""
    images, labels = flat_batch()
    released = jax.jit(functools.partial(mix, form="released"))
    strengths = {
        "mixup_alpha": np.float32(mixup_alpha),
        "cutmix_alpha": np.float32(cutmix_alpha),
    }
    key = jax.random.key(seed)
    mixed, weights = released(images, labels, key, jnp.arange(NUM), **strengths)
    pixels = np.where(images[..., 0] == 1, mixed[..., 0], 1 - mixed[..., 0])
    return np.asarray(weights)[np.arange(NUM), np.arange(NUM)], pixels


def test_released_cutmix_labels_weigh_the_mean_area():
    """automl efficientnetv2/datasets.py averages over the batch: pixels and labels disagree."""
    label, pixels = released_shares(1.0)
    areas = pixels.mean((1, 2))
    np.testing.assert_allclose(label, areas.mean(), rtol=1e-5)
    assert areas.std() > 0.1
    assert set(np.unique(pixels)) == {0.0, 1.0}


def test_released_halves_are_averaged_apart():
    label, pixels = released_shares(0.4, 0.4)
    mean = pixels[IN_CUTMIX_HALF].mean()
    np.testing.assert_allclose(label[IN_CUTMIX_HALF], mean, rtol=1e-5)
    by_mixup, _ = kept_shares(0.4, 0.4)
    np.testing.assert_array_equal(label[~IN_CUTMIX_HALF], by_mixup[0][~IN_CUTMIX_HALF])


def test_released_boxes_have_whole_sides():
    """int(sqrt(1 - share) * size) on a side, so boxes inside the image are exact squares."""
    inside = 0
    for seed in range(4):
        _, pixels = released_shares(1.0, seed=seed)
        for own in pixels:
            rows, columns = np.flatnonzero((own == 0).any(1)), np.flatnonzero((own == 0).any(0))
            if rows.size and min(rows[0], columns[0]) > 0 and max(rows[-1], columns[-1]) < SIZE - 1:
                assert len(rows) == len(columns)
                inside += 1
    assert inside > 5


def test_unknown_form():
    with pytest.raises(InputError, match="unknown mixing 'relased': did you mean released"):
        mix(
            *flat_batch(),
            jax.random.key(0),
            jnp.arange(NUM),
            mixup_alpha=0.0,
            cutmix_alpha=0.0,
            form="relased",
        )
