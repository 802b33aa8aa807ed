"""From the archive of ImageNet-21k to a transferred network: every step of Tables 7 and 8, tiny.

The archive in its real layout is prepared by Beam, `l_21k.py` is trained on it,
`l_21k_ft1k.py` starts from that run and `transfer.py` from the next one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from effnetv2_jax import load_model, save_model, train_and_evaluate
from effnetv2_jax.checkpoint import read_parts
from effnetv2_jax.data.builders.imagenet21k import Imagenet21k, Imagenet21kConfig
from effnetv2_jax.errors import InputError
from effnetv2_jax.initial_weights import load_initial_weights
from effnetv2_jax.models.create import create_model
from effnetv2_jax.weights.trained import load_trained
from effnetv2_jax.workdir import read_class_names
from tests.data.miniature_21k import CAR, CAT, DOG, SYNSETS, encode, write_archive
from tests.every_config import load

pytestmark = pytest.mark.slow

STEPS = 20
HEAD = "params/classifier/kernel"


def cut_down(name, argument, **changes):
    """A configuration of the repository on a network and a duration that take seconds."""
    config = load(name, argument)
    config.batch_size = 16
    config.num_epochs = 1e-6
    config.min_steps = STEPS
    config.model.update(
        dtype="float32", width_multiplier=0.25, depth_multiplier=0.02, stem_stride=1, bn_decay=0.9
    )
    config.progressive.image_size = (24, 32) if config.progressive.num_stages > 1 else (32, 32)
    config.progressive.num_stages = min(2, config.progressive.num_stages)
    config.eval.update(image_size=32, batch_size=8, every_epochs=100.0)
    config.data.minival_examples = 0
    config.checkpoint.every_epochs = 100.0
    config.log_every_steps = 10
    config.update_from_flattened_dict(changes)
    return config


def write_folder(root, classes):
    """JPEGs in class folders, for training and validation."""
    for number, name in enumerate(classes):
        for split, count in (("train", 6), ("val", 3)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").write_bytes(
                    encode(10 * number + i + 1000 * (split == "val"))
                )
    return f"folder:{root}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The three workdirs."""
    root = tmp_path_factory.mktemp("chain")
    write_archive(root / "manual")
    config = Imagenet21kConfig(name="miniature", archive="winter21_whole", num_validation=6)
    builder = Imagenet21k(data_dir=str(root / "data"), config=config)
    import tensorflow_datasets as tfds

    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(root / "manual"))
    )
    data = {"data.name": "imagenet21k/miniature", "data.data_dir": str(root / "data")}
    train_and_evaluate(cut_down("l_21k", "", **data), root / "l_21k")
    # Two classes of the archive and one that it does not know.
    name = write_folder(root / "1k", [DOG, CAT, "n99999999"])
    changes = {"data.name": name, "init_from": str(root / "l_21k")}
    train_and_evaluate(cut_down("l_21k_ft1k", "", **changes), root / "ft1k")
    name = write_folder(root / "flowers", ["daisy", "rose"])
    changes = {"data.name": name, "init_from": str(root / "ft1k")}
    train_and_evaluate(
        cut_down("transfer", "model=l,data=flowers", **changes), root / "flowers_run"
    )
    return root


def averages(workdir):
    return read_parts(workdir / "checkpoints" / str(STEPS), ("ema_params", "ema_batch_stats"))


def test_every_link_trains_its_steps(chain):
    for name, classes in (("l_21k", SYNSETS), ("ft1k", (DOG, CAT, "n99999999"))):
        assert read_class_names(chain / name) == sorted(classes)
    for name in ("l_21k", "ft1k", "flowers_run"):
        rows = [json.loads(r) for r in (chain / name / "metrics.jsonl").read_text().splitlines()]
        assert max(row["step"] for row in rows) == STEPS
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        assert np.isfinite(losses).all()
    assert rows[-1]["eval/num_examples"] == 6


def test_the_plan_of_the_archive(chain):
    plan = json.loads((chain / "l_21k" / "plan.json").read_text())
    assert (plan["num_classes"], plan["num_eval_examples"]) == (5, 6)
    assert [stage["image_size"] for stage in plan["stages"]] == [24, 32]


def shapes_of(workdir):
    parts = averages(workdir)
    return {"params": parts["ema_params"], "batch_stats": parts["ema_batch_stats"]}


def initial_weights(init_from, shapes, *, head, names, **changes):
    """For a new network that only its shapes describe."""
    arguments = {
        "model": create_model("efficientnetv2-l", stem_stride=1),
        "mean": (128.0,) * 3,
        "std": (128.0,) * 3,
    }
    return load_initial_weights(
        init_from, shapes, init_head=head, class_names=names, **arguments | changes
    )


def test_the_columns_of_known_classes_are_picked_by_name(chain):
    source = averages(chain / "l_21k")
    names = [CAR, "n99999999", DOG]
    weights = initial_weights(chain / "l_21k", shapes_of(chain / "ft1k"), head="pick", names=names)
    assert weights.new == weights.unused == ()
    assert weights.known_classes.tolist() == [True, False, True]
    old = source["ema_params"]["classifier"]["kernel"]
    new = weights.apply(shapes_of(chain / "ft1k"))["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(new[:, 0], old[:, SYNSETS.index(CAR)])
    np.testing.assert_array_equal(new[:, 2], old[:, SYNSETS.index(DOG)])
    # The unknown class keeps what the new network drew.
    drawn = averages(chain / "ft1k")["ema_params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(new[:, 1], drawn[:, 1])
    stem = weights.values["params/stem_conv/kernel"]
    np.testing.assert_array_equal(stem, source["ema_params"]["stem_conv"]["kernel"])
    statistics = source["ema_batch_stats"]["stem_bn"]["mean"]
    np.testing.assert_array_equal(weights.values["batch_stats/stem_bn/mean"], statistics)


def test_a_new_head_is_named_and_the_rest_matches(chain):
    weights = initial_weights(
        chain / "ft1k",
        shapes_of(chain / "flowers_run"),
        head="auto",
        names=["daisy", "rose"],
    )
    assert weights.new == weights.unused == ("params/classifier/bias", HEAD)
    same = initial_weights(
        chain / "ft1k",
        shapes_of(chain / "ft1k"),
        head="auto",
        names=read_class_names(chain / "ft1k"),
    )
    assert HEAD in same.values and same.new == ()
    # As many classes, but others.
    other = initial_weights(
        chain / "ft1k", shapes_of(chain / "ft1k"), head="auto", names=["a", "b", "c"]
    )
    assert other.new == ("params/classifier/bias", HEAD)


@pytest.mark.parametrize(
    ("init_from", "head", "names", "message"),
    [
        ("l_21k", "keep", ["daisy", "rose"], "init_head 'keep': the classifier of .* is for other"),
        ("l_21k", "pick", ["daisy", "rose"], "knows none of the 2 classes"),
        ("l_21k", "pick", None, "the data set's are not known: use init_head=new"),
        ("l_21k", "pik", ["daisy"], "unknown init_head 'pik': did you mean pick"),
        ("data", "new", None, "is neither a model folder nor a workdir"),
        ("nowhere", "new", None, "is neither a model folder nor a workdir"),
    ],
)
def test_mistakes_are_one_sentence(chain, init_from, head, names, message):
    with pytest.raises(InputError, match=message):
        initial_weights(chain / init_from, shapes_of(chain / "flowers_run"), head=head, names=names)


def test_the_padding_and_the_normalisation_are_compared(chain, caplog):
    shapes = shapes_of(chain / "flowers_run")
    symmetric = create_model("efficientnetv2-l", stem_stride=1, padding="symmetric")
    with pytest.raises(InputError, match=r"set --config\.model\.padding=same"):
        initial_weights(chain / "ft1k", shapes, head="new", names=None, model=symmetric)
    with caplog.at_level("WARNING"):
        initial_weights(chain / "ft1k", shapes, head="new", names=None)
        assert "normalised by" not in caplog.text
        initial_weights(chain / "ft1k", shapes, head="new", names=None, std=(58.0, 57.0, 57.0))
        assert "normalised by" in caplog.text


def test_a_run_becomes_a_model_folder_that_fine_tuning_starts_from(chain, tmp_path):
    spec, variables = load_trained(chain / "ft1k")
    folder = save_model(tmp_path / "model", spec, variables)
    model, loaded, found = load_model(folder)
    assert found == spec
    assert list(spec.classes) == read_class_names(chain / "ft1k")
    assert (spec.variant, spec.eval_size) == ("efficientnetv2-l", 32)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(model.apply(loaded, images), model.apply(variables, images))
    shapes = shapes_of(chain / "flowers_run")
    from_run = initial_weights(chain / "ft1k", shapes, head="new", names=None)
    from_folder = initial_weights(folder, shapes, head="new", names=None)
    assert from_run.values.keys() == from_folder.values.keys()
    for name, value in from_run.values.items():
        np.testing.assert_array_equal(value, from_folder.values[name])


def test_another_network_is_refused_before_anything_is_written(chain, tmp_path):
    changes = {"data.name": f"folder:{chain / 'flowers'}", "init_from": str(chain / "ft1k")}
    config = cut_down("transfer", "model=s", **changes)
    with pytest.raises(InputError, match=r"is of another network \(.*use the same config"):
        train_and_evaluate(config, tmp_path / "run")
    config = cut_down("transfer", "model=l", **changes | {"init_from": ""})
    with pytest.raises(InputError, match=r"init_from is empty.*--config\.init_from="):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_no_initial_weights(chain):
    """They are in its own checkpoint by then."""
    config = cut_down(
        "transfer",
        "model=l,data=flowers",
        **{"data.name": f"folder:{chain / 'flowers'}", "init_from": str(chain / "ft1k")},
    )
    (chain / "ft1k").rename(chain / "moved")
    try:
        results = train_and_evaluate(config, chain / "flowers_run")
    finally:
        (chain / "moved").rename(chain / "ft1k")
    assert results["eval/num_examples"] == 6
