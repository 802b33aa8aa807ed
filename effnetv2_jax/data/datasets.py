"""Data sets by name: built-in ones, folders, TFRecord files and everything TFDS can prepare."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from effnetv2_jax.data import cars, tfrecords
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.idx import has_idx_files, read_split
from effnetv2_jax.data.sources import IndexedSource, RecordSource, Shard, Source, hash_fraction
from effnetv2_jax.errors import InputError, unknown_name

# (train split, evaluation split) of the TFDS data sets that need no prefix. The flowers'
# training split is the released code's (automl efficientnetv2/datasets.py).
TFDS_SPLITS = {
    "cars196": ("train", "test"),
    "imagenet2012": ("train", "validation"),
    "imagenet21k": ("train", "validation"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "fashion_mnist": ("train", "test"),
    "oxford_flowers102": ("train+validation", "test"),
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_EVAL_FOLDERS = ("validation", "val", "test")
# As `eval_split`: tuning that must not see the evaluation split.
MINIVAL = "minival"
# Where Debian's package dataset-fashion-mnist puts its files.
_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
# Xiao et al. 2017, "Fashion-MNIST: a novel image dataset for benchmarking", table 2.
_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# Every fifth digit is held out.
_DIGITS_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set with its splits, which share no example.

    Attributes:
      name: as it was given.
      num_classes: labels are below it.
      class_names: in the order of the labels, where they are known.
      train: the training split, without `minival`.
      eval: the evaluation split.
      multi_label: whether an example's label is int32 [max_labels], padded with -1.
      minival: what was held out of the training split, if anything.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...] | None
    train: Source
    eval: Source
    multi_label: bool = False
    minival: Source | None = None


def list_datasets() -> tuple[str, ...]:
    """The names that `load_dataset` takes, besides those with a path and `tfds:NAME`."""
    return tuple(sorted(["digits", "synthetic", *TFDS_SPLITS]))


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    eval_fraction: float = 0.1,
    minival_examples: int = 0,
    train_examples: int | None = None,
    shuffle_buffer: int = 16384,
    num_classes: int | None = None,
) -> Dataset:
    """Opens a data set.

    Args:
      name: a name of `list_datasets` (`imagenet21k` takes a release, `imagenet21k/fall11`),
        `synthetic:classes=10,train=256,eval=64,size=64` (any
        of the four), `folder:/path` (`/path/train/CLASS/*.jpg` beside `/path/val/CLASS/*.jpg`,
        or `/path/CLASS/*.jpg`), `tfrecord:/path` or `tfrecord:/path,classes=1000` (ImageNet's
        official files, see `data.tfrecords`), `cars:/path` (see `data.cars`), or `tfds:NAME`
        for any TFDS data set of images with labels.
      data_dir: where TFDS keeps its data; None for TFDS's own default. TFDS, and
        `fashion_mnist`, which is read from IDX files where there are some (or from the folder
        of Debian's package dataset-fashion-mnist) and through TFDS otherwise.
      train_split: the training split, for instance `train[:98%]`. TFDS only.
      eval_split: the evaluation split. TFDS only, but for `minival`: the held-out examples take
        the place of the evaluation split, which stays unseen while one tunes.
      eval_fraction: the share that is held out of a folder that has no evaluation images.
      minival_examples: how many training examples are held out as `minival`, the same in
        every run: of record files the first ones (25,021 of ImageNet's official files are the
        released code's minival, its training shards 0 to 19, automl efficientnetv2/datasets.py;
        the paper's section 5.1 reserves 25,000), of other data sets a pseudo-random choice by
        a hash of the file's place in the folder or of the example's index.
      train_examples: train on so few of the remaining ones, chosen in the same way; None: all.
      shuffle_buffer: how many encoded examples of record files are shuffled at a time; 16,384
        is the released code's number (automl efficientnetv2/datasets.py). Two to three times
        as many are in memory, of ImageNet 3.6 to 5.4 GB; the allocator of the C library may
        keep twice that, unless the environment variable MALLOC_ARENA_MAX is 2.
      num_classes: outputs of a network for this data, if there should be more of them than the
        data has classes, as the 21,843 of the released ImageNet-21k head.

    Returns:
      The data set; its numbers of classes and of examples come from the data.

    Raises:
      InputError: the name is unknown, an argument does not apply, the splits overlap, or the
        data is missing or malformed.
    """
    if not 0 < eval_fraction < 1:
        raise InputError(f"eval_fraction {eval_fraction} must be between 0 and 1.")
    if shuffle_buffer < 1:
        raise InputError(f"shuffle_buffer {shuffle_buffer} must be 1 example or more.")
    use_minival = eval_split == MINIVAL
    if use_minival and not minival_examples:
        raise InputError(f"eval_split {MINIVAL!r} needs some: set minival_examples above 0.")
    dataset = _open(
        name,
        data_dir,
        train_split,
        None if use_minival else eval_split,
        eval_fraction,
        shuffle_buffer,
    )
    if num_classes is not None:
        if num_classes < dataset.num_classes:
            raise InputError(
                f"num_classes {num_classes} is below the {dataset.num_classes} classes of "
                f"{name!r}: raise it, or unset it."
            )
        dataset = dataclasses.replace(dataset, num_classes=num_classes)
    if not 0 <= minival_examples < dataset.train.num_examples:
        raise InputError(
            f"minival_examples {minival_examples} must be 0 or more, and fewer than the "
            f"{dataset.train.num_examples} training examples of {name!r}."
        )
    train, minival = dataset.train, None
    if minival_examples:
        train, minival = train.hold_out(minival_examples)
    if train_examples is not None:
        if not 0 < train_examples <= train.num_examples:
            raise InputError(
                f"train_examples {train_examples} must be above 0, and at most the "
                f"{train.num_examples} of {name!r} that are not held out; unset it for all."
            )
        if train_examples < train.num_examples:
            _, train = train.hold_out(train_examples)
    if minival is not None and use_minival:
        return dataclasses.replace(dataset, train=train, eval=minival)
    return dataclasses.replace(dataset, train=train, minival=minival)


def _open(
    name: str,
    data_dir: str | None,
    train_split: str | None,
    eval_split: str | None,
    eval_fraction: float,
    shuffle_buffer: int,
) -> Dataset:
    """`load_dataset` without the minival."""
    kind, _, detail = name.partition(":")
    if name == "fashion_mnist" and train_split is None and eval_split is None:
        folder = Path(data_dir or _FASHION_MNIST)
        if has_idx_files(folder):
            return _fashion_mnist(folder)
    if name.partition("/")[0] in TFDS_SPLITS or (kind == "tfds" and detail):
        tfds_name = detail if kind == "tfds" else name
        return _tfds(name, tfds_name, data_dir, train_split, eval_split, shuffle_buffer)
    for key, value in (
        ("data_dir", data_dir),
        ("train_split", train_split),
        ("eval_split", eval_split),
    ):
        if value is not None and (
            kind in ("synthetic", "folder", "tfrecord", "cars") or name == "digits"
        ):
            raise InputError(
                f"{key} {value!r} is for TFDS data sets and {name!r} is none: unset it."
            )
    if name == "digits":
        return _digits()
    if kind == "synthetic":
        return _synthetic(name, detail)
    if kind == "folder" and detail:
        return _folder(name, Path(detail).expanduser(), eval_fraction)
    if kind == "tfrecord" and detail:
        return _tfrecord(name, detail, shuffle_buffer)
    if kind == "cars" and detail:
        return _cars(name, Path(detail).expanduser())
    prefixes = ("folder:/path", "tfrecord:/path", "cars:/path", "tfds:NAME")
    raise unknown_name("data set", name, [*list_datasets(), *prefixes])


def _digits() -> Dataset:
    """scikit-learn's 1,797 grey digits of 8x8 pixels, of which 359 are held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the data set 'digits' needs scikit-learn: run `pip install effnetv2_jax[digits]`."
        ) from error
    digits = load_digits()
    # The grey levels 0 .. 16 become 0 .. 255 in three equal channels.
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int32)
    held_out = np.arange(len(labels)) % _DIGITS_FOLDS == _DIGITS_FOLDS - 1

    def source(rows: np.ndarray) -> Source:
        split_images, split_labels = tf.constant(images[rows]), tf.constant(labels[rows])
        return IndexedSource(
            len(rows),
            lambda index: (split_images[index], split_labels[index]),
            lambda index: f"digit {rows[index]}",
        )

    return Dataset(
        name="digits",
        num_classes=10,
        class_names=tuple("0123456789"),
        train=source(np.flatnonzero(~held_out)),
        eval=source(np.flatnonzero(held_out)),
    )


def _fashion_mnist(folder: Path) -> Dataset:
    """70,000 grey pictures of clothes, 28x28 pixels, from IDX files."""

    def source(split: str) -> Source:
        images, labels = read_split(folder, split)
        images, labels = tf.constant(images[..., None]), tf.constant(labels)
        return IndexedSource(
            len(labels),
            lambda index: (tf.repeat(images[index], 3, axis=-1), labels[index]),
            lambda index: f"{split} image {index} of {folder}",
        )

    return Dataset(
        name="fashion_mnist",
        num_classes=len(_FASHION_MNIST_CLASSES),
        class_names=_FASHION_MNIST_CLASSES,
        train=source("train"),
        eval=source("test"),
    )


def _synthetic(name: str, options: str) -> Dataset:
    """Noise tinted with a hue that tells the class, made from the index: nothing is stored."""
    numbers = {"classes": 10, "train": 256, "eval": 64, "size": 64}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in numbers:
            raise unknown_name("synthetic option", key, numbers)
        if not value.isdecimal() or int(value) < 1:
            raise InputError(f"synthetic option {option!r} must be {key}=N with N at least 1.")
        numbers[key] = int(value)
    classes, size = numbers["classes"], numbers["size"]

    def source(first: int, count: int) -> Source:
        def lookup(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            label = tf.cast(index % classes, tf.int32)
            turn = 2 * math.pi * tf.cast(label, tf.float32) / classes
            hue = 0.5 + 0.5 * tf.cos(turn + 2 * math.pi * tf.constant([0.0, 1 / 3, 2 / 3]))
            key = tf.stack([first + index, 0])
            noise = tf.random.stateless_uniform([size, size, 3], seed=key)
            return tf.cast(255 * (0.7 * hue + 0.3 * noise), tf.uint8), label

        return IndexedSource(count, lookup, lambda index: f"synthetic image {first + index}")

    return Dataset(
        name=name,
        num_classes=classes,
        class_names=None,
        train=source(0, numbers["train"]),
        eval=source(numbers["train"], numbers["eval"]),
    )


def _folder(name: str, root: Path, eval_fraction: float) -> Dataset:
    if not root.is_dir():
        raise InputError(f"{str(root)!r} is not a folder: give folder:/path of an existing one.")
    # A class may be called `train`: only a folder of class folders is a split.
    if (root / "train").is_dir() and any(entry.is_dir() for entry in _visible(root / "train")):
        folders = [root / split for split in _EVAL_FOLDERS if (root / split).is_dir()]
        if not folders:
            raise InputError(
                f"{str(root)!r} has a folder 'train' and none of {', '.join(_EVAL_FOLDERS)}: "
                f"add one, or give folder:{root / 'train'} to hold out a part of it."
            )
        train, evaluation = _class_folders(root / "train"), _class_folders(folders[0])
        if train.keys() != evaluation.keys():
            raise InputError(
                f"the classes of {str(root / 'train')!r} and {str(folders[0])!r} must be the "
                f"same, and {', '.join(sorted(train.keys() ^ evaluation.keys()))} are in one only."
            )
    else:
        train, evaluation = {}, {}
        for class_name, paths in _class_folders(root).items():
            held_out = [hash_fraction(_place(path, root)) < eval_fraction for path in paths]
            train[class_name] = [p for p, out in zip(paths, held_out, strict=True) if not out]
            evaluation[class_name] = [p for p, out in zip(paths, held_out, strict=True) if out]
        for split, files in (("training", train), ("evaluation", evaluation)):
            if not any(files.values()):
                raise InputError(
                    f"eval_fraction {eval_fraction} leaves no {split} images of those in "
                    f"{str(root)!r}: change it, or make folders 'train' and 'val' yourself."
                )
    return Dataset(
        name=name,
        num_classes=len(train),
        class_names=tuple(sorted(train)),
        train=_files(_labelled(train), root),
        eval=_files(_labelled(evaluation), root),
    )


def _labelled(classes: dict[str, list[Path]]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, class_name in enumerate(sorted(classes))
        for path in classes[class_name]
    ]


def _files(files: Sequence[tuple[Path, int]], root: Path) -> Source:
    """Image files with their labels; their places below `root` decide what is held out."""
    paths = tf.constant([str(path) for path, _ in files])
    labels = tf.constant([label for _, label in files], tf.int32)
    return IndexedSource(
        len(files),
        lambda index: (tf.io.read_file(paths[index]), labels[index]),
        lambda index: repr(str(files[index][0])),
        key=lambda index: _place(files[index][0], root),
    )


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of every class folder, sorted; anything else in a class folder is an error."""
    classes = {entry.name: _visible(entry) for entry in _visible(folder) if entry.is_dir()}
    if not classes:
        raise InputError(f"{str(folder)!r} has no class folders: make one per class.")
    for class_name, paths in classes.items():
        if not paths:
            raise InputError(
                f"the class folder {str(folder / class_name)!r} is empty: add images or remove it."
            )
        for path in paths:
            if path.suffix.lower() not in _IMAGE_SUFFIXES:
                raise InputError(
                    f"{str(path)!r} is not an image: a class folder holds files ending in "
                    f"{', '.join(_IMAGE_SUFFIXES)} only; move it away."
                )
    return classes


def _visible(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith("."))


def _place(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _tfrecord(name: str, detail: str, shuffle_buffer: int) -> Dataset:
    directory, _, option = os.path.expanduser(detail).partition(",")
    # ImageNet's number where none is given.
    key, _, value = (option or "classes=1000").partition("=")
    if key != "classes" or not value.isdecimal() or int(value) < 1:
        raise InputError(
            f"{option!r} in {name!r} is no option: write tfrecord:/path,classes=N with N at "
            "least 1."
        )
    train, evaluation = (
        RecordSource(
            shards,
            tfrecords.parse,
            name=f"split {split} of {directory}",
            shuffle_buffer=shuffle_buffer,
        )
        for split, shards in tfrecords.find_shards(directory).items()
    )
    return Dataset(
        name=name, num_classes=int(value), class_names=None, train=train, eval=evaluation
    )


def _cars(name: str, root: Path) -> Dataset:
    if not root.is_dir():
        raise InputError(f"{str(root)!r} is not a folder: give cars:/path of an existing one.")
    splits, class_names = cars.read_cars(root)
    return Dataset(
        name=name,
        num_classes=cars.NUM_CLASSES,
        class_names=class_names,
        train=_files(splits["train"], root),
        eval=_files(splits["test"], root),
    )


def _tfds(
    name: str,
    tfds_name: str,
    data_dir: str | None,
    train_split: str | None,
    eval_split: str | None,
    shuffle_buffer: int,
) -> Dataset:
    import tensorflow_datasets as tfds  # takes a second, and only these data sets need it

    builder = _prepared_builder(tfds_name, data_dir)
    info = builder.info
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    label_name = "label" if "label" in features else "labels"
    label = features.get(label_name)
    multi_label = isinstance(label, tfds.features.Sequence)
    classes = label.feature if isinstance(label, tfds.features.Sequence) else label
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(classes, tfds.features.ClassLabel)
        and features["image"].np_dtype == np.uint8
    ):
        raise InputError(
            f"the TFDS data set {tfds_name!r} has the features {', '.join(sorted(features))}: "
            "only those with a uint8 'image' and a class 'label', or a sequence 'labels' of "
            "classes, can be classified."
        )
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(
            f"the TFDS data set {tfds_name!r} is stored as {info.file_format.value}: prepare it "
            "with file_format='tfrecord'."
        )
    default_train, default_eval = TFDS_SPLITS.get(tfds_name.partition("/")[0], ("train", None))
    default_eval = default_eval or next((s for s in _EVAL_FOLDERS if s in info.splits), None)
    if eval_split is None and default_eval is None:
        raise InputError(
            f"the TFDS data set {tfds_name!r} has the splits {', '.join(info.splits)}: choose an "
            "eval_split, for instance train_split='train[:90%]' with eval_split='train[90%:]'."
        )
    train_split, eval_split = train_split or default_train, eval_split or str(default_eval)
    train_shards, eval_shards = (
        _tfds_shards(tfds_name, info, split) for split in (train_split, eval_split)
    )
    if _overlap(train_shards, eval_shards):
        raise InputError(
            f"train_split {train_split!r} and eval_split {eval_split!r} of {tfds_name!r} overlap: "
            "evaluate on examples that are not trained on."
        )

    def reader(*names: str) -> Callable[[tf.Tensor], Any]:
        parts = tfds.decode.PartialDecoding(dict.fromkeys(names, True))
        wanted = parts.extract_features(info.features)
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in names else None
        return lambda record: wanted.deserialize_example(record, decoders=decoders)

    read = reader("image", label_name)
    if multi_label:
        read_labels = reader(label_name)
        max_labels = _max_labels(
            info.metadata or {},
            [*train_shards, *eval_shards],
            lambda record: read_labels(record)[label_name],
        )

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        example = read(record)
        label = tf.cast(example[label_name], tf.int32)
        if multi_label:
            label = tf.pad(label, [[0, max_labels - tf.size(label)]], constant_values=-1)
            label = tf.ensure_shape(label, [max_labels])
        return example["image"], label

    def source(split: str, shards: Sequence[Shard]) -> Source:
        label = f"split {split} of {tfds_name}"
        return RecordSource(shards, parse, name=label, shuffle_buffer=shuffle_buffer)

    return Dataset(
        name=name,
        num_classes=classes.num_classes,
        class_names=tuple(classes.names) if classes.names else None,
        train=source(train_split, train_shards),
        eval=source(eval_split, eval_shards),
        multi_label=multi_label,
    )


def _tfds_shards(tfds_name: str, info: Any, split: str) -> list[Shard]:
    """The record files of a split or of a part of it."""
    try:
        files = info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise InputError(
            f"the TFDS data set {tfds_name!r} has no split {split!r}: choose from "
            f"{', '.join(info.splits)} or a part as 'train[:98%]'."
        ) from error
    shards = [Shard(os.fspath(f.filename), f.skip, f.take) for f in files]
    if not sum(shard.take for shard in shards):
        raise InputError(f"the split {split!r} of the TFDS data set {tfds_name!r} is empty.")
    return shards


def _overlap(first: Sequence[Shard], second: Sequence[Shard]) -> bool:
    """Whether any record belongs to both."""
    by_path = defaultdict(list)
    for shard in first:
        by_path[shard.path].append(shard)
    return any(
        a.skip < b.skip + b.take and b.skip < a.skip + a.take
        for b in second
        for a in by_path[b.path]
    )


def _max_labels(
    metadata: Any, shards: Sequence[Shard], labels_of: Callable[[tf.Tensor], tf.Tensor]
) -> int:
    """The most labels of an example: of `max_labels` in the metadata, else counted."""
    if "max_labels" in metadata:
        return int(metadata["max_labels"])
    logging.info("Reading %d record files for the most labels of an example.", len(shards))
    records = tf.data.TFRecordDataset(
        list(dict.fromkeys(shard.path for shard in shards)), num_parallel_reads=tf.data.AUTOTUNE
    )
    sizes = records.map(
        lambda record: tf.size(labels_of(record)), num_parallel_calls=tf.data.AUTOTUNE
    )
    # One at least, so that an example without labels can be named where it is met.
    return int(sizes.reduce(np.int32(1), tf.maximum))


def _prepared_builder(tfds_name: str, data_dir: str | None) -> Any:
    """The TFDS builder, with its files on disk."""
    import tensorflow_datasets as tfds

    base, _, config = tfds_name.partition("/")
    if base == "imagenet21k":
        # Apache Beam prepares it, on its own; opening it needs none.
        from effnetv2_jax.data.builders.imagenet21k import open_imagenet21k

        return open_imagenet21k(data_dir, config or "winter21").builder
    try:
        builder = tfds.builder(tfds_name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_name("TFDS data set", tfds_name, tfds.list_builders()) from error
    except ValueError as error:  # a version or a config that the data set does not have
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"TFDS cannot open {tfds_name!r}: {reason}") from error
    if builder.is_prepared():
        return builder
    if builder.name == "cars196":
        raise InputError(
            f"cars196 is not prepared in {str(builder.data_path)!r} and its download address is "
            "gone: set data_dir to where it is, or give cars:/path of its extracted archive."
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # every kind: each data set downloads and fails in its own way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the TFDS data set {tfds_name!r} is not prepared in {str(builder.data_path)!r} and "
            f"could not be ({reason}): set data_dir to where it is, or run "
            f"`tfds build {tfds_name}` on a machine that has its files."
        ) from error
    return builder
