"""Prepares a data set: `python -m effnetv2_jax.tools.prepare_data DATASET --data_dir=DIR`.

DATASET is imagenet2012, imagenet21k/winter21 (imagenet21k for short), imagenet21k/fall11, either of
them with _ancestors, cifar10, cifar100, oxford_flowers102, cars196 or folder:/path. It first says
which files must stand where and checks their names, their sizes and the free disk space;
`--dry_run` stops there. Exit status: 0 done, 2 bad input.
"""

from __future__ import annotations

import logging as standard_logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError, unknown_name

FLAGS = flags.FLAGS

# Bytes of the files that image-net.org hands out for ILSVRC 2012.
_IMAGENET2012_FILES = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
_DOWNLOADED = ("cifar10", "cifar100", "oxford_flowers102")
_IMAGENET21K = {"winter21": "winter21_whole", "fall11": "fall11_whole"}
# TFDS's server for Cars answers 404, so its files must come from elsewhere.
_CARS_LAYOUTS = (
    ("car_ims", "cars_annos.mat"),
    (
        "cars_train",
        "cars_test",
        "devkit/cars_train_annos.mat",
        "cars_test_annos_withlabels.mat",
    ),
)
# TFDS shuffles through temporary files as large as the records it then writes.
_SHUFFLED_COPIES = 2
# The archive that was downloaded stays beside these.
_DOWNLOADED_COPIES = 3
# Shards of ImageNet-21k hold the archive's images once; what is noted of each takes 1 % of that.
_NOTED_COPIES = 1.02


def list_preparable() -> tuple[str, ...]:
    """The names that `prepare_data` takes, besides `folder:/path`."""
    releases = (f"imagenet21k/{r}{a}" for r in _IMAGENET21K for a in ("", "_ancestors"))
    return ("imagenet2012", "imagenet21k", *releases, *_DOWNLOADED, "cars196")


def prepare_data(
    dataset: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    dry_run: bool = False,
    verify: bool = False,
    num_workers: int = 1,
    on_corrupt: str = "skip",
    beam_options: Sequence[str] = (),
) -> str:
    """Checks and prepares a data set, telling its layout on the standard output.

    Args:
      dataset: one of `list_preparable`, or `folder:/path` of class folders.
      manual_dir: the folder of the files that you got yourself.
      data_dir: TFDS's folder of data sets; None for TFDS's own default.
      dry_run: check only.
      verify: decode every image of a folder.
      num_workers: processes on this machine, for imagenet21k. A script that asks for several
        must call this function under `if __name__ == "__main__"`.
      on_corrupt: `skip` or `raise`; what becomes of images of imagenet21k that do not decode.
      beam_options: of Apache Beam for imagenet21k, as `runner=DataflowRunner`, for a cluster. Its
        machines need this package, for instance by `setup_file=./setup.py`.

    Returns:
      One line that says what there is now.

    Raises:
      InputError: a name is unknown, a file is missing or of another size, the disk is too small,
        images are corrupt, or an argument does not apply to this data set.
    """
    kind, _, detail = dataset.partition(":")
    is_folder = kind == "folder" and bool(detail)
    if dataset not in list_preparable() and not is_folder:
        raise unknown_name("data set", dataset, [*list_preparable(), "folder:/path"])
    name, _, config = dataset.partition("/")
    if num_workers < 1:
        raise InputError(f"num_workers {num_workers} must be 1 process or more.")
    takes_manual_dir = ("imagenet2012", "imagenet21k", "cars196")
    for argument, given, applies in (
        ("verify", verify, is_folder),
        ("num_workers", num_workers != 1, name == "imagenet21k"),
        ("on_corrupt", on_corrupt != "skip", name == "imagenet21k"),
        ("beam_options", bool(beam_options), name == "imagenet21k"),
        ("manual_dir", manual_dir is not None, name in takes_manual_dir),
        ("data_dir", data_dir is not None, not is_folder and name != "cars196"),
    ):
        if given and not applies:
            raise InputError(f"{argument} does not apply to the data set {dataset!r}: unset it.")
    if is_folder:
        return _check_folder(dataset, verify=verify)
    if manual_dir is None and name in takes_manual_dir:
        raise InputError(
            f"manual_dir is missing: give the folder that holds the files of {dataset}, "
            f"{_layout(name, config)}."
        )
    manual_dir, data_dir = (d and os.path.expanduser(d) for d in (manual_dir, data_dir))
    print(f"{dataset} needs {_layout(name, config)}.")
    if name == "cars196":
        return _check_cars(str(manual_dir))
    if name == "imagenet21k":
        return _imagenet21k(
            config or "winter21",
            str(manual_dir),
            data_dir,
            dry_run=dry_run,
            num_workers=num_workers,
            on_corrupt=on_corrupt,
            beam_options=beam_options,
        )
    return _tfds(name, manual_dir, data_dir, dry_run=dry_run)


def _layout(name: str, config: str) -> str:
    """What must stand where, in words."""
    if name == "imagenet2012":
        files = (f"MANUAL_DIR/{f} ({size:,} bytes)" for f, size in _IMAGENET2012_FILES.items())
        return f"{' and '.join(files)} from https://image-net.org"
    if name == "imagenet21k":
        archive = _IMAGENET21K[config.partition("_")[0] or "winter21"]
        wordnet = " and MANUAL_DIR/wordnet.is_a.txt" * config.endswith("_ancestors")
        return (
            f"MANUAL_DIR/{archive}.tar, or a folder MANUAL_DIR/{archive} of files as "
            f"n01440764.tar,{wordnet} from https://image-net.org"
        )
    if name == "cars196":
        ways = (", ".join(f"MANUAL_DIR/{part}" for part in parts) for parts in _CARS_LAYOUTS)
        return " or ".join(ways)
    return "no files: TFDS downloads it"


def _imagenet21k(
    config: str,
    manual_dir: str,
    data_dir: str | None,
    *,
    dry_run: bool,
    num_workers: int,
    on_corrupt: str,
    beam_options: Sequence[str],
) -> str:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise InputError(
            "imagenet21k needs Apache Beam: run `pip install effnetv2_jax[imagenet21k]`."
        ) from error
    import tensorflow_datasets as tfds

    from effnetv2_jax.data.builders.archives import synset_tars
    from effnetv2_jax.data.builders.imagenet21k import (
        Imagenet21k,
        find_label_space,
        open_imagenet21k,
    )

    options = _beam_options(beam_options, num_workers)
    builder = Imagenet21k(config=config, data_dir=data_dir, on_corrupt=on_corrupt)
    if not builder.is_prepared():
        tars = synset_tars(manual_dir, builder.builder_config.archive)
        space = find_label_space(manual_dir, builder.builder_config, tars)
        num_bytes = sum(tar.size for tar in tars.values())
        print(f"The archive has {space.size:,} classes in {num_bytes:,} bytes.")
        _check_disk(str(builder.data_path), int(num_bytes * _NOTED_COPIES))
        if dry_run:
            return f"imagenet21k/{config} can be prepared in {builder.data_path}."
        download = tfds.download.DownloadConfig(manual_dir=manual_dir, beam_options=options)
        builder.download_and_prepare(download_config=download)
    prepared = open_imagenet21k(data_dir, config)
    sizes = {split: info.num_examples for split, info in prepared.builder.info.splits.items()}
    return (
        f"imagenet21k/{config} is prepared in {prepared.builder.data_path}: "
        f"{prepared.label_space.size:,} classes, {sizes['train']:,} training and "
        f"{sizes['validation']:,} validation images of up to {prepared.max_labels} labels."
    )


def _beam_options(given: Sequence[str], num_workers: int) -> Any:
    """Beam's options; Beam itself discards names that it does not know."""
    from apache_beam.options.pipeline_options import PipelineOptions

    known = PipelineOptions([]).get_all_options()
    arguments = [f"--{option}" for option in given]
    for option, argument in zip(given, arguments, strict=True):
        # An option may be kept under another name: then it is known by having an effect.
        if option.partition("=")[0] not in known and not PipelineOptions(
            [argument]
        ).get_all_options(drop_default=True):
            raise unknown_name("Beam option", option.partition("=")[0], known)
    if num_workers > 1:
        arguments += [
            "--direct_running_mode=multi_processing",
            f"--direct_num_workers={num_workers}",
            # Beam's own messages of every worker would bury the progress.
            '--sdk_harness_log_level_overrides={"apache_beam": "WARNING", "__main__": "WARNING"}',
        ]
    return PipelineOptions(arguments)


def _tfds(name: str, manual_dir: str | None, data_dir: str | None, *, dry_run: bool) -> str:
    """The data sets that TFDS itself prepares."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        if name == "imagenet2012":
            _check_files(Path(str(manual_dir)), _IMAGENET2012_FILES)
            num_bytes = _SHUFFLED_COPIES * sum(_IMAGENET2012_FILES.values())
        else:
            num_bytes = _DOWNLOADED_COPIES * sum(info.size for info in builder.url_infos.values())
        _check_disk(str(builder.data_path), num_bytes)
        if dry_run:
            return f"{name} can be prepared in {builder.data_path}."
        config = tfds.download.DownloadConfig(manual_dir=manual_dir)
        try:
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # each data set downloads and fails in its own way
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(
                f"TFDS could not prepare {name} in {str(builder.data_path)!r} ({reason}): see to "
                "that and start again, or prepare it on a machine that has its files."
            ) from error
    sizes = ", ".join(f"{info.num_examples:,} {s}" for s, info in builder.info.splits.items())
    return f"{name} is prepared in {builder.data_path}: {sizes} images."


def _check_files(folder: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{str(path)!r} is not there: put {name} of {size:,} bytes there.")
        found = path.stat().st_size
        if found != size:
            raise InputError(
                f"{str(path)!r} has {found:,} bytes and must have {size:,}: fetch it again."
            )


def _check_disk(path: str, num_bytes: int) -> None:
    """Whether the disk that will hold `path` has that many bytes; stores as gs:// grow."""
    if "://" in path:
        return
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    print(f"It takes {num_bytes:,} bytes in {path}, where {free:,} are free.")
    if free < num_bytes:
        raise InputError(
            f"the disk of {path!r} has {free:,} free bytes and {num_bytes:,} are needed: free "
            "some, or give a data_dir on another disk."
        )


def _check_cars(manual_dir: str) -> str:
    """Cars needs no preparation: the files are read as they are."""
    folder = Path(manual_dir)
    missing = [[part for part in way if not (folder / part).exists()] for way in _CARS_LAYOUTS]
    if all(missing):
        # Of the layout that is there in part, or of either.
        shares = [len(m) / len(way) for m, way in zip(missing, _CARS_LAYOUTS, strict=True)]
        nearest = [", ".join(m) for m, s in zip(missing, shares, strict=True) if s == min(shares)]
        raise InputError(
            f"{str(folder)!r} lacks {' or else '.join(nearest)}: the server of TFDS's cars196 is "
            "gone, so put them there from a copy of the Cars archive."
        )
    return f"cars196 is complete in {folder}: train with config.data.name='cars:{folder}'."


def _check_folder(dataset: str, *, verify: bool) -> str:
    """Counts a folder's classes and images, and decodes them if asked to."""
    import numpy as np

    from effnetv2_jax.data.datasets import load_dataset
    from effnetv2_jax.data.host_tf import tf
    from effnetv2_jax.data.preprocess import decode

    def decoded(example: dict[str, tf.Tensor]) -> tf.Tensor:
        # The sum makes sure that TensorFlow does not leave the decoding out as unused.
        pixels = tf.cast(decode(example["image"]), tf.int64)
        return example["index"] + 0 * tf.reduce_sum(pixels)

    data = load_dataset(dataset)
    splits = {"training": data.train, "evaluation": data.eval}
    sizes = {split: source.num_examples for split, source in splits.items()}
    if verify:
        corrupt = []
        for split, source in splits.items():
            whole = np.zeros(source.num_examples, bool)
            stream = source.eval_stream(batch_size=1, process_index=0, process_count=1)
            # An example that cannot be read or decoded does not come out at the other end.
            good = stream.map(decoded, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
            for count, index in enumerate(good.as_numpy_iterator(), 1):
                whole[index] = True
                if count % 10_000 == 0:
                    logging.info("Decoded %d of %d %s images.", count, len(whole), split)
            corrupt += [source.describe(int(index)) for index in np.flatnonzero(~whole)]
        for image in corrupt:
            print(f"corrupt: {image}")
        if corrupt:
            raise InputError(
                f"{len(corrupt)} of {sum(sizes.values())} images do not decode, the first is "
                f"{corrupt[0]}: replace or remove those listed."
            )
    how = "all decode" if verify else "not decoded: --verify does"
    return (
        f"{dataset} has {data.num_classes:,} classes, {sizes['training']:,} training and "
        f"{sizes['evaluation']:,} evaluation images ({how})."
    )


def _define_flags() -> None:
    flags.DEFINE_string("manual_dir", None, "Folder of the files that you got yourself.")
    flags.DEFINE_string("data_dir", None, "TFDS's folder of data sets; TFDS's own by default.")
    flags.DEFINE_bool("dry_run", False, "Check files and disk space only.")
    flags.DEFINE_bool("verify", False, "Decode every image of a folder:/path.")
    flags.DEFINE_integer("num_workers", 1, "Processes on this machine, for imagenet21k.")
    flags.DEFINE_string("on_corrupt", "skip", "Corrupt images of imagenet21k: skip or raise.")
    flags.DEFINE_list(
        "beam_options", [], "Options of Apache Beam, as runner=DataflowRunner,project=NAME."
    )


def main(arguments: list[str]) -> None:
    """The command line."""
    logging.set_verbosity(logging.INFO)
    standard_logging.getLogger("apache_beam").setLevel(standard_logging.WARNING)
    print(
        prepare_data(
            arguments[0],
            manual_dir=FLAGS.manual_dir,
            data_dir=FLAGS.data_dir,
            dry_run=FLAGS.dry_run,
            verify=FLAGS.verify,
            num_workers=FLAGS.num_workers,
            on_corrupt=FLAGS.on_corrupt,
            beam_options=FLAGS.beam_options,
        )
    )


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        num_arguments=(1, 1),
        usage="python -m effnetv2_jax.tools.prepare_data cifar10",
    )
