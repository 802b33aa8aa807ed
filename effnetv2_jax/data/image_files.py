"""Image files, not a data set: decoded in threads ahead of their use, broken ones reported."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.pipeline import check_evaluation
from effnetv2_jax.data.preprocess import eval_crop

# Batches that are being decoded while one is in use.
_AHEAD = 2


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatch:
    """A batch of prepared images.

    Attributes:
      paths: of the first rows; the rows after them are padding.
      images: uint8 [batch_size, image_size, image_size, 3]; padding and broken images are black.
      errors: what is wrong with each path, or None.
    """

    paths: tuple[str, ...]
    images: np.ndarray
    errors: tuple[str | None, ...]


def image_file_batches(
    paths: Sequence[str],
    *,
    batch_size: int,
    image_size: int,
    crop: str,
    crop_fraction: float | None,
    resize: str,
) -> Iterator[ImageBatch]:
    """Reads, decodes and crops files in the order of `paths`.

    As in training and evaluation, an orientation that a camera noted in the file is not applied.

    Args:
      paths: of the files; what kind they are is told by their content.
      batch_size: rows of every batch, the last one included.
      image_size: the side of the prepared images in pixels.
      crop: the rule of `preprocess.eval_crop`.
      crop_fraction: see there.
      resize: see there.

    Raises:
      InputError: an unknown crop, fraction or resize. A broken file is no exception: see
        `ImageBatch`.
    """
    check_evaluation(crop=crop, crop_fraction=crop_fraction, resize=resize)
    prepare = _preparation(image_size, crop, crop_fraction, resize)
    parts = [tuple(paths[i : i + batch_size]) for i in range(0, len(paths), batch_size)]

    def batches() -> Iterator[ImageBatch]:
        pool = ThreadPoolExecutor(os.cpu_count())
        begun: collections.deque[list[Future[np.ndarray | str]]] = collections.deque()
        try:
            for number, part in enumerate(parts):
                while len(begun) <= _AHEAD and number + len(begun) < len(parts):
                    following = parts[number + len(begun)]
                    begun.append([pool.submit(_load, path, prepare) for path in following])
                rows = [future.result() for future in begun.popleft()]
                images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
                for row, loaded in enumerate(rows):
                    if not isinstance(loaded, str):
                        images[row] = loaded
                errors = tuple(row if isinstance(row, str) else None for row in rows)
                yield ImageBatch(part, images, errors)
        finally:
            # Whoever stops early does not wait for images that nobody will see.
            pool.shutdown(cancel_futures=True)

    return batches()


def _load(path: str, prepare: Callable[[tf.Tensor], tf.Tensor]) -> np.ndarray | str:
    """The prepared image, or what is wrong with the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not content:
        return "is empty"
    try:
        return prepare(tf.constant(content)).numpy()
    except tf.errors.OpError:
        return "is no JPEG, PNG, BMP or GIF image, or is damaged"


@functools.lru_cache(maxsize=8)
def _preparation(
    image_size: int, crop: str, crop_fraction: float | None, resize: str
) -> Callable[[tf.Tensor], tf.Tensor]:
    """`eval_crop` of a file's bytes as a graph, which threads run without Python's lock."""

    def prepare(content: tf.Tensor) -> tf.Tensor:
        image = eval_crop(
            content, image_size=image_size, rule=crop, fraction=crop_fraction, resize=resize
        )
        return tf.ensure_shape(image, [image_size, image_size, 3])

    return tf.function(prepare).get_concrete_function(tf.TensorSpec([], tf.string))
