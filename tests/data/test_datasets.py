"""Names, splits and the mistakes that users make with them."""

import importlib
import os
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
    rows = sorted(stream.as_numpy_iterator(), key=lambda row: row["index"])
    return [(row["image"], int(row["label"])) for row in rows]


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
    both = load_dataset(
        "tfds:tiny_pictures",
        data_dir=tfds_dir,
        train_split="train+test[:2]",
        eval_split="test[2:]",
    )
    assert both.train.num_examples == 25


def test_tfds_splits_that_overlap_are_refused(tfds_dir):
    for train_split, eval_split in (
        # The released code's flowers overlap like this.
        ("train[:70%]", "train[30%:]"),
        ("train", "train"),
        ("test+train", "test"),
        ("train[:6]", "train[5:6]"),
    ):
        with pytest.raises(InputError) as error:
            load_dataset(
                "tfds:tiny_pictures",
                data_dir=tfds_dir,
                train_split=train_split,
                eval_split=eval_split,
            )
        message = f"train_split {train_split!r} and eval_split {eval_split!r} of"
        assert message in str(error.value) and "overlap" in str(error.value)


def minival_examples_of(name, count, **arguments):
    """What describes the examples of train, minival and the whole, once they are a partition."""
    split = load_dataset(name, minival_examples=count, **arguments)
    whole = load_dataset(name, **arguments)
    assert whole.minival is None and split.minival.num_examples == count
    assert split.eval.num_examples == whole.eval.num_examples
    train, minival, everything = (
        [source.describe(index) for index in range(source.num_examples)]
        for source in (split.train, split.minival, whole.train)
    )
    assert sorted(train + minival) == sorted(everything) and len(set(everything)) == len(everything)
    # What a description names is what is read there.
    content = dict(zip(everything, examples(whole.train), strict=True))
    for names, source in ((train, split.train), (minival, split.minival)):
        for name, (image, label) in zip(names, examples(source), strict=True):
            assert label == content[name][1]
            np.testing.assert_array_equal(image, content[name][0])
    return train, minival, everything


@pytest.mark.parametrize("count", [1, 7, 22])
def test_the_minival_of_record_files_is_their_beginning(tfds_dir, count):
    _, minival, everything = minival_examples_of(
        "tfds:tiny_pictures", count, data_dir=tfds_dir, train_split="train"
    )
    assert minival == everything[:count]


def test_the_minival_of_arrays_is_spread_and_stable():
    _, minival, everything = minival_examples_of("synthetic:train=60,eval=3,size=4", 20)
    places = [everything.index(name) for name in minival]
    assert places == sorted(places) and places[0] < 15 and places[-1] > 45
    assert minival_examples_of("synthetic:train=60,eval=3,size=4", 20)[1] == minival
    fewer = minival_examples_of("synthetic:train=60,eval=3,size=4", 5)[1]
    assert set(fewer) < set(minival)


@pytest.mark.parametrize("under", ["train", "."])
def test_the_minival_of_a_folder_moves_with_it(make_folder, under, tmp_path):
    root = make_folder({"a": 12, "b": 12}, under=under)
    if under == "train":
        make_folder({"a": 2, "b": 2}, under="val")
    _, minival, _ = minival_examples_of(f"folder:{root}", 6)
    moved = root.rename(tmp_path / "moved")
    _, again, _ = minival_examples_of(f"folder:{moved}", 6)
    assert again == [name.replace(str(root), str(moved)) for name in minival]


def test_a_minival_is_smaller_than_the_training_split():
    for count in (-1, 23, 24):
        with pytest.raises(InputError, match=rf"minival_examples {count} .* the 23 training"):
            load_dataset("synthetic:train=23", minival_examples=count)


def test_training_on_fewer_examples():
    name = "synthetic:train=60,eval=3,size=4"
    whole = load_dataset(name, minival_examples=20)
    few = load_dataset(name, minival_examples=20, train_examples=10)
    names, rest = (
        {source.describe(index) for index in range(source.num_examples)}
        for source in (few.train, whole.train)
    )
    assert len(names) == 10 and names < rest
    assert few.minival.num_examples == 20 and few.eval.num_examples == 3
    assert load_dataset(name, minival_examples=20, train_examples=40).train.num_examples == 40
    for count in (0, 41):
        with pytest.raises(InputError, match=rf"train_examples {count} .* the 40 of"):
            load_dataset(name, minival_examples=20, train_examples=count)


def test_tuning_sees_the_minival_in_place_of_the_evaluation_split():
    name = "synthetic:train=60,eval=3,size=4"
    held_out = load_dataset(name, minival_examples=20).minival
    tuning = load_dataset(name, minival_examples=20, eval_split="minival")
    assert tuning.minival is None and tuning.train.num_examples == 40
    for (image, label), (expected, expected_label) in zip(
        examples(tuning.eval), examples(held_out), strict=True
    ):
        np.testing.assert_array_equal(image, expected)
        assert label == expected_label
    with pytest.raises(InputError, match="'minival' needs some: set minival_examples"):
        load_dataset(name, eval_split="minival")


@pytest.fixture(scope="module")
def multi_label_dir(tmp_path_factory):
    """A data_dir with `tagged` and `tagged_up_to_five`, whose metadata has max_labels 5.

    Example i has the first i labels of 2, 0, 1.
    """
    import tensorflow_datasets as tfds

    class Tagged(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        metadata = None

        def _info(self):
            classes = tfds.features.ClassLabel(names=["x", "y", "z"])
            features = {
                "image": tfds.features.Image(),
                "labels": tfds.features.Sequence(classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                metadata=self.metadata,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(1, count + 1):
                yield i, {"image": np.full((4, 4, 3), i, np.uint8), "labels": [2, 0, 1][:i]}

    class TaggedUpToFive(Tagged):
        metadata = tfds.core.MetadataDict(max_labels=5)

    directory = tmp_path_factory.mktemp("multi")
    for builder in (Tagged, TaggedUpToFive):
        builder(data_dir=directory).download_and_prepare()
    return str(directory)


@pytest.mark.parametrize(("name", "width"), [("tagged", 3), ("tagged_up_to_five", 5)])
def test_multi_label_examples_are_padded(multi_label_dir, name, width):
    dataset = load_dataset(f"tfds:{name}", data_dir=multi_label_dir)
    assert dataset.multi_label and dataset.num_classes == 3
    assert dataset.class_names == ("x", "y", "z")
    stream = dataset.train.eval_stream(batch_size=1, process_index=0, process_count=1)
    assert stream.element_spec["label"].shape == (width,)
    found = []
    for row in stream.as_numpy_iterator():
        count = int(tf.io.decode_image(row["image"])[0, 0, 0])
        assert row["label"].dtype == np.int32
        assert row["label"].tolist() == [2, 0, 1][:count] + [-1] * (width - count)
        found.append(count)
    assert sorted(found) == [1, 2, 3]


def test_other_data_sets_have_one_label(tfds_dir):
    assert not load_dataset("tfds:tiny_pictures", data_dir=tfds_dir).multi_label
    assert not load_dataset("synthetic").multi_label


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


def test_cars_that_are_not_there_tell_of_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"cars196 is not prepared .* cars:/path"):
        load_dataset("cars196", data_dir=str(tmp_path))


def test_tfds_finds_its_folder_in_the_environment(tfds_dir):
    code = (
        "from effnetv2_jax.data.datasets import load_dataset\n"
        "print(load_dataset('tfds:tiny_pictures').train.num_examples)"
    )
    environment = os.environ | {"TFDS_DATA_DIR": tfds_dir}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "23"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("imagenet", {}, "did you mean .*imagenet2012"),
        ("cifra10", {}, "did you mean cifar10"),
        ("qqqqqqqqqq", {}, "choose one of .*digits.*folder:/path.*tfds:NAME"),
        ("folder:", {}, "unknown data set"),
        ("tfds:", {}, "unknown data set"),
        ("tfrecord:", {}, "unknown data set"),
        ("cars:", {}, "unknown data set"),
        ("tfrecord:/x", {"train_split": "train"}, "train_split 'train' is for TFDS"),
        ("tfrecord:/x,class=3", {}, r"'class=3' in .* write tfrecord:/path,classes=N"),
        ("tfrecord:/x,classes=0", {}, "classes=0"),
        ("cars:/x", {"data_dir": "/y"}, "data_dir '/y' is for TFDS"),
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
        "cars196",
        "cifar10",
        "cifar100",
        "digits",
        "fashion_mnist",
        "imagenet2012",
        "imagenet21k",
        "oxford_flowers102",
        "synthetic",
    )


def test_the_package_itself_loads_no_tensorflow():
    code = "import sys, effnetv2_jax.data; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_sees_no_gpu():
    importlib.import_module("effnetv2_jax.data.pipeline")
    assert not tf.config.get_visible_devices("GPU")
