"""The official TFRecord files of ImageNet: `train-00000-of-01024`, `validation-00000-of-00128`.

The layout is that of automl efficientnetv2/datasets.py (ImageNetInput): a record is a
`tf.train.Example` with the features `image/encoded` and `image/class/label`.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.sources import Shard
from effnetv2_jax.errors import InputError

SPLITS = ("train", "validation")
COUNTS_FILE = "record_counts.json"

_FILE_NAME = re.compile(rf"({'|'.join(SPLITS)})-(\d{{5}})-of-(\d{{5}})")
# Stored labels begin with 1 (the same file, dataset_parser).
_LABEL_OFFSET = 1
# A record is its length (uint64) with a checksum (4 bytes), then the content with another
# checksum (https://www.tensorflow.org/tutorials/load_data/tfrecord).
_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4
# Enough to hide the latency of a network file system.
_THREADS = 32


def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The encoded image (string) and the label (int32 from 0) of a serialized record."""
    features = tf.io.parse_single_example(
        record,
        {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        },
    )
    return features["image/encoded"], tf.cast(features["image/class/label"], tf.int32) - (
        _LABEL_OFFSET
    )


def find_shards(directory: str) -> dict[str, list[Shard]]:
    """The shards of both splits with their numbers of records.

    The numbers are kept in `record_counts.json` beside the files where that can be written,
    because counting has to visit the header of every record.

    Args:
      directory: holds the files; a path or a URL that TensorFlow can read, as `gs://...`.

    Raises:
      InputError: the directory or a file is missing, or a file is damaged or has other content.
    """
    shards = {}
    paths = _paths(directory)
    counts = _record_counts(directory, [path for split in SPLITS for path in paths[split]])
    for split in SPLITS:
        shards[split] = [Shard(path, 0, counts[path]) for path in paths[split]]
        _check_first_record(paths[split][0])
    return shards


def _paths(directory: str) -> dict[str, list[str]]:
    try:
        names = set(tf.io.gfile.listdir(directory))
    except tf.errors.OpError as error:
        raise InputError(
            f"{directory!r} cannot be listed: give tfrecord:/path of a folder of TFRecord files."
        ) from error
    paths = {}
    matches = [match for name in sorted(names) if (match := _FILE_NAME.fullmatch(name))]
    for split in SPLITS:
        totals = {match[3] for match in matches if match[1] == split}
        if len(totals) != 1:
            raise InputError(
                f"{directory!r} must hold one set of files {split}-?????-of-????? and has "
                f"{len(totals)}: give the folder of ImageNet's official TFRecord files."
            )
        total = totals.pop()
        wanted = [f"{split}-{shard:05d}-of-{total}" for shard in range(int(total))]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(wanted)} {split} files in {directory!r} are missing, "
                f"the first is {missing[0]}: copy them there."
            )
        paths[split] = [os.path.join(directory, name) for name in wanted]
    return paths


def _record_counts(directory: str, paths: list[str]) -> dict[str, int]:
    """Records by path, from `record_counts.json` for the files whose size it knows."""
    counts_path = os.path.join(directory, COUNTS_FILE)
    known = _read_counts(counts_path)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(paths, pool.map(_size, paths), strict=True))
        counts: dict[str, int] = {}
        unknown = []
        for path in paths:
            match known.get(os.path.basename(path)):
                case {"bytes": size, "records": int(count)} if size == sizes[path]:
                    counts[path] = count
                case _:
                    unknown.append(path)
        if not unknown:
            return counts
        logging.info("Counting the records of %d files in %s.", len(unknown), directory)
        counted = pool.map(lambda path: _count_records(path, sizes[path]), unknown)
        counts.update(zip(unknown, counted, strict=True))
    content = {
        os.path.basename(path): {"bytes": sizes[path], "records": counts[path]} for path in paths
    }
    try:
        # Another process may write the same file now: the last one wins, with a whole file.
        partial = f"{counts_path}.{os.getpid()}"
        with tf.io.gfile.GFile(partial, "w") as file:
            file.write(json.dumps(content, indent=0))
        tf.io.gfile.rename(partial, counts_path, overwrite=True)
    except tf.errors.OpError:
        logging.info("%s cannot be written, so the next start counts again.", counts_path)
    return counts


def _read_counts(path: str) -> dict[str, Any]:
    try:
        with tf.io.gfile.GFile(path) as file:
            content = json.loads(file.read())
    except (tf.errors.OpError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _size(path: str) -> int:
    return tf.io.gfile.stat(path).length


def _count_records(path: str, size: int) -> int:
    """How many records a file of `size` bytes has, by their headers alone."""
    # TensorFlow's file reads ahead half a megabyte after each seek, a plain one does not.
    open_file: Callable[..., Any] = tf.io.gfile.GFile if "://" in path else open
    options: dict[str, Any] = {} if "://" in path else {"buffering": 0}
    position, count = 0, 0
    with open_file(path, "rb", **options) as file:
        while position < size:
            file.seek(position)
            header = file.read(_HEADER.size)
            if len(header) == _HEADER.size:
                position += _HEADER.size + _HEADER.unpack(header)[0] + _FOOTER_BYTES
            if len(header) < _HEADER.size or position > size:
                raise InputError(
                    f"{path!r} is cut short or damaged in record {count}: copy it again."
                )
            count += 1
    if not count:
        raise InputError(f"{path!r} holds no records: copy it again.")
    return count


def _check_first_record(path: str) -> None:
    try:
        for record in tf.data.TFRecordDataset(path).take(1):
            parse(record)
    # TensorFlow puts the record into its message, which then may be no text.
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError, UnicodeError) as error:
        raise InputError(
            f"the first record of {path!r} is not one of ImageNet's, which have image/encoded "
            "and image/class/label: give the folder of the official TFRecord files."
        ) from error
