"""The order of examples: permutations, processes, resuming, and one pass in evaluation."""

import numpy as np
import pytest

from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.sources import (
    IndexedSource,
    RecordSource,
    Shard,
    shuffled_index,
)
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


@pytest.fixture
def make_records(tmp_path):
    """A source of record files with these numbers of records, which hold their index."""

    def make(*sizes, shuffle_buffer):
        shards, index = [], 0
        for number, size in enumerate(sizes):
            shards.append(Shard(str(tmp_path / f"{number}.tfrecord"), 0, size))
            with tf.io.TFRecordWriter(shards[-1].path) as writer:
                for _ in range(size):
                    writer.write(str(index).encode())
                    index += 1
        return RecordSource(
            shards,
            lambda record: (record, tf.strings.to_number(record, tf.int32)),
            name="numbers",
            shuffle_buffer=shuffle_buffer,
        )

    return make


def positions(source, first, last):
    """(epoch, index) at the positions [first, last) of the stream."""
    rows = train_columns(
        source, "epoch", "index", "label", first_step=first, last_step=last, batch_size=1
    )
    np.testing.assert_array_equal(rows[:, 1], rows[:, 2])
    return rows[:, :2]


# The fifth file is cut where the buffer has fewer than 12 records.
SIZES = (3, 4, 2, 4, 12, 1, 3, 4, 4, 2)


@pytest.mark.parametrize("shuffle_buffer", [1, 5, 8, 39, 1000])
def test_every_epoch_has_every_record_once(make_records, shuffle_buffer):
    rows = positions(make_records(*SIZES, shuffle_buffer=shuffle_buffer), 0, 3 * 39)
    orders = [tuple(rows[rows[:, 0] == epoch, 1]) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(39))
    assert len(set(orders)) == 3
    assert rows[:, 0].tolist() == sorted(rows[:, 0])


def test_files_and_records_within_a_window_are_mixed(make_records):
    rows = positions(make_records(*[50] * 8, shuffle_buffer=100), 0, 400)
    windows = rows[:, 1].reshape(4, 100)
    files = windows // 50
    assert all(len(set(window)) == 2 for window in files)
    assert len({file for window in files for file in set(window)}) == 8
    for window in files:
        # A fair order changes the file about every second time.
        assert 30 <= (window[1:] != window[:-1]).sum() <= 70
        assert 30 <= (window[:50] == window[0]).sum() * 2 <= 70
    # Neither the order of the files nor that in a window is that of another epoch or window.
    assert len({tuple(np.argsort(window)) for window in windows}) == 4


def test_a_window_is_no_larger_than_the_buffer(make_records):
    rows = positions(make_records(60, 30, shuffle_buffer=10), 0, 90)
    for window in rows[:, 1].reshape(9, 10):
        assert window.max() - window.min() == 9
        assert window.tolist() != sorted(window)


@pytest.mark.parametrize("shuffle_buffer", [4, 8])
def test_resuming_inside_windows_and_epochs_equals_the_straight_stream(
    make_records, shuffle_buffer
):
    source = make_records(*SIZES, shuffle_buffer=shuffle_buffer)
    straight = positions(source, 0, 100)
    for first in (1, 7, 8, 20, 38, 39, 40, 77, 78, 99):
        np.testing.assert_array_equal(positions(source, first, 100), straight[first:])
    np.testing.assert_array_equal(positions(source, 30, 50), straight[30:50])


def test_a_resumed_stream_opens_the_files_of_its_windows_only(make_records, tmp_path):
    # Windows of two files, 8 records: the buffer would not hold a third file.
    source = make_records(*[4] * 12, shuffle_buffer=11)
    straight = positions(source, 0, 96)
    for epoch, first, last in ((0, 19, 48), (0, 24, 25), (1, 59, 64)):
        windows = straight[first - first % 8 : -(-last // 8) * 8]
        needed = {f"{index // 4}.tfrecord" for index in windows[:, 1]}
        assert {*windows[:, 0]} == {epoch} and len(needed) == len(windows) / 4
        aside = tmp_path / "aside"
        aside.mkdir()
        for path in tmp_path.glob("*.tfrecord"):
            if path.name not in needed:
                path.rename(aside / path.name)
        np.testing.assert_array_equal(positions(source, first, last), straight[first:last])
        for name in needed:
            (tmp_path / name).rename(aside / name)
            with pytest.raises(tf.errors.NotFoundError):
                positions(source, first, last)
            (aside / name).rename(tmp_path / name)
        for path in aside.iterdir():
            path.rename(tmp_path / path.name)
        aside.rmdir()


def test_the_damaged_file_is_found(make_records, tmp_path):
    source = make_records(4, 4, 4, shuffle_buffer=4)
    assert source.find_damage() is None
    path = tmp_path / "1.tfrecord"
    path.write_bytes(path.read_bytes()[:-6] + b"x" + path.read_bytes()[-5:])
    assert source.find_damage() == str(path)


def test_more_processes_than_records_is_an_error(tfds_dir):
    source = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, train_split="train[:3]").train
    with pytest.raises(InputError, match="3 examples, fewer than the 4 processes"):
        train_columns(source, "index", of=(0, 4))


def test_holding_out_more_holds_out_the_same_and_more():
    names = [f"name {i}" for i in range(30)]
    source = IndexedSource(
        30, lambda index: (index, index), lambda i: names[i], key=lambda i: names[i]
    )

    def described(part):
        return [part.describe(index) for index in range(part.num_examples)]

    rest, five = source.hold_out(5)
    _, three_more = rest.hold_out(3)
    _, eight = source.hold_out(8)
    assert sorted(described(five) + described(three_more)) == sorted(described(eight))


def test_a_record_is_described_by_its_file(tfds_dir):
    source = load_dataset("tfds:tiny_pictures", data_dir=tfds_dir).train
    assert "record 0 of" in source.describe(0)
    assert "train.tfrecord-00000-of-00004" in source.describe(0)
    assert "train.tfrecord-00003-of-00004" in source.describe(22)
