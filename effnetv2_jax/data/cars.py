"""Stanford Cars from the folder that its archive extracts to.

Its download address is gone, so that TFDS can no longer prepare `cars196`. Two layouts are in
circulation: all images in one folder with one list, or the images and lists of each split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from effnetv2_jax.errors import InputError

NUM_CLASSES = 196
# EfficientNetV2 paper, Table 9.
_NUM_EXAMPLES = {"train": 8144, "test": 8041}

_LAYOUTS = (
    "either car_ims/ and cars_annos.mat, or cars_train/, cars_test/, devkit/cars_train_annos.mat "
    "and devkit/cars_test_annos_withlabels.mat"
)


class Cars(NamedTuple):
    """Both splits as (image file, label from 0), and the class names where the folder has them."""

    splits: dict[str, list[tuple[Path, int]]]
    class_names: tuple[str, ...] | None


def read_cars(root: Path) -> Cars:
    """Reads the lists of images and labels in either layout.

    Args:
      root: the folder with `car_ims` and `cars_annos.mat`, or with `cars_train`, `cars_test`,
        `devkit` and in it, or beside it, `cars_test_annos_withlabels.mat`.

    Returns:
      The splits `train` and `test`, sorted by file.

    Raises:
      InputError: a list or an image is missing, a list is damaged, or a label is out of range.
    """
    if (root / "cars_annos.mat").exists() or (root / "car_ims").exists():
        content = _load(root / "cars_annos.mat", root)
        rows = _rows(content, "relative_im_path", root / "cars_annos.mat")
        splits: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
        for row in rows:
            split = "test" if row["test"] else "train"
            splits[split].append((root / str(row["relative_im_path"]), int(row["class"]) - 1))
        names = content.get("class_names")
    else:
        devkit = root / "devkit"
        # The labels of the test split were published later, beside the devkit.
        test_list = root / "cars_test_annos_withlabels.mat"
        if not test_list.exists():
            test_list = devkit / test_list.name
        splits = {}
        for split, path in (("train", devkit / "cars_train_annos.mat"), ("test", test_list)):
            rows = _rows(_load(path, root), "fname", path)
            folder = root / f"cars_{split}"
            splits[split] = [(folder / str(row["fname"]), int(row["class"]) - 1) for row in rows]
        meta = devkit / "cars_meta.mat"
        names = _load(meta, root).get("class_names") if meta.exists() else None
    for split, examples in splits.items():
        examples.sort()
        _check(split, examples)
    return Cars(splits, None if names is None else tuple(map(str, np.atleast_1d(names))))


def _load(path: Path, root: Path) -> dict[str, Any]:
    from scipy.io import loadmat  # half a second, and only this data set needs it

    if not path.is_file():
        raise InputError(f"{str(path)!r} is missing: {str(root)!r} must have {_LAYOUTS}.")
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # loadmat has no exception of its own for a damaged file
        raise InputError(f"{str(path)!r} cannot be read ({error}): extract it again.") from error


def _rows(content: dict[str, Any], file_field: str, path: Path) -> np.ndarray:
    """The annotations as a structured array, one row per image."""
    annotations = np.atleast_1d(content.get("annotations", ()))
    missing = {file_field, "class"} - set(annotations.dtype.names or ())
    if missing:
        raise InputError(
            f"{str(path)!r} has no {' and no '.join(sorted(missing))} in its annotations: use the "
            "original list, for the test split the one with labels."
        )
    return annotations


def _check(split: str, examples: list[tuple[Path, int]]) -> None:
    for folder in {path.parent for path, _ in examples}:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is missing: the folder must have {_LAYOUTS}.")
        present = {path.name for path in folder.iterdir()}
        for path, _ in examples:
            if path.parent == folder and path.name not in present:
                raise InputError(
                    f"{str(path)!r} is in the list and missing: extract the archive again."
                )
    for path, label in examples:
        if not 0 <= label < NUM_CLASSES:
            raise InputError(
                f"the class {label + 1} of {str(path)!r} is outside 1 .. {NUM_CLASSES}: use the "
                "original list."
            )
    if len(examples) != _NUM_EXAMPLES[split]:
        logging.warning(
            "The %s split of Cars has %d images, and the published one %d.",
            split,
            len(examples),
            _NUM_EXAMPLES[split],
        )
