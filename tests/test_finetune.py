"""Fine-tuning one's own images: the configuration obeys the weights, and the run starts there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from effnetv2_jax import load_model, save_model, train_and_evaluate
from effnetv2_jax.errors import InputError
from effnetv2_jax.weights.model_folder import ModelSpec
from effnetv2_jax.weights.trained import load_trained
from tests.every_config import load

SPEC = ModelSpec(
    "efficientnetv2-b0",
    7,
    eval_size=32,
    mean=(123.0, 116.0, 103.0),
    std=(58.0, 57.0, 56.0),
    crop="center",
    crop_fraction=0.9,
    resize="bilinear_antialias",
    padding="symmetric",
    bn_epsilon=1e-5,
    stem_stride=1,
    width_multiplier=0.25,
    depth_multiplier=0.1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder."""
    import jax

    path = tmp_path_factory.mktemp("finetune") / "model"
    variables = SPEC.create_model().init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    return save_model(path, SPEC, variables)


def test_everything_about_the_network_and_its_images_is_taken_from_the_weights(folder):
    config = load("finetune", f"model={folder},data=/some/images")
    assert config.data.name == "folder:/some/images"
    assert config.init_from == str(folder)
    for field in ("variant", "padding", "bn_epsilon", "stem_stride", "width_multiplier"):
        assert config.model[field] == getattr(SPEC, field)
    assert tuple(config.normalize.mean) == SPEC.mean and tuple(config.normalize.std) == SPEC.std
    evaluation = config.eval
    assert (evaluation.image_size, evaluation.crop) == (32, "center")
    assert (evaluation.crop_fraction, evaluation.resize) == (0.9, "bilinear_antialias")
    assert tuple(config.progressive.image_size) == (24, 32)


def test_a_data_set_is_a_folder_or_a_name(folder, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for data, name in {
        "mine": "folder:mine",
        "./nothing": "folder:./nothing",
        "cifar10": "cifar10",
        "imagenet21k/fall11": "imagenet21k/fall11",
        "cars:/data": "cars:/data",
    }.items():
        assert load("finetune", f"model={folder},data={data}").data.name == name


def test_without_weights_they_have_to_be_named(tmp_path):
    config = load("finetune", "")
    with pytest.raises(InputError, match="init_from is empty"):
        train_and_evaluate(config, tmp_path / "run")
    with pytest.raises(InputError, match="is neither a model folder nor a workdir"):
        load("finetune", f"model={tmp_path / 'nothing'}")


def test_the_same_training_from_scratch(folder):
    pretrained, scratch = (load("finetune", f"model={folder},weights={w}") for w in ("yes", "no"))
    assert (pretrained.init_from, scratch.init_from) == (str(folder), None)
    pretrained.init_from = None
    assert scratch.to_dict() == pretrained.to_dict()
    with pytest.raises(InputError, match="weights=maybe: it must be yes or no"):
        load("finetune", f"model={folder},weights=maybe")


def test_a_run_starts_from_the_folder_and_becomes_one(folder, tmp_path):
    config = load("finetune", f"model={folder}")
    config.data.name = "synthetic:classes=3,train=24,eval=7,size=32"
    config.update_from_flattened_dict({"batch_size": 8, "num_epochs": 2.0, "eval.batch_size": 8})
    results = train_and_evaluate(config, tmp_path / "run")
    assert results["eval/num_examples"] == 7
    spec, variables = load_trained(tmp_path / "run")
    assert (spec.padding, spec.crop_fraction, spec.num_classes) == ("symmetric", 0.9, 3)
    # Six small steps from the given weights, not from random ones.
    _, start, _ = load_model(folder)
    before = start["params"]["stem_conv"]["kernel"]
    after = variables["params"]["stem_conv"]["kernel"]
    assert 0 < np.abs(after - before).max() < 0.2 * np.abs(before).max()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == str(folder)
