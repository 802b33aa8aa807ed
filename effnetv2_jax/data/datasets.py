"""Data sets by name: `digits`, `synthetic`, `folder:/path` and everything TFDS can prepare."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.idx import has_idx_files, read_split
from effnetv2_jax.data.sources import IndexedSource, RecordSource, Shard, Source
from effnetv2_jax.errors import InputError, unknown_name

# (train split, evaluation split) of the TFDS data sets that need no prefix. ImageNet is whole:
# to reserve about 2 % of it as minival (EfficientNetV2 paper, section 5.1; the released code
# always trains without it, automl efficientnetv2/datasets.py) say train_split='train[:98%]'.
# The flowers' training split is the released code's.
_TFDS_SPLITS = {
    "imagenet2012": ("train", "validation"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "fashion_mnist": ("train", "test"),
    "oxford_flowers102": ("train+validation", "test"),
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_EVAL_FOLDERS = ("validation", "val", "test")
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
    """A data set with its two splits."""

    name: str
    num_classes: int
    class_names: tuple[str, ...] | None
    train: Source
    eval: Source


def list_datasets() -> tuple[str, ...]:
    """The names that `load_dataset` takes, besides `folder:/path` and `tfds:NAME`."""
    return tuple(sorted(["digits", "synthetic", *_TFDS_SPLITS]))


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    eval_fraction: float = 0.1,
    shuffle_buffer: int = 16384,
) -> Dataset:
    """Opens a data set.

    Args:
      name: a name of `list_datasets`, `synthetic:classes=10,train=256,eval=64,size=64` (any
        of the four), `folder:/path` (`/path/train/CLASS/*.jpg` beside `/path/val/CLASS/*.jpg`,
        or `/path/CLASS/*.jpg`), or `tfds:NAME` for any TFDS data set of images with labels.
      data_dir: where TFDS keeps its data; None for TFDS's own default. TFDS, and
        `fashion_mnist`, which is read from IDX files where there are some (or from the folder
        of Debian's package dataset-fashion-mnist) and through TFDS otherwise.
      train_split: the training split, for instance `train[:98%]`. TFDS only.
      eval_split: the evaluation split. TFDS only.
      eval_fraction: the share that is held out of a folder that has no evaluation images.
      shuffle_buffer: how many encoded TFDS examples are shuffled at a time; 16,384 is the
        released code's number (automl efficientnetv2/datasets.py) and takes about 1.8 GB
        on ImageNet.

    Returns:
      The data set; its numbers of classes and of examples come from the data.

    Raises:
      InputError: the name is unknown, an argument does not apply, or the data is missing or
        malformed.
    """
    if not 0 < eval_fraction < 1:
        raise InputError(f"eval_fraction {eval_fraction} must be between 0 and 1.")
    if shuffle_buffer < 1:
        raise InputError(f"shuffle_buffer {shuffle_buffer} must be 1 example or more.")
    kind, _, detail = name.partition(":")
    if name == "fashion_mnist" and train_split is None and eval_split is None:
        folder = Path(data_dir or _FASHION_MNIST)
        if has_idx_files(folder):
            return _fashion_mnist(folder)
    if name in _TFDS_SPLITS or (kind == "tfds" and detail):
        tfds_name = detail if kind == "tfds" else name
        return _tfds(name, tfds_name, data_dir, train_split, eval_split, shuffle_buffer)
    for key, value in (
        ("data_dir", data_dir),
        ("train_split", train_split),
        ("eval_split", eval_split),
    ):
        if value is not None and (kind in ("synthetic", "folder") or name == "digits"):
            raise InputError(
                f"{key} {value!r} is for TFDS data sets and {name!r} is none: unset it."
            )
    if name == "digits":
        return _digits()
    if kind == "synthetic":
        return _synthetic(name, detail)
    if kind == "folder" and detail:
        return _folder(name, Path(detail).expanduser(), eval_fraction)
    raise unknown_name("data set", name, [*list_datasets(), "folder:/path", "tfds:NAME"])


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
            held_out = [_hash_fraction(path, root) < eval_fraction for path in paths]
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
        train=_files(train),
        eval=_files(evaluation),
    )


def _files(classes: dict[str, list[Path]]) -> Source:
    files = [
        (str(path), label)
        for label, class_name in enumerate(sorted(classes))
        for path in classes[class_name]
    ]
    paths = tf.constant([path for path, _ in files])
    labels = tf.constant([label for _, label in files], tf.int32)
    return IndexedSource(
        len(files),
        lambda index: (tf.io.read_file(paths[index]), labels[index]),
        lambda index: repr(files[index][0]),
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


def _hash_fraction(path: Path, root: Path) -> float:
    """A number in [0, 1) that depends on the file's place below `root` and nothing else."""
    place = path.relative_to(root).as_posix().encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") / 2**64


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
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
        and features["image"].np_dtype == np.uint8
    ):
        raise InputError(
            f"the TFDS data set {tfds_name!r} has the features {', '.join(sorted(features))}: "
            "only those with a uint8 'image' and a class 'label' can be classified."
        )
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(
            f"the TFDS data set {tfds_name!r} is stored as {info.file_format.value}: prepare it "
            "with file_format='tfrecord'."
        )
    default_train, default_eval = _TFDS_SPLITS.get(tfds_name, ("train", None))
    default_eval = default_eval or next((s for s in _EVAL_FOLDERS if s in info.splits), None)
    if eval_split is None and default_eval is None:
        raise InputError(
            f"the TFDS data set {tfds_name!r} has the splits {', '.join(info.splits)}: choose an "
            "eval_split, for instance train_split='train[:90%]' with eval_split='train[90%:]'."
        )
    wanted = tfds.decode.PartialDecoding({"image": True, "label": True})
    parts = wanted.extract_features(info.features)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        decoders = {"image": tfds.decode.SkipDecoding()}
        example = parts.deserialize_example(record, decoders=decoders)
        return example["image"], tf.cast(example["label"], tf.int32)

    def source(split: str) -> Source:
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
        label = f"split {split} of {tfds_name}"
        return RecordSource(shards, parse, name=label, shuffle_buffer=shuffle_buffer)

    class_names = features["label"].names
    return Dataset(
        name=name,
        num_classes=features["label"].num_classes,
        class_names=tuple(class_names) if class_names else None,
        train=source(train_split or default_train),
        eval=source(eval_split or str(default_eval)),
    )


def _prepared_builder(tfds_name: str, data_dir: str | None) -> Any:
    """The TFDS builder, with its files on disk."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(tfds_name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_name("TFDS data set", tfds_name, tfds.list_builders()) from error
    except ValueError as error:  # a version or a config that the data set does not have
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"TFDS cannot open {tfds_name!r}: {reason}") from error
    if builder.is_prepared():
        return builder
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
