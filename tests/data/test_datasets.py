"""Names, splits and the mistakes that users make with them."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

from effnetv2_jax.data.datasets import list_datasets, load_dataset
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.errors import InputError


def examples(source):
    """Every (image, label) of a source, by index."""
    stream = source.eval_stream(batch_size=1, process_index=0, process_count=1)
    return [(row["image"], int(row["label"])) for row in stream.as_numpy_iterator()]


def test_digits_are_scikit_learns_with_every_fifth_held_out():
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    digits = load_dataset("digits")
    assert (digits.train.num_examples, digits.eval.num_examples) == (1438, 359)
    assert digits.num_classes == 10 and digits.class_names == tuple("0123456789")
    for source, rows in (
        (digits.train, [i for i in range(1797) if i % 5 != 4]),
        (digits.eval, [i for i in range(1797) if i % 5 == 4]),
    ):
        images, labels = zip(*examples(source), strict=True)
        np.testing.assert_array_equal(labels, raw.target[rows])
        images = np.stack(images)
        assert images.dtype == np.uint8 and images.shape == (len(rows), 8, 8, 3)
        assert images.min() == 0 and images.max() == 255
        for channel in range(3):
            np.testing.assert_array_equal(
                np.round(images[..., channel] / 255 * 16), raw.images[rows]
            )


def test_digits_without_scikit_learn_tell_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install effnetv2_jax\[digits\]"):
        load_dataset("digits")


def test_synthetic_images_show_their_class_and_never_repeat():
    dataset = load_dataset("synthetic:classes=5,train=20,eval=10,size=16")
    assert dataset.num_classes == 5
    assert (dataset.train.num_examples, dataset.eval.num_examples) == (20, 10)
    train, evaluation = examples(dataset.train), examples(dataset.eval)
    assert train[0][0].shape == (16, 16, 3) and train[0][0].dtype == np.uint8
    assert len({image.tobytes() for image, _ in train + evaluation}) == 30
    # The nearest class mean of the training images classifies the evaluation images.
    means = np.stack(
        [np.mean([im.mean((0, 1)) for im, y in train if y == c], axis=0) for c in range(5)]
    )
    for image, label in evaluation:
        assert np.argmin(np.abs(means - image.mean((0, 1))).sum(-1)) == label
    again = examples(load_dataset("synthetic:size=16,eval=10,train=20,classes=5").train)
    np.testing.assert_array_equal(again[3][0], train[3][0])


def test_a_plain_synthetic_has_its_defaults():
    dataset = load_dataset("synthetic")
    assert (dataset.num_classes, dataset.train.num_examples, dataset.eval.num_examples) == (
        10,
        256,
        64,
    )


def test_a_folder_with_splits(make_folder):
    make_folder({"dog": 3, "cat": 2}, under="train")
    root = make_folder({"cat": 1, "dog": 2}, under="val")
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"hidden")
    dataset = load_dataset(f"folder:{root}")
    assert dataset.class_names == ("cat", "dog") and dataset.num_classes == 2
    assert [label for _, label in examples(dataset.train)] == [0, 0, 1, 1, 1]
    assert [label for _, label in examples(dataset.eval)] == [0, 1, 1]
    assert examples(dataset.train)[0][0] == (root / "train" / "cat" / "0.jpg").read_bytes()
    assert "cat" in dataset.train.describe(0) and "0.jpg" in dataset.train.describe(0)


def test_a_class_called_train_is_a_class(make_folder):
    root = make_folder({"car": 20, "train": 20})
    assert load_dataset(f"folder:{root}", eval_fraction=0.5).class_names == ("car", "train")


def test_a_folder_without_splits_holds_out_a_stable_part(make_folder, tmp_path):
    root = make_folder({"a": 40, "b": 40})
    dataset = load_dataset(f"folder:{root}", eval_fraction=0.25)

    def paths(split):
        return {split.describe(i) for i in range(split.num_examples)}

    train, evaluation = paths(dataset.train), paths(dataset.eval)
    assert not train & evaluation and len(train | evaluation) == 80
    assert 8 <= len(evaluation) <= 32
    # Neither another file nor another place of the folder moves an image to the other split.
    root.joinpath("a", "0.jpg").unlink()
    moved = root.rename(tmp_path / "moved")
    again = paths(load_dataset(f"folder:{moved}", eval_fraction=0.25).eval)
    kept = {path for path in evaluation if "/a/0.jpg" not in path}
    assert again == {path.replace(str(root), str(moved)) for path in kept}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: root.rename(root.parent / "elsewhere"), "is not a folder"),
        (lambda root: [p.rename(root.parent / p.name) for p in root.iterdir()], "no class folders"),
        (lambda root: root.joinpath("empty").mkdir(), "empty' is empty"),
        (lambda root: root.joinpath("a", "notes.txt").touch(), "notes.txt' is not an image"),
        (lambda root: root.joinpath("a", "nested").mkdir(), "nested' is not an image"),
    ],
)
def test_a_malformed_folder_is_named(make_folder, break_it, message):
    root = make_folder({"a": 5, "b": 5})
    break_it(root)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(f"folder:{root}")
    assert str(root) in str(error.value)


def test_the_classes_of_both_folders_must_agree(make_folder):
    make_folder({"a": 1, "b": 1, "c": 1}, under="train")
    root = make_folder({"a": 1, "b": 1, "d": 1}, under="test")
    with pytest.raises(InputError, match="c, d are in one only"):
        load_dataset(f"folder:{root}")


def test_a_training_folder_needs_an_evaluation_folder(make_folder):
    root = make_folder({"a": 1, "b": 1}, under="train")
    with pytest.raises(InputError, match="none of validation, val, test"):
        load_dataset(f"folder:{root}")


def test_both_parts_of_a_folder_must_hold_images(make_folder):
    root = make_folder({"a": 2, "b": 2})
    with pytest.raises(InputError, match="leaves no evaluation images"):
        load_dataset(f"folder:{root}", eval_fraction=1e-9)
    with pytest.raises(InputError, match="leaves no training images"):
        load_dataset(f"folder:{root}", eval_fraction=1 - 1e-9)


def test_tfds_numbers_come_from_the_data(tfds_dir):
    dataset = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir)
    assert dataset.num_classes == 3 and dataset.class_names == ("red", "green", "blue")
    assert (dataset.train.num_examples, dataset.eval.num_examples) == (23, 7)


def test_tfds_splits_can_be_chosen(tfds_dir):
    dataset = load_dataset(
        "tfds:tiny_pictures", data_dir=tfds_dir, train_split="train[:80%]", eval_split="train[80%:]"
    )
    assert (dataset.train.num_examples, dataset.eval.num_examples) == (18, 5)

    def images(source):
        return {image for image, _ in examples(source)}

    assert not images(dataset.train) & images(dataset.eval)
    both = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, train_split="train+test")
    assert both.train.num_examples == 30


def test_a_tfds_split_that_does_not_exist_lists_those_that_do(tfds_dir):
    with pytest.raises(InputError, match=r"no split 'valid': choose from .*test"):
        load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, eval_split="valid")
    with pytest.raises(InputError, match="is empty"):
        load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, train_split="train[:0]")


def adhoc_tfds(directory, name, features, example, file_format="tfrecord"):
    """Prepares a TFDS data set of three equal examples with a training split only."""
    import tensorflow_datasets as tfds

    tfds.dataset_builders.AdhocBuilder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": [(i, example) for i in range(3)]},
        data_dir=directory,
        file_format=file_format,
    ).download_and_prepare()


def test_tfds_data_that_cannot_be_classified_is_refused(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pixels = np.zeros((4, 4, 3), np.uint8)
    adhoc_tfds(
        tmp_path,
        "boxes",
        {"image": tfds.features.Image(), "box": np.int64},
        {"image": pixels, "box": 1},
    )
    with pytest.raises(InputError, match="has the features box, image"):
        load_dataset("tfds:boxes", data_dir=str(tmp_path))

    labelled = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    adhoc_tfds(tmp_path, "only_train", labelled, {"image": pixels, "label": 1})
    with pytest.raises(InputError, match="choose an eval_split"):
        load_dataset("tfds:only_train", data_dir=str(tmp_path))

    pytest.importorskip("array_record")
    adhoc_tfds(tmp_path, "other", labelled, {"image": pixels, "label": 1}, "array_record")
    with pytest.raises(InputError, match=r"stored as array_record: .*file_format='tfrecord'"):
        load_dataset("tfds:other", data_dir=str(tmp_path))


def test_tfds_data_that_is_not_there_tells_the_remedy(tmp_path):
    # ImageNet must be downloaded by hand, so this fails before any network is asked.
    with pytest.raises(InputError, match=r"set data_dir .*`tfds build imagenet2012"):
        load_dataset("imagenet2012", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("imagenet", {}, "did you mean imagenet2012"),
        ("cifra10", {}, "did you mean cifar10"),
        ("qqqqqqqqqq", {}, "choose one of .*digits.*folder:/path.*tfds:NAME"),
        ("folder:", {}, "unknown data set"),
        ("tfds:", {}, "unknown data set"),
        ("tfds:no_such_pictures", {}, "unknown TFDS data set"),
        ("tfds:cifar10/nosuch", {}, "cannot open 'cifar10/nosuch'"),
        ("synthetic:clases=3", {}, "did you mean classes"),
        ("synthetic:classes=0", {}, "classes=N with N at least 1"),
        ("synthetic:classes", {}, "classes=N with N at least 1"),
        ("synthetic", {"train_split": "train"}, "train_split 'train' is for TFDS"),
        ("digits", {"eval_split": "test"}, "eval_split 'test' is for TFDS"),
        ("folder:/x", {"data_dir": "/data"}, "data_dir '/data' is for TFDS"),
        ("synthetic", {"eval_fraction": 1.0}, "eval_fraction 1.0 must be between 0 and 1"),
        ("synthetic", {"shuffle_buffer": 0}, "shuffle_buffer 0 must be 1"),
    ],
)
def test_mistakes_in_the_arguments(name, arguments, message):
    with pytest.raises(InputError, match=message):
        load_dataset(name, **arguments)


def test_names_are_listed():
    assert list_datasets() == (
        "cifar10",
        "cifar100",
        "digits",
        "imagenet2012",
        "oxford_flowers102",
        "synthetic",
    )


def test_the_package_itself_loads_no_tensorflow():
    code = "import sys, effnetv2_jax.data; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_sees_no_gpu():
    importlib.import_module("effnetv2_jax.data.pipeline")
    assert not tf.config.get_visible_devices("GPU")
