"""Classifies images: `python -m effnetv2_jax.tools.predict --model=DIR IMAGE...`.

DIR is a model folder. IMAGE is a file, a folder (its images at any depth) or a pattern in quotes,
as 'photos/**/*.jpg'. Exit status: 0 done, 1 some images are broken (they are listed), 2 bad input.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import logging as standard_logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags, logging

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError, unknown_name

if TYPE_CHECKING:
    from effnetv2_jax.prediction import Prediction, Predictor

FLAGS = flags.FLAGS

# Of the files that are found in folders and by patterns; a file that is named is always tried.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
COLUMNS = ("path", "rank", "class_index", "class_id", "name", "probability", "error")
# Rows that a Parquet file holds in one piece.
_ROW_GROUP = 50_000
# Seconds between log lines, and between updates of the line on a terminal.
_LOG_EVERY, _SHOW_EVERY = 10.0, 0.2

Write = Callable[["Prediction"], None]


def find_images(arguments: Sequence[str]) -> list[str]:
    """The image files that files, folders and patterns stand for, each once.

    Args:
      arguments: they keep their order; the files of one folder or pattern are sorted. Hidden
        files and folders in a folder are passed over.

    Raises:
      InputError: one of them stands for no image.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        if os.path.isdir(argument):
            images = _images_below(argument)
            rule = f"holds no image ({', '.join(IMAGE_SUFFIXES)})"
        elif os.path.exists(argument):
            images, rule = [argument], ""
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            images = [m for m in matches if _is_image_name(m) and os.path.isfile(m)]
            rule = "is no file or folder, and no pattern that matches an image"
        if not images:
            raise InputError(f"{argument!r} {rule}: name images, a folder or a quoted pattern.")
        found.update(dict.fromkeys(images))
    return list(found)


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def _images_below(folder: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise InputError(
            f"{error.filename!r} cannot be read ({error.strerror}): name a folder that can."
        ) from error

    images = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if _is_image_name(name) and not name.startswith(".")]
        images += [os.path.join(place, name) for name in names]
    return sorted(images)


def predict(
    arguments: Sequence[str],
    *,
    model: str,
    top_k: int = 5,
    batch_size: int = 32,
    output_format: str = "table",
    output: str | None = None,
    cam: str | None = None,
    features: str | None = None,
    endpoints: Sequence[str] | None = None,
    label_space: str | None = None,
    force: bool = False,
) -> int:
    """Predicts images and writes what is asked for; nothing is written on bad input.

    Args:
      arguments: files, folders and patterns.
      model: a model folder.
      top_k: how many classes are named for each image, at most.
      batch_size: images that are computed at once.
      output_format: one of `FORMATS`.
      output: file of the predictions; None: standard output.
      cam: folder for a picture of each image with its class activation map.
      features: file (.npz) for `paths` and the endpoints of the images that are not broken.
      endpoints: which ones, `pooled` by default.
      label_space: file that names the classes, see `LabelSpace.save`.
      force: whether files that are there are replaced.

    Returns:
      The number of broken images.

    Raises:
      InputError: bad input.
    """
    if output_format not in FORMATS:
        raise unknown_name("format", output_format, FORMATS)
    if output_format == "parquet":
        _check_parquet(output)
    if endpoints is not None and features is None:
        raise InputError("endpoints are given and features is not: add --features=FILE.npz.")
    output, cam, features, label_space = (
        path and os.path.expanduser(path) for path in (output, cam, features, label_space)
    )
    paths = find_images(arguments)
    cams = {} if cam is None else cam_files(Path(cam), paths)
    targets = [Path(target) for target in (output, features, *cams.values()) if target is not None]
    sources = {os.path.realpath(path) for path in paths}
    for target in targets:
        if os.path.realpath(target) in sources:
            raise InputError(f"{str(target)!r} is one of the images: write elsewhere.")
        _check_target(target, force=force)

    from effnetv2_jax.data.label_space import LabelSpace
    from effnetv2_jax.prediction import Predictor

    space = None if label_space is None else LabelSpace.load(label_space)
    predictor = Predictor(model, batch_size=batch_size, label_space=space)
    wanted = () if features is None else tuple(endpoints or ("pooled",))
    # It checks its arguments now, and reads the images below.
    predictions = predictor.predict(paths, top_k=top_k, endpoints=wanted, cam=cam is not None)
    for folder in sorted({target.parent for target in targets}):
        _make_folder(folder)

    kept: list[Prediction] = []
    broken: list[Prediction] = []
    is_shown = output is None and sys.stdout.isatty()
    progress = _Progress(len(paths), on_one_line=len(paths) > batch_size and not is_shown)
    with FORMATS[output_format](output) as write:
        for prediction in predictions:
            write(prediction)
            if prediction.error is not None:
                broken.append(prediction)
            elif cam is not None:
                _write_cam(cams[prediction.path], prediction)
            if features is not None:
                kept.append(prediction)
            progress.count()
    progress.finish()
    if features is not None:
        _write_features(Path(features), predictor, wanted, kept)
    for prediction in broken:
        print(f"broken: {printable(prediction.path)} {prediction.error}", file=sys.stderr)
    return len(broken)


def printable(path: str) -> str:
    r"""A path as text: bytes of a file's name that are not UTF-8 become `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def cam_files(folder: Path, paths: Sequence[str]) -> dict[str, Path]:
    """Path of an image -> file of its picture: its name and `.png`, with a number if taken."""
    files: dict[str, Path] = {}
    taken: set[str] = set()
    for path in paths:
        stem, number = Path(path).stem, 1
        name = stem
        # Some file systems take `A.png` and `a.png` for one file.
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        files[path] = folder / f"{name}.png"
    return files


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder: name a file.")
    if path.exists() and not force:
        raise InputError(f"{str(path)!r} exists: name another, or give --force.")
    # The nearest folder that is there must be one.
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written: {str(above)!r} takes no files.")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be made ({error.strerror}): name another.") from (
            error
        )


def _check_parquet(output: str | None) -> None:
    if output is None:
        raise InputError("format parquet is no text for the screen: give --output=FILE.")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(
            "format parquet needs PyArrow: run `pip install effnetv2_jax[parquet]`."
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _text(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with (
        _replacing(Path(output)) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        yield file


@contextlib.contextmanager
def _table(output: str | None) -> Iterator[Write]:
    with _text(output) as file:

        def write(prediction: Prediction) -> None:
            lines = [printable(prediction.path)]
            if prediction.error is not None:
                lines.append(f"      {prediction.error}")
            for rank, scored in enumerate(prediction.classes, 1):
                # The first of WordNet's words for it; the identifier tells two cranes apart.
                name = scored.name.partition(", ")[0]
                ids = f"{scored.class_id}  " if scored.class_id != scored.name else ""
                lines.append(f"  {rank:>2}  {100 * scored.probability:6.2f} %  {ids}{name}")
            file.write("\n".join(lines) + "\n")

        yield write


@contextlib.contextmanager
def _json(output: str | None) -> Iterator[Write]:
    with _text(output) as file:
        separator = "[\n"

        def write(prediction: Prediction) -> None:
            nonlocal separator
            fields = {
                "path": printable(prediction.path),
                "error": prediction.error,
                "classes": [
                    {
                        "class_index": scored.index,
                        "class_id": scored.class_id,
                        "name": scored.name,
                        "probability": scored.probability,
                    }
                    for scored in prediction.classes
                ],
            }
            file.write(separator + json.dumps(fields, ensure_ascii=False))
            separator = ",\n"

        yield write
        file.write("\n]\n")


def rows(prediction: Prediction) -> list[tuple[Any, ...]]:
    """The rows of a prediction in the `COLUMNS`: one a class, or one with the error."""
    path = printable(prediction.path)
    if prediction.error is not None:
        return [(path, None, None, None, None, None, prediction.error)]
    return [
        (path, rank, scored.index, scored.class_id, scored.name, scored.probability, None)
        for rank, scored in enumerate(prediction.classes, 1)
    ]


@contextlib.contextmanager
def _csv(output: str | None) -> Iterator[Write]:
    with _text(output) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        yield lambda prediction: writer.writerows(rows(prediction))


@contextlib.contextmanager
def _parquet(output: str | None) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.int32(), pa.int32(), pa.string(), pa.string(), pa.float64())
    schema = pa.schema(list(zip(COLUMNS, (*types, pa.string()), strict=True)))
    waiting: list[tuple[Any, ...]] = []

    with _replacing(Path(str(output))) as temporary, pq.ParquetWriter(temporary, schema) as writer:

        def write(prediction: Prediction) -> None:
            waiting.extend(rows(prediction))
            if len(waiting) >= _ROW_GROUP:
                flush()

        def flush() -> None:
            columns = [list(column) for column in zip(*waiting, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))
            waiting.clear()

        yield write
        if waiting:
            flush()


# Each opens a file (None: standard output) and gives the function that writes a prediction.
FORMATS = {"table": _table, "json": _json, "csv": _csv, "parquet": _parquet}


def _write_cam(path: Path, prediction: Prediction) -> None:
    from matplotlib.image import imsave

    from effnetv2_jax.prediction import overlay

    assert prediction.image is not None and prediction.cam is not None
    with _replacing(path) as temporary:
        imsave(temporary, overlay(prediction.image, prediction.cam), format="png")


def _write_features(
    path: Path, predictor: Predictor, endpoints: Sequence[str], predictions: Sequence[Prediction]
) -> None:
    import numpy as np

    from effnetv2_jax.prediction import stack_endpoints

    shapes = predictor.endpoint_shapes()
    arrays = stack_endpoints(predictions, {name: shapes[name] for name in endpoints})
    arrays["paths"] = np.array([printable(p) for p in arrays["paths"].tolist()], dtype=np.str_)
    with _replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


class _Progress:
    """Images and images/s on stderr: a line that changes on a terminal, else log lines."""

    def __init__(self, total: int, *, on_one_line: bool):
        self._total, self._done = total, 0
        self._start = self._shown = time.monotonic()
        self._on_one_line = on_one_line and sys.stderr.isatty()

    def _message(self) -> str:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        return f"{self._done}/{self._total} images, {rate:.1f} images/s"

    def count(self) -> None:
        self._done += 1
        elapsed = time.monotonic() - self._shown
        if elapsed < (_SHOW_EVERY if self._on_one_line else _LOG_EVERY):
            return
        self._shown += elapsed
        if self._on_one_line:
            print(f"\r{self._message()} ", end="", file=sys.stderr, flush=True)
        else:
            logging.info("%s", self._message())

    def finish(self) -> None:
        if self._on_one_line:
            print(f"\r{self._message()} ", file=sys.stderr)


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "A model folder.")
    flags.DEFINE_integer("top_k", 5, "Classes to name for each image.")
    flags.DEFINE_integer("batch_size", 32, "Images that are computed at once.")
    flags.DEFINE_string("format", "table", f"{', '.join(FORMATS)}.")
    flags.DEFINE_string("output", None, "File of the predictions; standard output by default.")
    flags.DEFINE_string("cam", None, "Folder for class activation maps (Grad-CAM) as PNG files.")
    flags.DEFINE_string("features", None, "File (.npz) for the images' features.")
    flags.DEFINE_list("endpoints", None, "Which features, as pooled,reduction_3; pooled if unset.")
    flags.DEFINE_string("label_space", None, "File (JSON) that names the classes.")
    flags.DEFINE_bool("force", False, "Whether files that are there are replaced.")


def main(arguments: list[str]) -> int:
    """The command line."""
    logging.set_verbosity(logging.INFO)
    # JAX would name every kind of accelerator that is not there.
    standard_logging.getLogger("jax").setLevel(standard_logging.WARNING)
    if FLAGS.model is None:
        raise InputError("model is missing: give --model=DIR, a model folder.")
    from effnetv2_jax.parallel import use_every_core

    use_every_core()
    try:
        num_broken = predict(
            arguments,
            model=FLAGS.model,
            top_k=FLAGS.top_k,
            batch_size=FLAGS.batch_size,
            output_format=FLAGS.format,
            output=FLAGS.output,
            cam=FLAGS.cam,
            features=FLAGS.features,
            endpoints=FLAGS.endpoints,
            label_space=FLAGS.label_space,
            force=FLAGS.force,
        )
    except BrokenPipeError:
        # `predict ... | head` has read enough; Python would complain on flushing at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 1 if num_broken else 0


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        num_arguments=(1, None),
        usage="python -m effnetv2_jax.tools.predict --model=DIR IMAGE...",
    )
