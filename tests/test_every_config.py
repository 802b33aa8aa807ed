"""Every configuration file: loaded, locked and planned with every recipe."""

from __future__ import annotations

import re

import pytest

from effnetv2_jax.config import base_config
from effnetv2_jax.data.pipeline import check_augmentation, check_evaluation
from effnetv2_jax.errors import InputError
from effnetv2_jax.losses import Loss
from effnetv2_jax.mixing import check_mixing
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.optimizers import learning_rate_schedule, make_optimizer
from tests.every_config import ARGUMENTS, CONFIGS, EVERY, load, num_classes, plan

# Searches, which are no runs: file -> arguments.
SEARCHES = {"nas_fashion_mnist": "", "nas_imagenet": "sampler=reinforce"}


def test_the_list_is_complete():
    files = sorted(path.stem for path in CONFIGS.glob("*.py"))
    assert files == sorted([*ARGUMENTS, *SEARCHES])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_loads_locked_and_its_trials_make_a_plan(name):
    from effnetv2_jax.nas.search import base_search_config
    from effnetv2_jax.nas.space import make_space

    config = load(name, SEARCHES[name])
    assert config.is_locked
    assert config.to_dict().keys() == base_search_config().to_dict().keys()
    assert config.trial.to_dict().keys() == base_config().to_dict().keys()
    assert make_space(**config.space).size > 10**6
    # About 10 epochs (section 3.3), scored on what was held out.
    assert config.trial.num_epochs == 10.0 and plan(config.trial).stages
    assert config.trial.data.eval_split == "minival"
    # The only evaluation is the last one.
    assert plan(config.trial).eval_every_steps >= plan(config.trial).total_steps - 10
    with pytest.raises(InputError, match="config argument 'sampla'"):
        load(name, "sampla=tpe")


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_loads_locked_and_makes_a_plan(name, argument):
    config = load(name, argument)
    assert config.is_locked
    assert config.to_dict().keys() == base_config().to_dict().keys()
    check_augmentation(**config.augment)
    check_evaluation(
        crop=config.eval.crop,
        crop_fraction=config.eval.crop_fraction,
        resize=config.eval.resize,
    )
    check_mixing(config.mixing)
    Loss(**config.loss)
    run = plan(config)
    assert run.total_steps == run.stages[-1].last_step > 0
    assert run.num_classes == num_classes(config)
    arguments = dict(config.learning_rate)
    del arguments["per_256_images"]
    schedule = learning_rate_schedule(
        peak=run.peak_learning_rate,
        total_steps=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        **arguments,
    )
    make_optimizer(schedule, **config.optimizer)
    assert 0 < float(schedule(run.total_steps // 2)) < 1.0001 * run.peak_learning_rate
    assert get_spec(config.model.variant)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_default_is_the_paper(name):
    arguments = ARGUMENTS[name]
    with_recipe = [a for a in arguments if "recipe=" in a]
    if with_recipe:
        assert {re.search(r"recipe=(\w+)", a)[1] for a in with_recipe} == {"paper", "released"}
        first = with_recipe[0]
        assert load(name, first.replace("recipe=paper", "").strip(",")) == load(name, first)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_file_says_what_it_stands_for(name):
    text = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
    heading = text.split('"""')[1]
    assert f"python -m effnetv2_jax.main --config=configs/{name}.py" in heading
    if name in ("digits", "fashion_mnist", "fashion_mnist_subset", "finetune"):
        assert "Not a run of the paper" in heading
    else:
        assert "Table" in heading or "In no table" in heading
        assert "Not run at this scale by this project." in heading
        assert "% top-1" in heading or "top-1 in %" in heading or "V1" in heading


def test_mistaken_arguments_are_one_sentence():
    with pytest.raises(
        InputError, match="unknown transfer data 'svhn': choose one of cars, cifar10"
    ):
        load("transfer", "model=s,data=svhn")
    with pytest.raises(InputError, match="did you mean efficientnetv2-xl"):
        load("transfer", "model=xxl")
    with pytest.raises(InputError, match="progressive=maybe: it must be yes or no"):
        load("v1", "b4,progressive=maybe")
    with pytest.raises(InputError, match="unknown recipe 'papr': did you mean paper"):
        load("l_21k", "recipe=papr")
