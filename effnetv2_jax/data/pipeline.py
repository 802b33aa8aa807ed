"""From a source to uint8 batches: decode, crop, resize, flip, augmentation policy, cutout, batch.

Every random choice is keyed by (seed, epoch, example index), so that an example looks the same
whichever process reads it and wherever iteration began.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from effnetv2_jax.data.autoaugment import auto_augment
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.preprocess import (
    CROP_AREA,
    CROP_ASPECT_RATIO,
    EVAL_CROPS,
    RESIZES,
    TRAIN_CROPS,
    eval_crop,
    random_flip,
    train_crop,
)
from effnetv2_jax.data.preprocess import noise_cutout as cut_out_noise
from effnetv2_jax.data.randaugment import rand_augment
from effnetv2_jax.data.sources import RecordSource, Source, epoch_key
from effnetv2_jax.errors import InputError, unknown_name

Batch = dict[str, np.ndarray]
Example = dict[str, tf.Tensor]

# What an image that cannot be decoded does.
ON_CORRUPT = ("raise", "skip")

# The form of the operations, see `randaugment.TABLES`.
_RANDAUGMENT_FORMS = {"randaugment": "paper", "randaugment_released": "released"}
POLICIES = ("none", *_RANDAUGMENT_FORMS, "autoaugment")


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
    crop: str = "random",
    crop_area: tuple[float, float] = CROP_AREA,
    crop_aspect_ratio: tuple[float, float] = CROP_ASPECT_RATIO,
    resize: str = "bilinear",
    flip: bool = True,
    policy: str = "randaugment",
    randaug_layers: int = 2,
    noise_cutout: bool = False,
    on_corrupt: str = "raise",
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
      crop: the rule of `preprocess.train_crop`: random, legacy or squash.
      crop_area: the lowest and highest share of the image that a random crop covers.
      crop_aspect_ratio: the lowest and highest width / height of a random crop.
      resize: bilinear or bicubic, see `preprocess.eval_crop`.
      flip: whether to mirror half of the images.
      policy: `randaugment` as the paper describes it, `randaugment_released` as the official code
        has it (see `data.randaugment`), `autoaugment`, which needs no magnitude, or `none`.
      randaug_layers: how many RandAugment operations an image goes through; 0 for none.
      noise_cutout: whether to fill a square with noise, see `preprocess.noise_cutout`.
      on_corrupt: whether an image that cannot be decoded is an error (`raise`), or is logged
        and its place taken by the batch's next good example (`skip`).
      process_index: which process this is.
      process_count: how many processes share a step.

    Returns:
      last_step - first_step dicts of read-only arrays: `image` uint8
      [batch_size / process_count, image_size, image_size, 3] and `label` int32
      [batch_size / process_count], or [batch_size / process_count, max_labels] padded with -1.

    Raises:
      InputError: an argument is out of range; while iterating: an image cannot be decoded
        (with `skip`: none of a batch), a label is out of range, or a file is damaged.
    """
    local_batch = _local_batch(batch_size, process_index, process_count, image_size)
    if not 0 <= first_step <= last_step:
        raise InputError(
            f"first_step {first_step} and last_step {last_step} must be 0 <= first <= last."
        )
    check_on_corrupt(on_corrupt)
    check_augmentation(
        crop=crop,
        crop_area=crop_area,
        crop_aspect_ratio=crop_aspect_ratio,
        resize=resize,
        flip=flip,
        policy=policy,
        randaug_layers=randaug_layers,
        noise_cutout=noise_cutout,
    )

    def prepare(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        key = tf.random.experimental.stateless_fold_in(
            epoch_key(seed, example["epoch"]), tf.cast(example["index"], tf.int32)
        )
        crop_key, flip_key, policy_key = tf.unstack(tf.random.experimental.stateless_split(key, 3))
        image = train_crop(
            example["image"],
            crop_key,
            image_size=image_size,
            rule=crop,
            area=crop_area,
            aspect_ratio=crop_aspect_ratio,
            resize=resize,
        )
        if flip:
            image = random_flip(image, flip_key)
        if policy == "autoaugment":
            image = auto_augment(image, policy_key)
        elif policy != "none" and randaug_layers > 0 and randaug_magnitude is not None:
            image = rand_augment(
                image,
                policy_key,
                magnitude=randaug_magnitude,
                num_layers=randaug_layers,
                form=_RANDAUGMENT_FORMS[policy],
            )
        if noise_cutout:
            # A fourth part of the split would change the other three.
            cutout_key = tf.random.experimental.stateless_fold_in(key, 3)
            image = cut_out_noise(image, cutout_key)
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

    pipeline = _Pipeline(
        source=source,
        stream_from=lambda position: stream(first_step + position, last_step),
        prepare=prepare,
        local_batch=local_batch,
        image_size=image_size,
        num_classes=num_classes,
        on_corrupt=on_corrupt,
    )
    batches = pipeline.batches_from(0)
    return (batch for batch, _ in pipeline.iterate(batches))


def check_augmentation(
    *,
    crop: str,
    crop_area: tuple[float, float],
    crop_aspect_ratio: tuple[float, float],
    resize: str,
    flip: bool,
    policy: str,
    randaug_layers: int,
    noise_cutout: bool,
) -> None:
    """Raises `InputError` unless `train_batches` can use these arguments of the same names."""
    _check_name("training crop", crop, TRAIN_CROPS)
    _check_range("crop_area", crop_area, highest=1.0)
    _check_range("crop_aspect_ratio", crop_aspect_ratio, highest=float("inf"))
    _check_name("resize method", resize, RESIZES)
    _check_name("augmentation policy", policy, POLICIES)
    for name, value in (("flip", flip), ("noise_cutout", noise_cutout)):
        if not isinstance(value, bool):
            raise InputError(f"{name} {value!r} must be True or False.")
    if randaug_layers < 0:
        raise InputError(f"randaug_layers {randaug_layers} must be 0 (off) or more.")


def check_evaluation(*, crop: str, crop_fraction: float | None, resize: str) -> None:
    """Raises `InputError` unless `preprocess.eval_crop` takes these arguments."""
    _check_name("evaluation crop", crop, EVAL_CROPS)
    if crop_fraction is not None and (crop != "center" or not 0 < crop_fraction <= 1):
        raise InputError(
            f"crop_fraction {crop_fraction} must be above 0 and at most 1, and only crop 'center' "
            f"has one, not {crop!r}."
        )
    _check_name("resize method", resize, RESIZES)


def check_on_corrupt(on_corrupt: str) -> None:
    """Raises `InputError` unless `train_batches` and `eval_batches` know this value."""
    _check_name("value of on_corrupt", on_corrupt, ON_CORRUPT)


class EvalBatches:
    """One pass over a split, as often as wanted: the graph is built once.

    Attributes:
      skipped: how many examples of this process the latest pass has skipped as corrupt.
    """

    def __init__(self, num_batches: int, new_pass: Callable[[], Iterator[tuple[Batch, int]]]):
        self.skipped = 0
        self._num_batches = num_batches
        self._new_pass = new_pass

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        for batch, skipped in self._new_pass():
            self.skipped += skipped
            yield batch

    def __len__(self) -> int:
        return self._num_batches


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    num_classes: int,
    crop: str = "released",
    crop_fraction: float | None = None,
    resize: str = "bilinear",
    on_corrupt: str = "raise",
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """This process's evaluation batches: over all processes every example exactly once.

    Args:
      source: the split to evaluate.
      batch_size: examples per batch over all processes.
      image_size: the side of the images in pixels.
      num_classes: labels must be below it.
      crop: the rule of `preprocess.eval_crop`: released, center, squash or legacy.
      crop_fraction: see there.
      resize: of `preprocess.RESIZES`, see there.
      on_corrupt: whether an image that cannot be decoded is an error (`raise`), or is logged,
        masked and counted in `EvalBatches.skipped` (`skip`).
      process_index: which process this is.
      process_count: how many processes share a batch.

    Returns:
      An object that can be iterated again and again and has a length,
      ceil(num_examples / batch_size) on every process. It yields dicts of read-only arrays:
      `image` uint8 [batch_size / process_count, image_size, image_size, 3], `label` int32 as
      in `train_batches` and `mask` float32 [batch_size / process_count], which is 1 for an
      example and 0 for padding and corrupt images.

    Raises:
      InputError: an argument is out of range; while iterating: an image cannot be decoded
        (with `skip`: none of a full batch), a label is out of range, or a file is damaged.
    """
    local_batch = _local_batch(batch_size, process_index, process_count, image_size)
    check_evaluation(crop=crop, crop_fraction=crop_fraction, resize=resize)
    check_on_corrupt(on_corrupt)
    stream = source.eval_stream(
        batch_size=batch_size, process_index=process_index, process_count=process_count
    )

    def prepare(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image = eval_crop(
            example["image"],
            image_size=image_size,
            rule=crop,
            fraction=crop_fraction,
            resize=resize,
        )
        return {**example, "image": image}

    pipeline = _Pipeline(
        source=source,
        stream_from=lambda position: stream.skip(position * local_batch),
        prepare=prepare,
        local_batch=local_batch,
        image_size=image_size,
        num_classes=num_classes,
        on_corrupt=on_corrupt,
    )
    batches = pipeline.batches_from(0)
    return EvalBatches(-(-source.num_examples // batch_size), lambda: pipeline.iterate(batches))


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """From undecoded examples to checked batches, and what is done about a broken one.

    Attributes:
      source: names examples and files.
      stream_from: the examples from the batch at a position on.
      prepare: turns an example into a row of the batch.
      local_batch: rows of a batch.
      image_size: side of the images in pixels.
      num_classes: labels must be below it.
      on_corrupt: of `ON_CORRUPT`.
    """

    source: Source
    stream_from: Callable[[int], tf.data.Dataset]
    prepare: Callable[[Example], Example]
    local_batch: int
    image_size: int
    num_classes: int
    on_corrupt: str

    def batches_from(self, position: int) -> tf.data.Dataset:
        """The batches from the one at `position` on."""
        options = tf.data.Options()
        options.deterministic = True
        # The parallelism is over images; threads inside one operation would only compete with it.
        options.threading.max_intra_op_parallelism = 1
        # The tuner's thread sleeps up to a minute, and the end of a stage waits until it wakes up.
        options.autotune.enabled = False
        images = self.stream_from(position).map(
            self.prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        batches = images.batch(self.local_batch, drop_remainder=True)
        return batches.prefetch(2).with_options(options)

    def iterate(self, batches: tf.data.Dataset) -> Iterator[tuple[Batch, int]]:
        """Yields NumPy batches that share TensorFlow's memory, each with its skipped examples.

        `batches` is `batches_from(0)`, which an evaluation makes once for many passes.
        """
        arrays = batches.as_numpy_iterator()
        total = 0
        for position in itertools.count():
            skipped: list[str] = []
            try:
                batch = next(arrays, None)
            except tf.errors.InvalidArgumentError as error:
                batch, skipped = self._repair(position, error)
                arrays = self.batches_from(position + 1).as_numpy_iterator()
            except tf.errors.DataLossError as error:
                assert isinstance(self.source, RecordSource)  # No other one reads record files.
                raise InputError(
                    f"{self.source.find_damage()!r} is damaged ({_reason(error)}): fetch or "
                    "prepare it again."
                ) from error
            except tf.errors.NotFoundError as error:
                raise InputError(
                    f"a file of the data set is missing ({_reason(error)}): restore it."
                ) from error
            if batch is None:
                return
            for name in skipped:
                total += 1
                logging.warning("Skipped %s: not a whole image (%d so far).", name, total)
            self._check_labels(batch["label"], batch.pop("index"))
            yield batch, len(skipped)

    @functools.cached_property
    def _prepare_one(self) -> Callable[[Example], Example]:
        return tf.function(self.prepare, reduce_retracing=True)

    def _repair(self, position: int, error: Exception) -> tuple[Batch, list[str]]:
        """The batch at `position` without its corrupt images, and their names.

        TensorFlow tells neither file nor row, so each row is prepared by itself.
        """

        def attempt(example: Example) -> Example | None:
            try:
                return self._prepare_one(example)
            except tf.errors.InvalidArgumentError:
                return None

        examples = list(self.stream_from(position).take(self.local_batch))
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(attempt, examples))
        broken = [row for row, prepared in enumerate(rows) if prepared is None]
        if not broken:
            raise error
        names = {row: self.source.describe(int(examples[row]["index"])) for row in broken}
        if self.on_corrupt == "raise":
            raise InputError(
                f"{names[broken[0]]} cannot be decoded as an image: replace or remove it, or set "
                "on_corrupt='skip'."
            ) from error
        # Padding repeats an example that is counted elsewhere.
        skipped = [row for row in broken if examples[row].get("mask", 1.0) > 0]
        if len(skipped) == len(rows):
            raise InputError(
                f"none of the {len(rows)} images of a batch can be decoded, among them "
                f"{names[broken[0]]}: check the format of the data set's images."
            ) from error
        whole = [
            prepared or self._stand_in(row, examples[row], rows)
            for row, prepared in enumerate(rows)
        ]
        batch = {key: np.stack([prepared[key] for prepared in whole]) for key in whole[0]}
        return batch, [names[row] for row in skipped]

    def _stand_in(self, row: int, example: Example, rows: list[Example | None]) -> Example:
        """What a batch holds in the place of a corrupt example."""
        if "mask" in example:
            black = tf.zeros([self.image_size, self.image_size, 3], tf.uint8)
            return {**example, "image": black, "mask": tf.zeros([])}
        # The next good one, so that a resumed run takes the same.
        following = rows[row + 1 :] + rows[:row]
        return next(prepared for prepared in following if prepared is not None)

    def _check_labels(self, label: np.ndarray, index: np.ndarray) -> None:
        """Raises `InputError` for a label that is no class, and for an example without any."""
        labels = label.reshape(len(label), -1)
        valid = (labels >= 0) & (labels < self.num_classes)
        # Only the rows of a multi-label data set have padding.
        padding = (labels == -1) & (label.ndim > 1)
        wrong = np.argwhere(~(valid | padding))
        if wrong.size:
            row, column = wrong[0]
            raise InputError(
                f"label {labels[row, column]} of {self.source.describe(int(index[row]))} is "
                f"outside 0 .. {self.num_classes - 1}: set num_classes to the data set's number "
                "of classes."
            )
        without = np.flatnonzero(padding.all(axis=1))
        if without.size:
            raise InputError(
                f"{self.source.describe(int(index[without[0]]))} has no label: each example of a "
                "multi-label data set needs one."
            )


def _reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of its operations."""
    return re.sub(r"\{\{.*?\}\} | \[Op:.*", "", error.message)


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


def _check_name(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown_name(kind, value, known)


def _check_range(name: str, values: tuple[float, float], *, highest: float) -> None:
    if len(values) != 2:
        raise InputError(f"{name} {tuple(values)} must be two numbers, (low, high).")
    low, high = values
    if not 0 < low <= high <= highest:
        raise InputError(
            f"{name} {tuple(values)} must be (low, high) with 0 < low <= high <= {highest:g}."
        )
