"""Where examples come from: the position in a stream decides the example, and nothing else does.

A source yields un-batched, undecoded examples as a `tf.data.Dataset` of dicts with
  `image`  a scalar string (an encoded image) or uint8 [height, width, 3],
  `label`  int32; of a multi-label data set int32 [max_labels], padded with -1,
  `index`  int64, the example's position in the split,
and `epoch` (int64, training) or `mask` (float32, evaluation: 1 real, 0 padding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.errors import InputError

# How many record files are read at a time, and the read-ahead of each in bytes: large
# enough for a network file system, 128 MiB together.
_FILES_AT_A_TIME = 16
_READ_AHEAD_BYTES = 8 << 20


class Source(Protocol):
    """One split of a data set."""

    num_examples: int

    def train_stream(
        self,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> tf.data.Dataset:
        """This process's shuffled examples of the global steps [first_step, last_step).

        Args:
          seed: fixes the order of every epoch.
          first_step: the first step; starting there costs the same as starting at zero.
          last_step: the step after the last one.
          batch_size: examples per step over all processes.
          process_index: which process this is.
          process_count: how many processes share a step.

        Returns:
          (last_step - first_step) * batch_size / process_count examples with `epoch`.
        """

    def eval_stream(
        self, *, batch_size: int, process_index: int, process_count: int
    ) -> tf.data.Dataset:
        """One pass: over all processes every example exactly once, then padding.

        Returns:
          ceil(num_examples / batch_size) * batch_size / process_count examples with `mask`.
        """

    def describe(self, index: int) -> str:
        """Names the example at `index`, by its file where it has one."""

    def hold_out(self, count: int) -> tuple[Source, Source]:
        """Splits off `count` examples, always the same; 0 < count < num_examples.

        Returns:
          The source of all the others, and that of the `count` examples.
        """


def epoch_key(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """The random key of one epoch, int32 [2]; `seed` may have up to 64 bits."""
    key = tf.bitcast(tf.constant([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], tf.uint32), tf.int32)
    return tf.random.experimental.stateless_fold_in(key, tf.cast(epoch, tf.int32))


def shuffled_index(offset: tf.Tensor, *, seed: int, epoch: tf.Tensor, size: int) -> tf.Tensor:
    """The example at `offset` (int64) of an epoch's permutation of range(size), in O(1)."""
    return tf.random.experimental.index_shuffle(
        offset, seed=epoch_key(seed, epoch), max_index=tf.constant(size - 1, tf.int64)
    )


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name and nothing else."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


class IndexedSource:
    """Examples that can be looked up by their index: embedded arrays, image folders."""

    def __init__(
        self,
        num_examples: int,
        lookup: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        describe: Callable[[int], str],
        *,
        key: Callable[[int], str] = str,
    ):
        """Creates the source.

        Args:
          num_examples: how many there are.
          lookup: maps an int64 index to (image, int32 label or labels) inside a graph.
          describe: see `Source.describe`.
          key: maps an index to what decides whether the example is held out.
        """
        self.num_examples = num_examples
        self._lookup = lookup
        self._describe = describe
        self._key = key

    def describe(self, index: int) -> str:
        """Names the example at `index`."""
        return self._describe(index)

    def hold_out(self, count: int) -> tuple[IndexedSource, IndexedSource]:
        """See `Source.hold_out`; those with the smallest hash of their key are held out."""
        by_hash = sorted(range(self.num_examples), key=lambda i: hash_fraction(self._key(i)))
        return self._rows(sorted(by_hash[count:])), self._rows(sorted(by_hash[:count]))

    def _rows(self, rows: list[int]) -> IndexedSource:
        table = tf.constant(rows, tf.int64)
        return IndexedSource(
            len(rows),
            lambda index: self._lookup(table[index]),
            lambda index: self._describe(rows[index]),
            key=lambda index: self._key(rows[index]),
        )

    def train_stream(
        self,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> tf.data.Dataset:
        """See `Source.train_stream`; the global batch does not depend on `process_count`."""
        local_batch = batch_size // process_count

        def example(local: tf.Tensor) -> dict[str, tf.Tensor]:
            step, within = local // local_batch, local % local_batch
            position = step * batch_size + process_index * local_batch + within
            epoch = position // self.num_examples
            index = shuffled_index(
                position % self.num_examples, seed=seed, epoch=epoch, size=self.num_examples
            )
            image, label = self._lookup(index)
            return {"image": image, "label": label, "epoch": epoch, "index": index}

        positions = tf.data.Dataset.range(first_step * local_batch, last_step * local_batch)
        return positions.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def eval_stream(
        self, *, batch_size: int, process_index: int, process_count: int
    ) -> tf.data.Dataset:
        """See `Source.eval_stream`; padding repeats the last example."""
        share = -(-self.num_examples // batch_size) * (batch_size // process_count)

        def example(position: tf.Tensor) -> dict[str, tf.Tensor]:
            index = tf.minimum(position, self.num_examples - 1)
            image, label = self._lookup(index)
            mask = tf.cast(position < self.num_examples, tf.float32)
            return {"image": image, "label": label, "index": index, "mask": mask}

        positions = tf.data.Dataset.range(process_index * share, (process_index + 1) * share)
        return positions.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


class Shard(NamedTuple):
    """`take` records of a TFRecord file, after the first `skip`."""

    path: str
    skip: int
    take: int


class RecordSource:
    """Examples in TFRecord files, shuffled window by window.

    Each epoch permutes the pieces of files that a process reads. Successive pieces, as many as
    `shuffle_buffer` records surely hold, form a window, whose records are read, permuted and
    handed out while the next window is read. So a position in the stream needs the window that
    holds it and no earlier one. The memory is that of two windows of encoded examples, and of
    a third while one is permuted.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        *,
        name: str,
        shuffle_buffer: int,
    ):
        """Args: `parse` maps a serialized record to (encoded image, int32 label or labels)."""
        self.num_examples = sum(shard.take for shard in shards)
        self.shards = tuple(shards)
        self._parse = parse
        self._name = name
        self._shuffle_buffer = shuffle_buffer

    def describe(self, index: int) -> str:
        """Names the example by its record file and the position in it."""
        for shard in self.shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.path} ({self._name})"
            index -= shard.take
        raise IndexError(index)

    def find_damage(self) -> str | None:
        """The first file whose checksums do not fit, by reading all: TensorFlow names none."""

        def is_damaged(path: str) -> bool:
            try:
                for _ in tf.data.TFRecordDataset(path, buffer_size=_READ_AHEAD_BYTES).batch(64):
                    pass
            except tf.errors.DataLossError:
                return True
            return False

        paths = list(dict.fromkeys(shard.path for shard in self.shards))
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            damaged = pool.map(is_damaged, paths)
            return next((path for path, bad in zip(paths, damaged, strict=True) if bad), None)

    def hold_out(self, count: int) -> tuple[RecordSource, RecordSource]:
        """See `Source.hold_out`; the first records are held out."""
        rest, held_out = (
            RecordSource(
                [Shard(piece.path, piece.skip, piece.take) for piece in self._pieces(start, size)],
                self._parse,
                name=self._name,
                shuffle_buffer=self._shuffle_buffer,
            )
            for start, size in ((count, self.num_examples - count), (0, count))
        )
        return rest, held_out

    def train_stream(
        self,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> tf.data.Dataset:
        """See `Source.train_stream`; each process shuffles its own contiguous share.

        Where the examples do not divide evenly among the processes, the shares differ by one
        example, so that the epochs of the processes end at slightly different steps.
        """
        start = process_index * self.num_examples // process_count
        share = (process_index + 1) * self.num_examples // process_count - start
        if share < 1:
            raise InputError(
                f"{self._name} has {self.num_examples} examples, fewer than the {process_count} "
                "processes that share them: use fewer processes or a larger split."
            )
        pieces = self._pieces(start, share, at_most=self._shuffle_buffer)
        takes = np.array([piece.take for piece in pieces])
        per_window = max(1, self._shuffle_buffer // int(takes.max()))
        num_windows = -(-len(pieces) // per_window)
        local_batch = batch_size // process_count
        first, count = first_step * local_batch, (last_step - first_step) * local_batch

        def piece_order(epoch: tf.Tensor) -> tf.Tensor:
            return tf.random.experimental.index_shuffle(
                tf.range(len(pieces)), seed=epoch_key(seed, epoch), max_index=len(pieces) - 1
            )

        def locate(position: int) -> tuple[int, int]:
            """The window that holds a position, counted over all epochs, and the place in it."""
            epoch, place = divmod(position, share)
            ordered = takes[piece_order(tf.constant(epoch)).numpy()]
            starts = (np.cumsum(ordered) - ordered)[::per_window]
            window = int(np.searchsorted(starts, place, side="right")) - 1
            return epoch * num_windows + window, place - int(starts[window])

        columns = _columns(pieces)

        def shuffled_window(number: tf.Tensor) -> tf.data.Dataset:
            """One element: the epoch, the index and the record of each example, all [n]."""
            epoch, window = number // num_windows, number % num_windows
            chosen = piece_order(epoch)[window * per_window :][:per_window]
            parts = {name: tf.gather(column, chosen) for name, column in columns.items()}
            size = tf.reduce_sum(parts["take"])
            order = tf.random.experimental.index_shuffle(
                tf.range(size),
                # Negative, since the examples' own keys are those of 0, 1, ... (data/pipeline.py).
                seed=tf.random.experimental.stateless_fold_in(
                    epoch_key(seed, epoch), -1 - tf.cast(window, tf.int32)
                ),
                max_index=size - 1,
            )

            def permute(index: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, ...]:
                return tf.repeat(epoch, size), tf.gather(index, order), tf.gather(record, order)

            return _read(parts).batch(size).map(permute)

        def example(epoch: tf.Tensor, index: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
            image, label = self._parse(record)
            return {"image": image, "label": label, "epoch": epoch, "index": index}

        window, place = locate(first)
        last_window, _ = locate(first + count - 1)
        windows = tf.data.Dataset.range(window, last_window + 1).flat_map(shuffled_window)
        examples = windows.prefetch(1).unbatch().skip(place).take(count)
        return examples.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def eval_stream(
        self, *, batch_size: int, process_index: int, process_count: int
    ) -> tf.data.Dataset:
        """See `Source.eval_stream`; padding repeats the first example."""
        share = -(-self.num_examples // batch_size) * (batch_size // process_count)
        start = min(process_index * share, self.num_examples)
        real = min(share, self.num_examples - start)

        def with_mask(mask: float) -> Callable[..., dict[str, tf.Tensor]]:
            def example(index: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
                image, label = self._parse(record)
                return {"image": image, "label": label, "index": index, "mask": mask}

            return example

        first = _read(_columns(self._pieces(0, 1)))
        padding = first.map(with_mask(0.0)).repeat(share - real)
        if not real:
            return padding
        examples = _read(_columns(self._pieces(start, real))).map(
            with_mask(1.0), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return examples.concatenate(padding)

    def _pieces(self, start: int, count: int, *, at_most: int | None = None) -> list[_Piece]:
        """The examples [start, start + count): parts of shards of `at_most` records each."""
        pieces, first = [], 0
        for shard in self.shards:
            low, high = max(start, first), min(start + count, first + shard.take)
            step = at_most or shard.take
            for begin in range(low, high, step):
                skip = shard.skip + begin - first
                pieces.append(_Piece(shard.path, skip, min(step, high - begin), begin))
            first += shard.take
        return pieces


class _Piece(NamedTuple):
    """`take` records of a TFRecord file after the first `skip`; they begin at example `first`."""

    path: str
    skip: int
    take: int
    first: int


def _columns(pieces: Sequence[_Piece]) -> dict[str, tf.Tensor]:
    path, *numbers = zip(*pieces, strict=True)
    skip, take, first = (tf.constant(column, tf.int64) for column in numbers)
    return {"path": tf.constant(path), "skip": skip, "take": take, "first": first}


def _read(pieces: dict[str, tf.Tensor]) -> tf.data.Dataset:
    """(index, serialized record) of the pieces, interleaved in a fixed order."""

    def records(piece: dict[str, tf.Tensor]) -> tf.data.Dataset:
        dataset = tf.data.TFRecordDataset(piece["path"], buffer_size=_READ_AHEAD_BYTES)
        return dataset.skip(piece["skip"]).take(piece["take"]).enumerate(piece["first"])

    return tf.data.Dataset.from_tensor_slices(pieces).interleave(
        records,
        cycle_length=_FILES_AT_A_TIME,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
