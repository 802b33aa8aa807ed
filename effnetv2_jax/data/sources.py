"""Where examples come from: the position in a stream decides the example, and nothing else does.

A source yields un-batched, undecoded examples as a `tf.data.Dataset` of dicts with
  `image`  a scalar string (an encoded image) or uint8 [height, width, 3],
  `label`  int32,
  `index`  int64, the example's position in the split,
and `epoch` (int64, training) or `mask` (float32, evaluation: 1 real, 0 padding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


def epoch_key(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """The random key of one epoch, int32 [2]; `seed` may have up to 64 bits."""
    key = tf.bitcast(tf.constant([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], tf.uint32), tf.int32)
    return tf.random.experimental.stateless_fold_in(key, tf.cast(epoch, tf.int32))


def shuffled_index(offset: tf.Tensor, *, seed: int, epoch: tf.Tensor, size: int) -> tf.Tensor:
    """The example at `offset` (int64) of an epoch's permutation of range(size), in O(1)."""
    return tf.random.experimental.index_shuffle(
        offset, seed=epoch_key(seed, epoch), max_index=tf.constant(size - 1, tf.int64)
    )


class IndexedSource:
    """Examples that can be looked up by their index: embedded arrays, image folders."""

    def __init__(
        self,
        num_examples: int,
        lookup: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        describe: Callable[[int], str],
    ):
        """Args: `lookup` maps an int64 index to (image, int32 label) inside a graph."""
        self.num_examples = num_examples
        self._lookup = lookup
        self._describe = describe

    def describe(self, index: int) -> str:
        """Names the example at `index`."""
        return self._describe(index)

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
    """Examples in TFRecord files: read in sequence, shuffled by file and then in a buffer."""

    def __init__(
        self,
        shards: Sequence[Shard],
        parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
        *,
        name: str,
        shuffle_buffer: int,
    ):
        """Args: `parse` maps a serialized record to (encoded image, int32 label)."""
        self.num_examples = sum(shard.take for shard in shards)
        self._shards = shards
        self._parse = parse
        self._name = name
        self._shuffle_buffer = shuffle_buffer

    def describe(self, index: int) -> str:
        """Names the example by its record file and the position in it."""
        for shard in self._shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.path} ({self._name})"
            index -= shard.take
        raise IndexError(index)

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

        Starting inside an epoch re-reads that epoch's records up to there, undecoded.
        """
        start = process_index * self.num_examples // process_count
        share = (process_index + 1) * self.num_examples // process_count - start
        if share < 1:
            raise InputError(
                f"{self._name} has {self.num_examples} examples, fewer than the {process_count} "
                "processes that share them: use fewer processes or a larger split."
            )
        pieces = self._pieces(start, share)
        local_batch = batch_size // process_count
        first, count = first_step * local_batch, (last_step - first_step) * local_batch

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            key = epoch_key(seed, epoch)
            files = tf.random.experimental.index_shuffle(
                tf.range(len(pieces["take"])), seed=key, max_index=len(pieces["take"]) - 1
            )
            records = _read({name: tf.gather(column, files) for name, column in pieces.items()})
            records = records.shuffle(
                min(self._shuffle_buffer, share),
                seed=tf.bitcast(key, tf.int64),
                reshuffle_each_iteration=False,
            )
            done = tf.where(epoch == first // share, tf.constant(first % share, tf.int64), 0)
            return records.skip(done).map(lambda index, record: (epoch, index, record))

        def example(epoch: tf.Tensor, index: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
            image, label = self._parse(record)
            return {"image": image, "label": label, "epoch": epoch, "index": index}

        epochs = tf.data.Dataset.range(first // share, (first + count) // share + 1)
        examples = epochs.flat_map(one_epoch).take(count)
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

        padding = _read(self._pieces(0, 1)).map(with_mask(0.0)).repeat(share - real)
        if not real:
            return padding
        examples = _read(self._pieces(start, real)).map(
            with_mask(1.0), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return examples.concatenate(padding)

    def _pieces(self, start: int, count: int) -> dict[str, Any]:
        """The part of each shard that holds the examples [start, start + count)."""
        rows, first = [], 0
        for shard in self._shards:
            low, high = max(start, first), min(start + count, first + shard.take)
            if low < high:
                rows.append((shard.path, shard.skip + low - first, high - low, low))
            first += shard.take
        columns = zip(*rows, strict=True)
        return dict(zip(("path", "skip", "take", "index"), map(list, columns), strict=True))


def _read(pieces: dict[str, Any]) -> tf.data.Dataset:
    """(index, serialized record) of the pieces, interleaved in a fixed order."""

    def records(piece: dict[str, tf.Tensor]) -> tf.data.Dataset:
        dataset = tf.data.TFRecordDataset(piece["path"], buffer_size=_READ_AHEAD_BYTES)
        dataset = dataset.skip(tf.cast(piece["skip"], tf.int64))
        dataset = dataset.take(tf.cast(piece["take"], tf.int64))
        return dataset.enumerate(tf.cast(piece["index"], tf.int64))

    return tf.data.Dataset.from_tensor_slices(pieces).interleave(
        records,
        cycle_length=_FILES_AT_A_TIME,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
