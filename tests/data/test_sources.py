"""The order of examples: permutations, processes, resuming, and one pass in evaluation."""

import numpy as np
import pytest

from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.sources import shuffled_index
from effnetv2_jax.errors import InputError

SYNTHETIC = "synthetic:train=23,eval=7,size=4,classes=3"


@pytest.fixture(params=["indexed", "records"])
def dataset(request, tfds_dir):
    """23 training and 7 evaluation examples from either kind of source."""
    if request.param == "indexed":
        return load_dataset(SYNTHETIC)
    return load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, shuffle_buffer=5)


def train_columns(source, *names, seed=0, first_step=0, last_step=9, batch_size=8, of=(0, 1)):
    stream = source.train_stream(
        seed=seed,
        first_step=first_step,
        last_step=last_step,
        batch_size=batch_size,
        process_index=of[0],
        process_count=of[1],
    )
    rows = [tuple(int(row[name]) for name in names) for row in stream.as_numpy_iterator()]
    return np.array(rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 100])
def test_every_epoch_is_a_permutation(size):
    for epoch in range(3):
        offsets = tf.range(size, dtype=tf.int64)
        order = shuffled_index(offsets, seed=7, epoch=tf.constant(epoch, tf.int64), size=size)
        assert sorted(order.numpy()) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        offsets = tf.range(100, dtype=tf.int64)
        epoch = tf.constant(epoch, tf.int64)
        return tuple(shuffled_index(offsets, seed=seed, epoch=epoch, size=100).numpy())

    # Seeds that differ only above 32 bits differ too.
    orders = [order(seed, epoch) for seed in (0, 1, 1 << 40, -1) for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)
    assert order(1, 1) == order(1, 1)


def test_an_epoch_ends_where_the_next_begins(dataset):
    rows = train_columns(dataset.train, "epoch", "index")
    assert len(rows) == 72
    assert rows[:, 0].tolist() == [position // 23 for position in range(72)]
    for epoch in range(3):
        assert sorted(rows[rows[:, 0] == epoch, 1]) == list(range(23))
    assert rows[:23, 1].tolist() != rows[23:46, 1].tolist()


@pytest.mark.parametrize("first_step", [1, 2, 3, 5, 8])
def test_resuming_equals_the_straight_stream(dataset, first_step):
    straight = train_columns(dataset.train, "epoch", "index", "label")
    resumed = train_columns(dataset.train, "epoch", "index", "label", first_step=first_step)
    np.testing.assert_array_equal(resumed, straight[first_step * 8 :])


def test_the_seed_decides_the_order(dataset):
    first, again, other = (train_columns(dataset.train, "index", seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_indexed_sources_have_one_global_batch_for_any_number_of_processes(processes):
    source = load_dataset(SYNTHETIC).train
    parts = [
        train_columns(source, "epoch", "index", of=(p, processes)).reshape(9, -1, 2)
        for p in range(processes)
    ]
    whole = train_columns(source, "epoch", "index").reshape(9, 8, 2)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_record_sources_share_every_example_between_the_processes(tfds_dir):
    source = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir).train
    parts = [train_columns(source, "epoch", "index", of=(p, 4), last_step=3) for p in range(4)]
    assert [len(part) for part in parts] == [6, 6, 6, 6]
    first_epochs = np.concatenate([part[part[:, 0] == 0, 1] for part in parts])
    assert sorted(first_epochs) == list(range(23))


def test_the_index_of_a_record_belongs_to_its_image(tfds_dir):
    parts = [
        load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, train_split=split).train
        for split in ("train[:5]", "train[5:17]", "train[17:]")
    ]
    assert [part.num_examples for part in parts] == [5, 12, 6]

    def colours(source):
        """The colour of every example, by index, wherever training meets it."""
        found = {}
        stream = source.train_stream(
            seed=0, first_step=0, last_step=30, batch_size=2, process_index=0, process_count=1
        )
        for example in stream:
            colour = int(tf.io.decode_png(example["image"])[0, 0, 0])
            assert found.setdefault(int(example["index"]), colour) == colour
        return [found[index] for index in range(source.num_examples)]

    whole = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir).train
    assert [colour for part in parts for colour in colours(part)] == colours(whole)
    assert sorted(colours(whole)) == [10 * i for i in range(23)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("per_process", [1, 2, 4, 30])
def test_evaluation_meets_every_example_once(dataset, processes, per_process):
    batch_size = per_process * processes
    real = []
    for process in range(processes):
        stream = dataset.eval.eval_stream(
            batch_size=batch_size, process_index=process, process_count=processes
        )
        rows = list(stream.as_numpy_iterator())
        assert len(rows) == -(-7 // batch_size) * per_process
        assert {float(row["mask"]) for row in rows} <= {0.0, 1.0}
        real += [int(row["index"]) for row in rows if row["mask"]]
    assert sorted(real) == list(range(7))


def test_more_processes_than_records_is_an_error(tfds_dir):
    source = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, train_split="train[:3]").train
    with pytest.raises(InputError, match="3 examples, fewer than the 4 processes"):
        train_columns(source, "index", of=(0, 4))


def test_a_record_is_described_by_its_file(tfds_dir):
    source = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir).train
    assert "record 0 of" in source.describe(0)
    assert "train.tfrecord-00000-of-00004" in source.describe(0)
    assert "train.tfrecord-00003-of-00004" in source.describe(22)
