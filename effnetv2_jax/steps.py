"""The training and evaluation step: pure functions of (state, batch, key) on one replica.

Nothing here knows pmap, hosts or the loop. `axis_name` names the replica axis that the caller
maps over; gradients, batch statistics and metrics are averaged along it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from effnetv2_jax.losses import Loss, multi_hot
from effnetv2_jax.mixing import mix
from effnetv2_jax.models.layers import batch_positions
from effnetv2_jax.train_state import TrainState, update_ema

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, Metrics, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[dict[str, Any], Batch], Metrics]


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps uint8 images [N, H, W, 3] to (x - mean) / std in float32."""
    scaled = images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
    return scaled / jnp.asarray(std, jnp.float32)


class StepResults(NamedTuple):
    """What the examples of a replica say, each a mean over them."""

    grads: Any
    batch_stats: Any
    loss: jax.Array
    top1: jax.Array


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    loss: Loss,
    ema_decay: float,
    mixing: str | None,
    window_steps: int,
    micro_batches: int = 1,
    axis_name: str,
) -> TrainStep:
    """Builds `train_step(state, batch, strengths, key) -> (state, metrics)`.

    Args:
      model: the network, whose `axis_name` is the one given here.
      optimizer: turns averaged gradients into updates.
      mean: of each colour channel, in grey levels.
      std: likewise.
      loss: compares logits with labels.
      ema_decay: upper bound of the averages' decay.
      mixing: the form of `mixing.mix`, or None: the step holds no mixing at all.
      window_steps: metrics are summed over windows of this many steps.
      micro_batches: equal parts of a replica's batch whose gradients are computed one after the
        other, so that the activations of one part are in memory. Replicas exchange gradients
        once. Each part is normalised by its own batch statistics, and their mean updates the
        running ones once.
      axis_name: the replica axis.

    Returns:
      A function of the state, this replica's batch (`image` uint8 [N, S, S, 3], `label` int32
      [N] or, of several classes, [N, K] padded with -1), the stage's `strengths`
      (`dropout_rate`, `mixup_alpha`, `cutmix_alpha` as float32 scalars) and the run's key. Its
      metrics are the window's sums and `nonfinite_step`.
    """
    update = make_update(
        optimizer, ema_decay=ema_decay, window_steps=window_steps, axis_name=axis_name
    )

    def train_step(
        state: TrainState, batch: Batch, strengths: Metrics, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        mixing_key, dropout_key, drop_path_key = jax.random.split(step_key, 3)
        images = normalize(batch["image"], mean, std)
        labels = loss.targets(multi_hot(batch["label"], model.num_classes))
        positions = batch_positions(len(images), axis_name)
        if mixing is not None:
            images, labels = mix(
                images,
                labels,
                mixing_key,
                positions,
                mixup_alpha=strengths["mixup_alpha"],
                cutmix_alpha=strengths["cutmix_alpha"],
                form=mixing,
                axis_name=axis_name,
            )

        def loss_function(
            params: Any, images: jax.Array, labels: jax.Array, positions: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                dropout_rate=strengths["dropout_rate"],
                positions=positions,
                rngs={"dropout": dropout_key, "drop_path": drop_path_key},
                mutable=["batch_stats"],
            )
            return jnp.mean(loss(logits, labels)), (logits, updated["batch_stats"])

        def results(images: jax.Array, labels: jax.Array, positions: jax.Array) -> StepResults:
            gradient = jax.value_and_grad(loss_function, has_aux=True)
            (mean_loss, (logits, batch_stats)), grads = gradient(
                state.params, images, labels, positions
            )
            # Right is a class of the largest weight: one of several equal ones, or the larger of
            # two mixed ones.
            best = jnp.take_along_axis(labels, jnp.argmax(logits, -1)[:, None], axis=-1)[:, 0]
            top1 = jnp.mean(best == jnp.max(labels, -1), dtype=jnp.float32)
            return StepResults(grads, batch_stats, mean_loss, top1)

        if micro_batches == 1:
            return update(state, results(images, labels, positions))
        # The network begins with this conversion: done here, the parts wait in half the memory.
        arrays = (images.astype(model.dtype), labels, positions)
        parts = jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), arrays)

        def add(sums: StepResults, part: tuple[jax.Array, ...]) -> tuple[StepResults, None]:
            return jax.tree.map(jnp.add, sums, results(*part)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = StepResults(state.params, state.batch_stats, zero, zero)
        sums, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, zeros), parts)
        return update(state, jax.tree.map(lambda total: total / micro_batches, sums))

    return train_step


def make_update(
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    window_steps: int,
    axis_name: str,
) -> Callable[[TrainState, StepResults], tuple[TrainState, Metrics]]:
    """Builds the end of a step: what happens once, however many micro-batches there are.

    Args:
      optimizer: see `make_train_step`, as for the others.
      ema_decay: see there.
      window_steps: see there.
      axis_name: see there.
    """

    def update(state: TrainState, results: StepResults) -> tuple[TrainState, Metrics]:
        # Replica groups of BatchNorm see different batches: average their running statistics.
        grads, batch_stats, mean_loss, top1 = lax.pmean(results, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        grad_norm = optax.tree.norm(grads)

        new = {"loss": mean_loss, "top1": top1, "grad_norm": grad_norm, "steps": jnp.float32(1)}
        opens_window = state.step % window_steps == 0
        window = {
            name: jnp.where(opens_window, 0.0, state.window[name]) + value
            for name, value in new.items()
        }
        is_finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)
        nonfinite_step = jnp.where(
            (state.nonfinite_step < 0) & ~is_finite, state.step, state.nonfinite_step
        )
        state = TrainState(
            step=step,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, params, step, ema_decay),
            ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, step, ema_decay),
            window=window,
            nonfinite_step=nonfinite_step,
        )
        return state, {**window, "nonfinite_step": nonfinite_step}

    return update


def make_eval_step(
    model: Any, *, mean: Sequence[float], std: Sequence[float], loss: Loss, axis_name: str
) -> EvalStep:
    """Builds `eval_step(variables, batch) -> sums` over all replicas.

    The batch carries `mask` [N], 1 for an example and 0 for padding. The sums are `loss`
    (without smoothing), `top1`, `top5` and `count`. An example of several classes is hit by
    any of them.
    """
    unsmoothed = dataclasses.replace(loss, label_smoothing=0.0)

    def eval_step(variables: dict[str, Any], batch: Batch) -> Metrics:
        logits = model.apply(variables, normalize(batch["image"], mean, std), train=False)
        labels, mask = batch["label"], batch["mask"]
        losses = unsmoothed(logits, unsmoothed.targets(multi_hot(labels, model.num_classes)))
        _, best = lax.top_k(logits, min(5, model.num_classes))
        hits = jnp.any(best[:, :, None] == labels.reshape(len(labels), 1, -1), axis=-1)
        sums = {
            # A where, not a product: padding must not turn a NaN or infinity into the sum.
            "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
            "top1": jnp.sum(hits[:, 0] * mask),
            "top5": jnp.sum(jnp.any(hits, axis=-1) * mask),
            "count": jnp.sum(mask),
        }
        return lax.psum(sums, axis_name)

    return eval_step
