"""From a source to uint8 batches: decode, crop, flip, RandAugment, batch.

Every random choice is keyed by (seed, epoch, example index), so that an example looks the same
whichever process reads it and wherever iteration began.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.preprocess import (
    CROP_AREA,
    CROP_ASPECT_RATIO,
    EVAL_CROPS,
    decode,
    eval_crop,
    random_crop,
    random_flip,
)
from effnetv2_jax.data.randaugment import rand_augment
from effnetv2_jax.data.sources import Source, epoch_key
from effnetv2_jax.errors import InputError, unknown_name

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    last_step: int,
    image_size: int,
    randaug_magnitude: float | None,
    num_classes: int,
    crop_area: tuple[float, float] = CROP_AREA,
    crop_aspect_ratio: tuple[float, float] = CROP_ASPECT_RATIO,
    flip: bool = True,
    randaug_layers: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's training batches of the steps [first_step, last_step).

    Args:
      source: the training split.
      seed: fixes the order of the examples and every augmentation.
      batch_size: examples per step over all processes.
      first_step: the step to begin with; the batches are those of a run that began at zero.
      last_step: the step after the last one.
      image_size: the side of the images in pixels.
      randaug_magnitude: RandAugment's magnitude on the scale 0 .. 10; None switches it off.
      num_classes: labels must be below it.
      crop_area: the lowest and highest share of the image that a random crop covers.
      crop_aspect_ratio: the lowest and highest width / height of a random crop.
      flip: whether to mirror half of the images.
      randaug_layers: how many RandAugment operations an image goes through; 0 for none.
      process_index: which process this is.
      process_count: how many processes share a step.

    Returns:
      last_step - first_step dicts of read-only arrays: `image` uint8
      [batch_size / process_count, image_size, image_size, 3] and `label` int32 [the same].

    Raises:
      InputError: an argument is out of range; while iterating: an image cannot be decoded,
        or a label is out of range.
    """
    local_batch = _local_batch(batch_size, process_index, process_count, image_size)
    if not 0 <= first_step <= last_step:
        raise InputError(
            f"first_step {first_step} and last_step {last_step} must be 0 <= first <= last."
        )
    check_augmentation(
        crop_area=crop_area,
        crop_aspect_ratio=crop_aspect_ratio,
        flip=flip,
        randaug_layers=randaug_layers,
    )

    def prepare(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        key = tf.random.experimental.stateless_fold_in(
            epoch_key(seed, example["epoch"]), tf.cast(example["index"], tf.int32)
        )
        crop_key, flip_key, randaug_key = tf.unstack(tf.random.experimental.stateless_split(key, 3))
        image = random_crop(
            example["image"],
            crop_key,
            image_size=image_size,
            area=crop_area,
            aspect_ratio=crop_aspect_ratio,
        )
        if flip:
            image = random_flip(image, flip_key)
        if randaug_layers > 0 and randaug_magnitude is not None:
            image = rand_augment(
                image, randaug_key, magnitude=randaug_magnitude, num_layers=randaug_layers
            )
        image = tf.ensure_shape(image, [image_size, image_size, 3])
        return {"image": image, "label": example["label"], "index": example["index"]}

    def stream(first: int, last: int) -> tf.data.Dataset:
        return source.train_stream(
            seed=seed,
            first_step=first,
            last_step=last,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
        )

    batches = _batched(stream(first_step, last_step), prepare, local_batch)

    def examples_of(position: int) -> tf.data.Dataset:
        return stream(first_step + position, first_step + position + 1)

    return _iterate(batches, source, num_classes, examples_of)


def check_augmentation(
    *,
    crop_area: tuple[float, float],
    crop_aspect_ratio: tuple[float, float],
    flip: bool,
    randaug_layers: int,
) -> None:
    """Raises `InputError` unless `train_batches` can use these arguments of the same names."""
    _check_range("crop_area", crop_area, highest=1.0)
    _check_range("crop_aspect_ratio", crop_aspect_ratio, highest=float("inf"))
    if not isinstance(flip, bool):
        raise InputError(f"flip {flip!r} must be True or False.")
    if randaug_layers < 0:
        raise InputError(f"randaug_layers {randaug_layers} must be 0 (off) or more.")


def check_eval_crop(crop: str) -> None:
    """Raises `InputError` unless `crop` is a rule of `preprocess.eval_crop`."""
    if crop not in EVAL_CROPS:
        raise unknown_name("evaluation crop", crop, EVAL_CROPS)


class EvalBatches:
    """One pass over a split, as often as wanted: the graph is built once."""

    def __init__(self, num_batches: int, new_pass: Callable[[], Iterator[Batch]]):
        self._num_batches = num_batches
        self._new_pass = new_pass

    def __iter__(self) -> Iterator[Batch]:
        return self._new_pass()

    def __len__(self) -> int:
        return self._num_batches


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    num_classes: int,
    crop: str = "released",
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """This process's evaluation batches: over all processes every example exactly once.

    Args:
      source: the split to evaluate.
      batch_size: examples per batch over all processes.
      image_size: the side of the images in pixels.
      num_classes: labels must be below it.
      crop: the rule of `preprocess.eval_crop`: released, center or squash.
      process_index: which process this is.
      process_count: how many processes share a batch.

    Returns:
      An object that can be iterated again and again and has a length,
      ceil(num_examples / batch_size) on every process. It yields dicts of read-only arrays:
      `image` uint8 [batch_size / process_count, image_size, image_size, 3], `label` int32 and
      `mask` float32 (1 for an example, 0 for padding), both [batch_size / process_count].

    Raises:
      InputError: an argument is out of range; while iterating: an image cannot be decoded,
        or a label is out of range.
    """
    local_batch = _local_batch(batch_size, process_index, process_count, image_size)
    check_eval_crop(crop)
    stream = source.eval_stream(
        batch_size=batch_size, process_index=process_index, process_count=process_count
    )

    def prepare(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image = eval_crop(example["image"], image_size=image_size, rule=crop)
        return {**example, "image": image}

    batches = _batched(stream, prepare, local_batch)

    def examples_of(position: int) -> tf.data.Dataset:
        return stream.skip(position * local_batch).take(local_batch)

    return EvalBatches(
        -(-source.num_examples // batch_size),
        lambda: _iterate(batches, source, num_classes, examples_of),
    )


def _batched(
    stream: tf.data.Dataset, prepare: Callable[..., Any], local_batch: int
) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # The parallelism is over images; threads inside one operation would only compete with it.
    options.threading.max_intra_op_parallelism = 1
    images = stream.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    batches = images.batch(local_batch, drop_remainder=True)
    return batches.prefetch(2).with_options(options)


def _iterate(
    batches: tf.data.Dataset,
    source: Source,
    num_classes: int,
    examples_of: Callable[[int], tf.data.Dataset],
) -> Iterator[Batch]:
    """Yields NumPy batches that share TensorFlow's memory, and names what is wrong with one.

    `examples_of(position)` is the undecoded content of the batch at `position`.
    """
    arrays = batches.as_numpy_iterator()
    for position in itertools.count():
        try:
            batch = next(arrays, None)
        except tf.errors.InvalidArgumentError as error:
            broken = _first_undecodable(examples_of(position))
            if broken is None:
                raise
            raise InputError(
                f"{source.describe(broken)} cannot be decoded as an image: replace or remove it."
            ) from error
        if batch is None:
            return
        index, label = batch.pop("index"), batch["label"]
        wrong = np.flatnonzero((label < 0) | (label >= num_classes))
        if wrong.size:
            raise InputError(
                f"label {label[wrong[0]]} of {source.describe(int(index[wrong[0]]))} is outside "
                f"0 .. {num_classes - 1}: set num_classes to the data set's number of classes."
            )
        yield batch


def _first_undecodable(examples: tf.data.Dataset) -> int | None:
    """The index of the first example whose image does not decode; TensorFlow names no file."""
    for example in examples:
        try:
            decode(example["image"])
        except tf.errors.InvalidArgumentError:
            return int(example["index"])
    return None


def _local_batch(batch_size: int, process_index: int, process_count: int, image_size: int) -> int:
    """The examples per step of one process, once the four numbers are known to make sense."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, "
            f"{process_count}."
        )
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index {process_index} must be in 0 .. {process_count - 1}, one less than "
            "process_count."
        )
    if image_size < 1:
        raise InputError(f"image_size {image_size} must be a positive number of pixels.")
    return batch_size // process_count


def _check_range(name: str, values: tuple[float, float], *, highest: float) -> None:
    if len(values) != 2:
        raise InputError(f"{name} {tuple(values)} must be two numbers, (low, high).")
    low, high = values
    if not 0 < low <= high <= highest:
        raise InputError(
            f"{name} {tuple(values)} must be (low, high) with 0 < low <= high <= {highest:g}."
        )
