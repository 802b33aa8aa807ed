"""Every configuration's step at its full size, traced; each kind of step once, run for real."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from effnetv2_jax import train_and_evaluate
from effnetv2_jax.losses import Loss
from effnetv2_jax.models.create import create_model
from effnetv2_jax.optimizers import make_optimizer
from effnetv2_jax.parallel import AXIS, parallel_eval_step, parallel_train_step
from effnetv2_jax.steps import make_eval_step, make_train_step
from effnetv2_jax.train_state import create_train_state
from tests.every_config import EVERY, load, num_classes, plan

NUM_DEVICES = 8


def step_arguments(config):
    """What decides the traced program, apart from the data's size."""
    run = plan(config)
    return {
        "model": config.model.to_dict(),
        "normalize": {k: list(v) for k, v in config.normalize.to_dict().items()},
        "optimizer": config.optimizer.to_dict(),
        "loss": config.loss.to_dict(),
        "mixing": config.mixing if run.use_mixing else None,
        "ema_decay": config.ema_decay,
        "image_size": run.stages[-1].image_size,
        "eval_size": config.eval.image_size,
        "batch_size": config.batch_size,
        "multi_label": config.data.name.startswith("imagenet21k"),
    }


@functools.cache
def distinct_programs():
    """One (name, argument) for each program, the number of classes apart."""
    return {
        json.dumps(step_arguments(load(name, argument)), sort_keys=True): (name, argument)
        for name, argument in EVERY
    }


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), distinct_programs().values())
def test_one_train_and_one_eval_step_trace_at_full_size(name, argument):
    config = load(name, argument)
    arguments = step_arguments(config)
    model = create_model(**config.model, num_classes=num_classes(config), axis_name=AXIS)
    optimizer = make_optimizer(optax.constant_schedule(0.1), **config.optimizer)
    state = jax.eval_shape(
        functools.partial(create_train_state, model, optimizer, image_size=64),
        jax.random.PRNGKey(0),
    )
    loss = Loss(**config.loss)
    train_step = make_train_step(
        model,
        optimizer,
        **config.normalize,
        loss=loss,
        ema_decay=config.ema_decay,
        mixing=arguments["mixing"],
        window_steps=config.log_every_steps,
        axis_name=AXIS,
    )
    per_device = config.batch_size // NUM_DEVICES
    label_shape = (per_device, 3) if arguments["multi_label"] else (per_device,)

    def batch(size):
        image = abstract((NUM_DEVICES, per_device, size, size, 3), jnp.uint8)
        return {"image": image, "label": abstract((NUM_DEVICES, *label_shape), jnp.int32)}

    strengths = dict.fromkeys(
        ("dropout_rate", "mixup_alpha", "cutmix_alpha"), abstract((), jnp.float32)
    )
    key = jax.random.PRNGKey(0)
    step = parallel_train_step(train_step)
    new_state, metrics = jax.eval_shape(step, state, batch(arguments["image_size"]), strengths, key)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (state, new_state)]
    assert shapes[0] == shapes[1]
    assert metrics["loss"].shape == ()

    evaluation = parallel_eval_step(
        make_eval_step(model, **config.normalize, loss=loss, axis_name=AXIS)
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    mask = {"mask": abstract((NUM_DEVICES, per_device), jnp.float32)}
    sums = jax.eval_shape(evaluation, variables, batch(arguments["eval_size"]) | mask)
    assert set(sums) == {"loss", "top1", "top5", "count"}


@functools.cache
def distinct_structures():
    """One (name, argument) for each way to prepare an image and to take a step."""
    structures = {}
    for name, argument in EVERY:
        config = load(name, argument)
        arguments = step_arguments(config)
        structure = {
            **{k: arguments[k] for k in ("loss", "mixing", "multi_label", "normalize")},
            "augment": json.loads(json.dumps(config.augment.to_dict())),
            "eval": (config.eval.crop, config.eval.resize),
            "decays": config.optimizer.weight_decay > 0,
            "drops_paths": config.model.drop_path_rate > 0,
            "schedule": config.learning_rate.schedule,
        }
        structures.setdefault(json.dumps(structure, sort_keys=True), (name, argument))
    return structures


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), distinct_structures().values())
def test_each_kind_of_step_runs_on_a_cut_down_network(name, argument, tmp_path):
    config = load(name, argument)
    config.batch_size = 16
    config.num_epochs = 1e-6
    config.min_steps = 4
    config.model.update(
        dtype="float32", width_multiplier=0.25, depth_multiplier=0.02, stem_stride=1
    )
    config.data.update(
        name="synthetic:classes=5,train=64,eval=16,size=48",
        train_examples=None,
        eval_split=None,
        minival_examples=0,
    )
    config.data.num_classes = None
    config.progressive.update(num_stages=1, image_size=(32, 32))
    config.eval.update(image_size=32, batch_size=16, at_stage_size=False, every_epochs=1.0)
    config.checkpoint.every_epochs = 100.0
    config.init_from = None
    config.log_every_steps = 2
    results = train_and_evaluate(config, tmp_path / "run")
    assert results["eval/num_examples"] == 16
    assert 0 < results["eval/loss"] < 100
