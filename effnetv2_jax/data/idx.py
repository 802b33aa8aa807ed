"""Images and labels in IDX files, the format of MNIST and Fashion-MNIST.

A file starts with two zero bytes, the type of its numbers (8: uint8), the number of dimensions
and each dimension as a big-endian int32; the numbers follow in C order. It may be gzipped.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from effnetv2_jax.errors import InputError

_UINT8 = 8


def has_idx_files(folder: Path) -> bool:
    """Whether a folder holds the four files of MNIST's layout, gzipped or not."""
    return all(_find(folder, name) for part in _NAMES.values() for name in part)


# Split -> (images, labels).
_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split in MNIST's layout.

    Args:
      folder: holds the four files.
      split: `train` or `test`.

    Returns:
      Grey images uint8 [N, height, width] and labels int32 [N].

    Raises:
      InputError: a file is missing or damaged, or there are more images than labels.
    """
    images_name, labels_name = _NAMES[split]
    images = _read(folder, images_name, num_dimensions=3)
    labels = _read(folder, labels_name, num_dimensions=1)
    if len(images) != len(labels):
        raise InputError(
            f"{str(folder)!r} has {len(images)} images and {len(labels)} labels for {split}: "
            "both files must be of the same data set."
        )
    return images, labels.astype(np.int32)


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _read(folder: Path, name: str, num_dimensions: int) -> np.ndarray:
    path = _find(folder, name)
    if path is None:
        raise InputError(f"{str(folder)!r} has no file {name}.gz: give a folder with all four.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(path)!r} cannot be unpacked ({error}): fetch it again.") from error
    header = 4 + 4 * num_dimensions
    if content[:4] != bytes([0, 0, _UINT8, num_dimensions]) or len(content) < header:
        raise InputError(
            f"{str(path)!r} is not an IDX file of {num_dimensions} dimension(s) of bytes: "
            "fetch it again."
        )
    shape = np.frombuffer(content, ">i4", num_dimensions, offset=4)
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise InputError(
            f"{str(path)!r} promises {' x '.join(map(str, shape))} bytes and holds "
            f"{len(content) - header}: fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
