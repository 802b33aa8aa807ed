"""The configuration: locked, without unread keys, and every derived number follows its causes."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

import effnetv2_jax
from effnetv2_jax.checkpoint import Checkpoints
from effnetv2_jax.config import (
    RESUMABLE_CHANGES,
    base_config,
    make_plan,
    parse_argument,
    to_plain,
)
from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.pipeline import train_batches
from effnetv2_jax.errors import InputError
from effnetv2_jax.evaluate import Evaluator
from effnetv2_jax.losses import Loss
from effnetv2_jax.memory import Fits
from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.network import Network
from effnetv2_jax.optimizers import learning_rate_schedule, make_optimizer
from effnetv2_jax.progressive import make_stages
from effnetv2_jax.recipes import imagenet1k
from effnetv2_jax.steps import normalize

IMAGENET = {"num_train_examples": 1_256_144, "num_eval_examples": 50_000, "num_classes": 1000}


def plan_of(**changes):
    config = base_config()
    config.update_from_flattened_dict(changes)
    return make_plan(config, **IMAGENET)


def flat_keys(values: dict) -> set[str]:
    """`batch_size`, `model.variant` and so on."""
    keys = set()
    for name, value in values.items():
        keys |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    return keys


KEYS = flat_keys(base_config().to_dict())
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})


def test_a_typo_raises():
    config = base_config()
    assert config.is_locked
    with pytest.raises(AttributeError, match="batchsize"):
        config.batchsize = 1
    with pytest.raises(KeyError, match="modle"):
        config["modle"] = {}
    assert len(SECTIONS) == 11
    for section in SECTIONS:
        with pytest.raises(AttributeError, match="no_such_key"):
            config[section].no_such_key = 1
        with pytest.raises(KeyError, match="no_such_key"):
            config[section].update({"no_such_key": 1})


def test_a_value_of_another_type_raises():
    config = base_config()
    with pytest.raises(TypeError, match="batch_size"):
        config.batch_size = "many"
    config.num_epochs = 3  # A whole number of epochs is a number of epochs.
    assert isinstance(config.num_epochs, float)


def test_every_call_gives_a_new_configuration():
    base_config().progressive.num_stages = 1
    assert base_config().progressive.num_stages == 4


def keyword_only(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_model_section_is_what_create_model_takes():
    attributes = {field.name for field in dataclasses.fields(Network)}
    attributes -= {"parent", "name", "spec"}  # Linen's own, and what the variant stands for.
    by_caller = {
        "num_classes",  # Of the data set.
        "axis_name",  # Of parallel.py.
        "dropout_rate",  # Of the stage.
        "remat_groups",  # Of memory.py, a stage's.
    }
    taken = {"variant"} | keyword_only(create_model) | attributes
    assert set(base_config().model) == taken - by_caller


def test_memory_section_is_what_fits_takes():
    by_caller = {"per_device", "num_stages", "limit", "file"}
    assert set(base_config().memory) == keyword_only(Fits) - by_caller


def test_data_section_is_what_load_dataset_takes():
    assert set(base_config().data) == {"name"} | keyword_only(load_dataset)


def test_augment_section_is_what_train_batches_takes():
    by_caller = {
        *("seed", "batch_size", "first_step", "last_step", "num_classes"),
        *("image_size", "randaug_magnitude"),  # Of the stage.
        *("process_index", "process_count", "on_corrupt"),
    }
    assert by_caller < keyword_only(train_batches)
    assert set(base_config().augment) == keyword_only(train_batches) - by_caller


def test_normalize_section_is_what_normalize_takes():
    assert set(base_config().normalize) == set(inspect.signature(normalize).parameters) - {"images"}


def test_progressive_section_is_what_make_stages_takes():
    assert set(base_config().progressive) == keyword_only(make_stages)


def test_optimizer_section_is_what_make_optimizer_takes():
    assert set(base_config().optimizer) == keyword_only(make_optimizer)


def test_learning_rate_section_is_what_the_schedule_takes():
    by_caller = {"peak", "total_steps", "steps_per_epoch"}
    assert by_caller < keyword_only(learning_rate_schedule)
    taken = keyword_only(learning_rate_schedule) - by_caller
    assert set(base_config().learning_rate) == taken | {"per_256_images"}


def test_eval_section_is_what_the_evaluator_takes():
    taken = (
        keyword_only(Evaluator) - set(base_config().normalize) - {"loss", "on_corrupt", "parallel"}
    )
    exceptions = {"every_epochs", "at_stage_size", "patience_epochs"}
    assert set(base_config().eval) == taken | {"image_size"} | exceptions


def test_loss_section_is_what_the_loss_takes():
    assert set(base_config().loss) == {field.name for field in dataclasses.fields(Loss)}


def test_checkpoint_section_is_what_checkpoints_takes():
    assert set(base_config().checkpoint) == keyword_only(Checkpoints) | {"every_epochs"}


def test_every_other_key_is_read_somewhere():
    """Sections go into their function whole; any other key must occur as `config.KEY`."""
    package = Path(effnetv2_jax.__file__).parent
    sources = [p.read_text(encoding="utf-8") for p in package.rglob("*.py")]
    # In config.py an assignment is no use, so base_config does not count.
    sources = [text.replace(inspect.getsource(base_config), "") for text in sources]
    one_by_one = {key for key in KEYS if "." not in key} | {
        *("learning_rate.per_256_images", "checkpoint.keep", "checkpoint.every_epochs"),
        *("eval.image_size", "eval.every_epochs", "eval.at_stage_size", "eval.patience_epochs"),
    }
    unread = {key for key in one_by_one if not any(f"config.{key}" in text for text in sources)}
    assert not unread


def test_resumable_changes_exist():
    assert set(RESUMABLE_CHANGES) <= KEYS
    assert len(set(RESUMABLE_CHANGES)) == len(RESUMABLE_CHANGES)


def test_plan_of_the_paper():
    plan = plan_of()
    assert plan.steps_per_epoch == 1_256_144 / 4096 == pytest.approx(306.676, abs=1e-3)
    assert plan.total_steps == 107_336
    assert plan.peak_learning_rate == pytest.approx(0.256)
    assert plan.eval_every_steps == 3067
    assert plan.checkpoint_every_steps == 307
    assert [stage.last_step for stage in plan.stages] == [26_834, 53_668, 80_502, 107_336]
    for name, value in IMAGENET.items():
        assert getattr(plan, name) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.total_steps = 1


def test_batch_size_moves_everything_that_depends_on_it():
    plan = plan_of(batch_size=1024)
    assert plan.steps_per_epoch == pytest.approx(1226.703, abs=1e-3)
    assert plan.total_steps == 429_346
    assert plan.peak_learning_rate == pytest.approx(0.064)
    assert plan.eval_every_steps == 12_267
    assert plan.checkpoint_every_steps == 1227
    assert [stage.last_step for stage in plan.stages] == [107_336, 214_673, 322_009, 429_346]


def test_num_epochs_and_rate_move_what_depends_on_them():
    plan = plan_of(num_epochs=60.0, **{"learning_rate.per_256_images": 0.008})
    assert plan.total_steps == 18_400
    assert plan.stages[-1].last_step == 18_400
    assert plan.peak_learning_rate == pytest.approx(0.128)


def test_periods_are_a_step_at_least():
    plan = plan_of(**{"eval.every_epochs": 1e-6, "checkpoint.every_epochs": 1e-6})
    assert (plan.eval_every_steps, plan.checkpoint_every_steps) == (1, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, 0) for key in ("batch_size", "log_every_steps", "eval.image_size")],
        *[(key, -1) for key in ("batch_size", "eval.batch_size")],
        *[(key, 0.0) for key in ("num_epochs", "eval.every_epochs", "checkpoint.every_epochs")],
        *[("ema_decay", value) for value in (-0.1, 1.0, float("nan"))],
    ],
)
def test_values_that_no_run_can_have(key, value):
    with pytest.raises(InputError, match=f"^{key} is {value}: it must be "):
        plan_of(**{key: value})


def test_a_run_without_steps_is_refused():
    with pytest.raises(InputError, match="0 training steps cannot be cut into 4 stages"):
        plan_of(num_epochs=0.001)


def test_training_is_as_long_as_min_steps_at_least():
    assert plan_of(min_steps=10_000).total_steps == 107_336
    plan = plan_of(num_epochs=15.0, min_steps=10_000)
    assert plan.total_steps == plan.stages[-1].last_step == 10_000
    assert plan_of(num_epochs=15.0).total_steps == 4600
    for key in ("min_steps", "eval.patience_epochs"):
        with pytest.raises(InputError, match=f"{key} -1.*must be 0 or more"):
            plan_of(**{key: -1})


def test_patience_in_steps():
    assert plan_of().patience_steps == 0
    assert plan_of(**{"eval.patience_epochs": 10.0}).patience_steps == 3067


def test_use_mixing():
    assert not plan_of().use_mixing
    assert plan_of(**{"progressive.mixup_alpha": (0.0, 0.2)}).use_mixing
    assert plan_of(**{"progressive.cutmix_alpha": (0.5, 0.0)}).use_mixing


def test_remaining_cost():
    plan = plan_of()
    areas = [128**2, 185**2, 243**2, 300**2]
    steps = 26_834
    assert plan.remaining_cost(0) == steps * sum(areas)
    assert plan.remaining_cost(1) == steps * sum(areas) - areas[0]
    assert plan.remaining_cost(steps) == steps * sum(areas[1:])
    assert plan.remaining_cost(3 * steps - 10) == 10 * areas[2] + steps * areas[3]
    assert plan.remaining_cost(4 * steps - 1) == areas[3]
    assert plan.remaining_cost(4 * steps) == 0


def test_parse_argument():
    assert parse_argument(None, variant="s", recipe="paper") == {"variant": "s", "recipe": "paper"}
    assert parse_argument("", variant="s") == {"variant": "s"}
    parsed = parse_argument("recipe=released,variant=b=0", variant="s", recipe="paper")
    assert parsed == {"variant": "b=0", "recipe": "released"}
    assert parse_argument("variant=", variant="s") == {"variant": ""}


def test_a_value_alone_belongs_to_the_first_free_key():
    assert parse_argument("b4", variant="b0", recipe="paper") == {
        "variant": "b4",
        "recipe": "paper",
    }
    assert parse_argument("50,380", depth="1", size="2") == {"depth": "50", "size": "380"}
    given = parse_argument("variant=b1,released", variant="b0", recipe="paper")
    assert given == {"variant": "b1", "recipe": "released"}


def test_parse_argument_errors():
    with pytest.raises(InputError, match=r"'x' is one too many: the file takes a=s,recipe=p\."):
        parse_argument("q,released,x", a="s", recipe="p")
    with pytest.raises(InputError, match="'a' is given twice"):
        parse_argument("q,a=s", a="s", recipe="p")
    with pytest.raises(InputError, match="unknown config argument 'recpe': did you mean recipe"):
        parse_argument("recpe=paper", variant="s", recipe="paper")
    with pytest.raises(InputError, match="config argument 'x=1': this file takes none"):
        parse_argument("x=1")


@pytest.mark.parametrize("config", [base_config(), imagenet1k("efficientnetv2-l", "released")])
def test_to_plain_survives_json(config):
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain
    assert flat_keys(plain) == KEYS
    assert plain["data"]["data_dir"] is None
    assert plain["progressive"]["image_size"] == list(config.progressive.image_size)
