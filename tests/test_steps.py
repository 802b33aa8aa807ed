"""The step on one and on eight devices, and how often it compiles."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.losses import Loss
from effnetv2_jax.models.efficientnet import EfficientNet
from effnetv2_jax.models.specs import BlockRow, Spec
from effnetv2_jax.parallel import (
    AXIS,
    FORMS,
    STOP_SIGNUM,
    check_batch_size,
    parallel_train_step,
    replicate,
    split_batch,
    to_host,
)
from effnetv2_jax.steps import make_eval_step, make_train_step
from effnetv2_jax.train_state import create_train_state

NUM_CLASSES = 5
# Plain descent with rate 1 makes the update the gradient itself.
GRADIENT = optax.sgd(1.0)
NORMALIZE = {"mean": (128.0,) * 3, "std": (128.0,) * 3}


@functools.cache
def tiny_model(bn_group_size=None):
    """Three blocks, one of each kind: a step that compiles in seconds."""
    rows = (
        BlockRow("fused", 1, 3, 1, 1, 8),
        BlockRow("fused", 1, 3, 2, 4, 16),
        BlockRow("mbconv", 2, 3, 2, 4, 16, squeeze_ratio=0.25),
    )
    spec = Spec(rows, 8, 32, train_size=32, eval_size=32, dropout_rate=0.2)
    return EfficientNet(
        spec=spec, num_classes=NUM_CLASSES, axis_name=AXIS, bn_group_size=bn_group_size
    )


@functools.cache
def initial_state():
    create = functools.partial(create_train_state, tiny_model(), GRADIENT, image_size=32)
    return to_host(jax.jit(create)(jax.random.key(0)))


def train_step(model, **overrides):
    arguments = {
        "loss": Loss("softmax", 0.1),
        "ema_decay": 0.9999,
        "mixing": "per_example",
        "window_steps": 10,
        "axis_name": AXIS,
        **overrides,
    }
    return make_train_step(model, GRADIENT, **NORMALIZE, **arguments)


def batch_of(num_examples, size=32, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_examples, size // 4, size // 4, 3))
    return {
        "image": np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8),
        "label": rng.integers(0, NUM_CLASSES, num_examples).astype(np.int32),
    }


def strengths(mixup=0.2, cutmix=0.3, dropout=0.2):
    return {
        "dropout_rate": np.float32(dropout),
        "mixup_alpha": np.float32(mixup),
        "cutmix_alpha": np.float32(cutmix),
    }


def run_on(num_devices, model, batch, **overrides):
    """One step over some devices; returns the new state and metrics on the host."""
    step = jax.pmap(
        train_step(model, **overrides),
        axis_name=AXIS,
        in_axes=(None, 0, None, None),
        out_axes=(None, None),
        devices=jax.devices()[:num_devices],
    )
    split = {k: a.reshape(num_devices, -1, *a.shape[1:]) for k, a in batch.items()}
    return jax.device_get(step(initial_state(), split, strengths(), jax.random.key(7)))


def relative_difference(ours, theirs):
    """Largest difference over the largest value, per leaf, worst leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-3)) for a, b in pairs)


def test_one_and_eight_devices_agree_on_loss_gradients_and_statistics():
    batch = batch_of(16)
    one, one_metrics = run_on(1, tiny_model(), batch)
    eight, eight_metrics = run_on(8, tiny_model(), batch)
    for name in ("loss", "top1", "grad_norm"):
        assert eight_metrics[name] == pytest.approx(one_metrics[name], rel=1e-4), name
    start = initial_state().params
    gradients = [jax.tree.map(np.subtract, start, s.params) for s in (one, eight)]
    assert relative_difference(*gradients) < 1e-3
    assert relative_difference(one.batch_stats, eight.batch_stats) < 1e-4
    assert relative_difference(one.ema_params, eight.ema_params) < 1e-4


def test_the_comparison_notices_local_statistics():
    """The same measure fails when BatchNorm sees one device alone."""
    batch = batch_of(16)
    one, _ = run_on(1, tiny_model(), batch)
    local, _ = run_on(8, tiny_model(bn_group_size=1), batch)
    start = initial_state().params
    gradients = [jax.tree.map(np.subtract, start, s.params) for s in (one, local)]
    assert relative_difference(*gradients) > 0.05


@pytest.mark.parametrize("num_devices", [1, 2])
def test_micro_batches_are_replicas_one_after_the_other(num_devices):
    """Four parts of the batch, each with its own statistics and its place in the global batch."""
    batch = batch_of(16)
    model = tiny_model(bn_group_size=1)
    replicas, expected = run_on(4, model, batch)
    parts, metrics = run_on(num_devices, model, batch, micro_batches=4 // num_devices)
    for name in ("loss", "top1", "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    start = initial_state().params
    gradients = [jax.tree.map(np.subtract, start, s.params) for s in (parts, replicas)]
    assert relative_difference(*gradients) < 1e-4
    assert relative_difference(parts.batch_stats, replicas.batch_stats) < 1e-5
    whole, _ = run_on(1, model, batch)
    assert relative_difference(whole.batch_stats, replicas.batch_stats) > 0.01


def test_rematerialisation_computes_again_and_changes_no_number():
    batch = batch_of(32, size=64)
    texts, states = [], []
    for groups in (0, 3):
        step = jax.pmap(
            train_step(tiny_model().clone(remat_groups=groups)),
            axis_name=AXIS,
            in_axes=(None, 0, None, None),
            out_axes=(None, None),
            devices=jax.devices()[:2],
        )
        split = {k: a.reshape(2, -1, *a.shape[1:]) for k, a in batch.items()}
        arguments = (initial_state(), split, strengths(), jax.random.key(7))
        texts.append(step.lower(*arguments).as_text())
        states.append(jax.device_get(step(*arguments))[0])
    # Without the barriers the compiler would find the first result again, and keep it.
    assert ["stablehlo.optimization_barrier" in text for text in texts] == [False, True]
    assert texts[1].count("stablehlo.rsqrt") > texts[0].count("stablehlo.rsqrt")
    # Batch statistics are exchanged once, not again in the backward pass.
    exchanges = [text.count("stablehlo.all_reduce") for text in texts]
    assert exchanges[0] == exchanges[1] > 0
    start = initial_state().params
    gradients = [jax.tree.map(np.subtract, start, s.params) for s in states]
    assert relative_difference(*gradients) < 1e-5


def test_statistics_of_replica_groups_are_those_of_their_examples():
    batch = batch_of(16)
    contrast = np.repeat([0.1, 0.4, 0.7, 1.0], 4)[:, None, None, None]
    batch["image"] = (batch["image"] * contrast).astype(np.uint8)
    model = tiny_model(bn_group_size=2)
    state, _ = run_on(8, model, batch, mixing=None)
    images = (batch["image"].astype(np.float32) - 128) / 128
    kernel = initial_state().params["stem_conv"]["kernel"]
    stem = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    groups = np.asarray(stem).reshape(4, -1, stem.shape[-1])  # Four groups of two devices.
    expected = 0.9 * 1.0 + 0.1 * groups.var(axis=1).mean(axis=0)
    np.testing.assert_allclose(state.batch_stats["stem_bn"]["var"], expected, rtol=1e-4)
    whole = 0.9 * 1.0 + 0.1 * groups.reshape(-1, stem.shape[-1]).var(axis=0)
    assert np.max(np.abs(whole - expected)) > 1e-3  # The test can tell the two apart.


def test_group_size_that_does_not_divide_the_replicas():
    with pytest.raises(InputError, match="bn_group_size 3 does not divide the 8 replicas"):
        run_on(8, tiny_model(bn_group_size=3), batch_of(16))


class CompilationCounter:
    """Counts XLA compilations of the mapped step."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def test_one_compilation_per_image_size_and_none_for_strengths_or_a_size_that_returns():
    step = parallel_train_step(train_step(tiny_model()))
    state, key = replicate(initial_state()), replicate(jax.random.key(7))
    placed = [replicate(strengths(m, c, d)) for m, c, d in ((0, 0, 0.1), (0.2, 0, 0.2), (0, 1, 0))]
    batches = {size: split_batch(batch_of(16, size)) for size in (16, 32)}
    counter = CompilationCounter()
    compilations = []
    for size, strength in ((16, 0), (16, 1), (32, 2), (32, 0), (16, 1), (32, 1)):
        before = counter.count
        state, metrics = step(state, batches[size], placed[strength], key)
        jax.block_until_ready(metrics)
        compilations.append(counter.count - before)
    assert compilations == [1, 0, 1, 0, 0, 0]
    assert int(state.step) == 6


def test_metrics_are_sums_over_the_window_and_start_again():
    step = parallel_train_step(train_step(tiny_model(), window_steps=3))
    state, key = replicate(initial_state()), replicate(jax.random.key(7))
    placed, batch = replicate(strengths()), split_batch(batch_of(16))
    windows = []
    for _ in range(7):
        state, metrics = step(state, batch, placed, key)
        windows.append(jax.device_get(metrics))
    assert [float(w["steps"]) for w in windows] == [1, 2, 3, 1, 2, 3, 1]
    assert windows[1]["loss"] > windows[0]["loss"] > 0
    assert windows[3]["loss"] < windows[2]["loss"]


def test_first_nonfinite_step_is_kept():
    step = parallel_train_step(train_step(tiny_model()))
    key, placed = replicate(jax.random.key(7)), replicate(strengths())
    state = replicate(initial_state())
    batch = split_batch(batch_of(16))
    state, metrics = step(state, batch, placed, key)
    assert int(metrics["nonfinite_step"]) == -1
    state = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    for _ in range(2):
        state, metrics = step(state, batch, placed, key)
        assert int(metrics["nonfinite_step"]) == 1


def test_the_key_and_the_step_decide_the_draws():
    batch = batch_of(16)
    step = parallel_train_step(train_step(tiny_model()))
    split, placed = split_batch(batch), replicate(strengths())

    def loss(seed, at_step):
        state = initial_state().replace(step=np.int32(at_step))
        _, metrics = step(replicate(state), split, placed, replicate(jax.random.key(seed)))
        return float(metrics["loss"])

    assert loss(1, 0) == loss(1, 0)
    assert loss(1, 0) != loss(2, 0)
    assert loss(1, 0) != loss(1, 10)


def run_eval(batch, loss):
    """Sums of one evaluation step, and the logits of the same network."""
    model = tiny_model()
    step = jax.pmap(
        make_eval_step(model, **NORMALIZE, loss=loss, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
    )
    state = initial_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sums = jax.device_get(step(variables, split_batch(batch)))
    images = (batch["image"].astype(np.float32) - 128) / 128
    return sums, np.asarray(model.clone(axis_name=None).apply(variables, images))


def numpy_log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_padding_does_not_count_in_evaluation():
    batch = batch_of(16)
    batch["mask"] = (np.arange(16) < 11).astype(np.float32)
    sums, logits = run_eval(batch, Loss("softmax", 0.1))
    logits, labels = logits[:11], batch["label"][:11]
    assert float(sums["count"]) == 11
    assert float(sums["top1"]) == np.sum(logits.argmax(1) == labels)
    assert float(sums["top5"]) == 11  # Five classes.
    # Without smoothing.
    expected = -numpy_log_softmax(logits)[np.arange(11), labels].sum()
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-4)


def test_any_of_several_labels_is_a_hit():
    batch = batch_of(16)
    batch["mask"] = np.ones(16, np.float32)
    rng = np.random.default_rng(5)
    batch["label"] = np.stack([rng.permutation(NUM_CLASSES)[:3] for _ in range(16)])
    batch["label"] = batch["label"].astype(np.int32)
    batch["label"][::2, 1:] = -1  # Every other example has one label.
    sums, logits = run_eval(batch, Loss("softmax"))
    best = logits.argmax(1)
    hits = [best[i] in row[row >= 0] for i, row in enumerate(batch["label"])]
    assert 0 < sum(hits) < 16
    assert float(sums["top1"]) == sum(hits)
    log_probabilities = numpy_log_softmax(logits)
    losses = [-log_probabilities[i, row[row >= 0]].mean() for i, row in enumerate(batch["label"])]
    assert float(sums["loss"]) == pytest.approx(sum(losses), rel=1e-4)


def test_a_step_with_several_labels_equals_one_with_equal_ones():
    """[n] and [n, 2] padded with -1 are the same labels; another label moves the gradient."""
    batch = batch_of(16)
    single, _ = run_on(1, tiny_model(), batch, mixing=None)
    padded = batch | {"label": np.stack([batch["label"], np.full(16, -1, np.int32)], 1)}
    same, _ = run_on(1, tiny_model(), padded, mixing=None)
    assert relative_difference(same.params, single.params) < 1e-5
    padded["label"][3, 1] = (padded["label"][3, 0] + 1) % NUM_CLASSES
    other, _ = run_on(1, tiny_model(), padded, mixing=None)
    assert relative_difference(other.params, single.params) > 1e-3


def test_batch_size_that_the_devices_do_not_divide():
    check_batch_size(16, 8)
    with pytest.raises(InputError, match="batch_size 12 cannot be split over 8 devices"):
        check_batch_size(12, 8)


@pytest.mark.parametrize(("num_devices", "bn_group_size"), [(1, None), (8, 2)])
def test_shard_map_has_the_bits_of_pmap(num_devices, bn_group_size):
    devices = jax.devices()[:num_devices]
    requests = {STOP_SIGNUM: np.arange(num_devices, dtype=np.int32)}
    batches = [
        {
            name: a.reshape(num_devices, -1, *a.shape[1:])
            for name, a in {**batch, **requests}.items()
        }
        for batch in (batch_of(16, 16, seed) for seed in range(2))
    ]
    outcomes = []
    for form in FORMS:
        step = parallel_train_step(train_step(tiny_model(bn_group_size)), devices, form=form)
        state = initial_state()
        for batch in batches:
            state, metrics = step(state, batch, strengths(), jax.random.key(7))
        # The largest request to stop of any replica.
        assert int(metrics[STOP_SIGNUM]) == num_devices - 1
        outcomes.append(jax.device_get((state, metrics)))
    for ours, theirs in zip(*map(jax.tree.leaves, outcomes), strict=True):
        assert np.array_equal(ours, theirs)


def test_shard_map_reuses_the_old_state_and_compiles_once():
    step = parallel_train_step(train_step(tiny_model()), form="shard_map")
    state, key, placed = (replicate(t) for t in (initial_state(), jax.random.key(7), strengths()))
    batch = split_batch(batch_of(16, 16))
    new, _ = step(state, batch, placed, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    step(new, batch, placed, key)
    assert step._step._cache_size() == 1


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="unknown parallel 'vmap': did you mean pmap"):
        parallel_train_step(train_step(tiny_model()), form="vmap")
