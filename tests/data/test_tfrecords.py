"""ImageNet's official TFRecord files, in miniature."""

import json
import os

import numpy as np
import pytest

from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.tfrecords import COUNTS_FILE
from effnetv2_jax.errors import InputError

TRAIN, VALIDATION = (3, 5, 4), (2, 3)


def write_shards(directory, encode, picture):
    """Labels are 1, 2, ... in the order of the examples; returns the training images."""
    images = []
    for split, sizes in (("train", TRAIN), ("validation", VALIDATION)):
        label = 0
        for number, size in enumerate(sizes):
            path = f"{directory}/{split}-{number:05d}-of-{len(sizes):05d}"
            with tf.io.TFRecordWriter(path) as writer:
                for _ in range(size):
                    label += 1
                    image = encode(picture(label))
                    images += [image] if split == "train" else []
                    features = {
                        "image/encoded": tf.train.Feature(
                            bytes_list=tf.train.BytesList(value=[image])
                        ),
                        "image/class/label": tf.train.Feature(
                            int64_list=tf.train.Int64List(value=[label])
                        ),
                        "image/class/text": tf.train.Feature(
                            bytes_list=tf.train.BytesList(value=[b"a word"])
                        ),
                    }
                    example = tf.train.Example(features=tf.train.Features(feature=features))
                    writer.write(example.SerializeToString())
    return images


@pytest.fixture
def shards(tmp_path, encode, picture):
    write_shards(tmp_path, encode, picture)
    return tmp_path


def examples(source):
    stream = source.eval_stream(batch_size=1, process_index=0, process_count=1)
    rows = sorted(stream.as_numpy_iterator(), key=lambda row: row["index"])
    return [(row["image"], int(row["label"])) for row in rows]


def test_images_and_labels_from_zero(tmp_path, encode, picture):
    images = write_shards(tmp_path, encode, picture)
    dataset = load_dataset(f"tfrecord:{tmp_path}")
    assert dataset.num_classes == 1000 and dataset.class_names is None
    assert (dataset.train.num_examples, dataset.eval.num_examples) == (12, 5)
    assert examples(dataset.train) == list(zip(images, range(12), strict=True))
    assert [label for _, label in examples(dataset.eval)] == list(range(5))
    assert "train-00001-of-00003" in dataset.train.describe(3)
    assert load_dataset(f"tfrecord:{tmp_path},classes=12").num_classes == 12


def test_the_minival_is_that_of_the_first_shards(shards):
    dataset = load_dataset(f"tfrecord:{shards}", minival_examples=TRAIN[0] + TRAIN[1])
    assert [label for _, label in examples(dataset.minival)] == list(range(8))
    assert [label for _, label in examples(dataset.train)] == list(range(8, 12))
    assert all("train-00002-of-00003" in dataset.train.describe(i) for i in range(4))


def test_the_counts_are_kept_and_used_while_the_sizes_agree(shards):
    load_dataset(f"tfrecord:{shards}")
    path = shards / COUNTS_FILE
    counts = json.loads(path.read_text())
    assert len(counts) == 5 and list(shards.glob(f"{COUNTS_FILE}?*")) == []
    first = counts["train-00000-of-00003"]
    assert first == {"bytes": (shards / "train-00000-of-00003").stat().st_size, "records": 3}
    # A kept number is believed: nothing is counted again.
    first["records"] = 2
    path.write_text(json.dumps(counts))
    assert load_dataset(f"tfrecord:{shards}").train.num_examples == 11
    # Unless the file has another size, or the number cannot be one.
    for wrong in ({"bytes": 1, "records": 2}, {**first, "records": "2"}, 2, None):
        path.write_text(json.dumps(counts | {"train-00000-of-00003": wrong}))
        assert load_dataset(f"tfrecord:{shards}").train.num_examples == 12
        assert json.loads(path.read_text())["train-00000-of-00003"]["records"] == 3
    for content in ("[]", "{", ""):
        path.write_text(content)
        assert load_dataset(f"tfrecord:{shards}").train.num_examples == 12


def test_a_folder_that_cannot_be_written_is_counted_each_time(shards):
    # A folder in the file's place cannot be replaced, whoever tries.
    (shards / COUNTS_FILE).mkdir()
    (shards / COUNTS_FILE / "taken").touch()
    assert load_dataset(f"tfrecord:{shards}").train.num_examples == 12


def test_a_url_is_not_taken_for_a_path(encode, picture):
    url = "ram://bucket/imagenet"
    tf.io.gfile.makedirs(url)
    write_shards(url, encode, picture)
    dataset = load_dataset(f"tfrecord:{url}", minival_examples=3)
    assert [label for _, label in examples(dataset.train)] == list(range(3, 12))
    assert tf.io.gfile.exists(f"{url}/{COUNTS_FILE}")


def test_the_home_folder_may_be_a_tilde(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    assert load_dataset(f"tfrecord:~/{shards.name}").train.num_examples == 12


def cut(path, size=None):
    """Keeps `size` bytes of a file, or all but the last."""
    os.truncate(path, path.stat().st_size - 1 if size is None else size)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: [f.unlink() for f in p.iterdir()], "one set of files train-.* has 0"),
        (lambda p: p.joinpath("train-00001-of-00003").unlink(), "1 of the 3 train .*00001-of-0000"),
        (
            lambda p: [p.joinpath(f"validation-0000{i}-of-00002").unlink() for i in range(2)],
            "one set of files validation-.* has 0",
        ),
        (lambda p: p.joinpath("train-00000-of-00004").touch(), "one set of files train-.* has 2"),
        (lambda p: cut(p / "train-00001-of-00003", 7), "00001-of-00003' is cut short .* record 0"),
        (lambda p: cut(p / "train-00001-of-00003", 0), "00001-of-00003' holds no records"),
        (
            lambda p: cut(p / "validation-00001-of-00002"),
            "validation-00001-of-00002' is cut short or damaged in record 2",
        ),
        (
            lambda p: p.joinpath("train-00002-of-00003").write_bytes(b"no record file at all"),
            "00002-of-00003' is cut short or damaged in record 0",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(shards, break_it, message):
    # Damage is found although the numbers were kept.
    load_dataset(f"tfrecord:{shards}")
    break_it(shards)
    with pytest.raises(InputError, match=message):
        load_dataset(f"tfrecord:{shards}")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere' cannot be listed"):
        load_dataset(f"tfrecord:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("content", ["other features", "other bytes", "bad checksum"])
def test_records_of_another_kind_are_refused(shards, content):
    path = shards / "train-00000-of-00003"
    if content == "bad checksum":
        raw = bytearray(path.read_bytes())
        raw[30] ^= 1
        path.write_bytes(raw)
    else:
        with tf.io.TFRecordWriter(str(path)) as writer:
            example = tf.train.Example().SerializeToString()
            writer.write(example if content == "other features" else b"\x99garbage")
    with pytest.raises(InputError, match=r"first record of '.*train-00000-of-00003' is not"):
        load_dataset(f"tfrecord:{shards}")


def test_training_reads_them(shards):
    dataset = load_dataset(f"tfrecord:{shards}", shuffle_buffer=5)
    stream = dataset.train.train_stream(
        seed=0, first_step=0, last_step=6, batch_size=4, process_index=0, process_count=1
    )
    labels = [int(row["label"]) for row in stream.as_numpy_iterator()]
    assert sorted(labels) == sorted(2 * list(range(12)))
    assert np.unique(labels[:12]).size == 12
