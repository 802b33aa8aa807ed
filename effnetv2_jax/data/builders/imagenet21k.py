"""ImageNet-21k for TFDS, from the archives that image-net.org hands out.

Importing this module makes `tfds.builder("imagenet21k/winter21")` known. Three facts shape it.

* An archive has over a terabyte, so no step holds it and nothing is unpacked: a first Beam
  pipeline reads every synset's tar once, by its range of bytes, and notes where each image is;
  a second one copies the images, by theirs, into the shards. Only these notes of about 150 bytes
  for each image are grouped and sorted. TFDS's own Beam writer sends the images themselves
  through a shuffle, which a runner on one machine keeps in memory; the notes take it about 1 kB
  for each image there, 14 GB in all (measured on 80,000 images). The images are read in shuffled
  order: keep the archive on a solid-state disk or in an object store.
* An image that stands under several synsets becomes one example with all of their labels. Its
  bytes tell which images are the same, and its first name in alphabetical order is its id.
* The held-out images are those whose names hash lowest, so that no other image and no machine
  has a say in the order of that queue; its first `num_validation` are taken. An archive with
  more images can move images from validation to train, where new ones rank before them, and
  never the other way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

# The base of GeneratorBasedBuilder: it reads files and leaves the writing to its subclasses.
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from effnetv2_jax.data.builders.archives import (
    DamagedTar,
    Member,
    open_file,
    read_bytes,
    synset_tars,
    tar_members,
)
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.label_space import IS_A_FILE, WORDS_FILE, LabelSpace
from effnetv2_jax.data.preprocess import decode
from effnetv2_jax.errors import InputError, unknown_name

LABEL_SPACE_FILE = "label_space.json"
CORRUPT_FILE = "corrupt_images.txt"
# EfficientNetV2 paper, section 5.2: 100,000 images are reserved for validation.
_NUM_VALIDATION = 100_000
# Beam's in-process runner; the default of `beam.Pipeline` first looks for one to download.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_ON_CORRUPT = ("skip", "raise")
_MANUAL_DOWNLOAD = """\
manual_dir must hold winter21_whole.tar (or fall11_whole.tar) from https://image-net.org, a tar of
one tar for each synset, or a folder winter21_whole (fall11_whole) of these tars. Put
wordnet.is_a.txt and words.txt of image-net.org beside it for ancestors and for names."""


@dataclasses.dataclass(eq=False)
class Imagenet21kConfig(tfds.core.BuilderConfig):
    """One release of the archive.

    Attributes:
      archive: the name of its file without `.tar`.
      num_validation: how many images are held out.
      ancestors: whether an image is also labelled with the classes above its own in WordNet.
    """

    archive: str = "winter21_whole"
    num_validation: int = _NUM_VALIDATION
    ancestors: bool = False


_CONFIGS = [
    Imagenet21kConfig(
        name=f"{release}{'_ancestors' * ancestors}",
        description=f"{archive}.tar{', with the labels of all ancestors' * ancestors}",
        archive=archive,
        ancestors=ancestors,
    )
    for ancestors in (False, True)
    for release, archive in (("winter21", "winter21_whole"), ("fall11", "fall11_whole"))
]


class _Tar(NamedTuple):
    """The tar of one synset, the `number`th of `total`, and the labels of its images."""

    number: int
    total: int
    labels: tuple[int, ...]
    tar: Member


class _Note(NamedTuple):
    """What is known of an image; `rank` decides its split and `order` its place in there."""

    id: str
    labels: list[int]
    path: str
    offset: int
    size: int
    rank: str
    order: str


class Imagenet21k(FileReaderBuilder):
    """`imagenet21k`: features `image` (as it was encoded), `labels` and `id` (a file's name)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = _CONFIGS
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL_DOWNLOAD

    def __init__(self, *, on_corrupt: str = "skip", **kwargs: Any):
        """Makes the builder.

        Args:
          on_corrupt: what becomes of images that do not decode: `skip` lists them in
            `corrupt_images.txt` beside the shards and leaves them out, `raise` lists them in an
            InputError before anything is written.
          **kwargs: of every TFDS builder: data_dir, config, version, file_format.
        """
        if on_corrupt not in _ON_CORRUPT:
            raise unknown_name("on_corrupt", on_corrupt, _ON_CORRUPT)
        self._on_corrupt = on_corrupt
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            # The archive itself says which synsets there are; see _download_and_prepare.
            "labels": tfds.features.Sequence(tfds.features.ClassLabel()),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="ImageNet-21k with every image once and all of its labels.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://image-net.org",
            metadata=tfds.core.MetadataDict(),
        )

    def _download_and_prepare(
        self, dl_manager: Any, download_config: tfds.download.DownloadConfig
    ) -> None:
        """Writes the shards, the label space and the report of corrupt images."""
        if self.info.file_format != tfds.core.FileFormat.TFRECORD:
            raise InputError(
                f"file_format {self.info.file_format.value!r} is not written for imagenet21k: "
                "leave it out, or say 'tfrecord'."
            )
        try:
            manual_dir = str(dl_manager.manual_dir)
        except AssertionError as error:
            raise InputError(
                f"the manual_dir of {self.name} is missing or empty: {_MANUAL_DOWNLOAD}"
            ) from error
        tars = synset_tars(manual_dir, self.builder_config.archive)
        space = find_label_space(manual_dir, self.builder_config, tars)
        self.info.features["labels"].feature.names = list(space.synsets)
        space.save(self.data_path / LABEL_SPACE_FILE)

        notes = epath.Path(self.data_path) / "notes"
        notes.mkdir()
        self._take_notes(notes, tars, space, download_config)
        corrupt = sorted((notes / "corrupt").read_text().splitlines())
        (self.data_path / CORRUPT_FILE).write_text("".join(f"{line}\n" for line in corrupt))
        self._judge(corrupt)
        self._write_shards(notes, space, len(corrupt), download_config)
        notes.rmtree()

    def _take_notes(
        self,
        notes: epath.Path,
        tars: dict[str, Member],
        space: LabelSpace,
        download_config: tfds.download.DownloadConfig,
    ) -> None:
        """The first pipeline: where every image is, and which images are corrupt.

        Writes `images-*` (a note in each line), `corrupt`, `total` (images and their bytes) and
        `held_out` (the rank of the last image that is held out) into `notes`.
        """
        import apache_beam as beam

        # Ties between images of the same name are broken by content, so the count is exact.
        # Each worker keeps its own num_validation lowest ranks and the runner merges these
        # lists, so nobody sees them all; they have 56 bytes each.
        lowest = beam.combiners.Top.Smallest(self.builder_config.num_validation)
        elements = [
            _Tar(number, len(tars), _labels(space, synset, self.builder_config.ancestors), tar)
            for number, (synset, tar) in enumerate(tars.items(), 1)
        ]
        with _pipeline(download_config) as pipeline:
            found = (
                pipeline
                | "Tars" >> beam.Create(elements)
                # Without it a runner may fuse all tars into one worker's bundle.
                | "Distribute" >> beam.Reshuffle()
                | "Read" >> beam.FlatMap(_read_tar).with_outputs("corrupt", main="images")
            )
            images = (
                found.images | "SameBytes" >> beam.GroupByKey() | "Merge" >> beam.MapTuple(_merge)
            )
            ranks = images | "Rank" >> beam.Map(lambda note: note.rank)
            total = images | "Size" >> beam.Map(lambda note: (1, note.size))
            _ = images | "Note" >> beam.Map(json.dumps) | beam.io.WriteToText(str(notes / "images"))
            _ = found.corrupt | "Corrupt" >> _write_one(notes / "corrupt")
            _ = (
                ranks
                | "Lowest" >> lowest
                | "Last" >> beam.Map(lambda lowest: lowest[-1] if lowest else "")
                | "HeldOut" >> _write_one(notes / "held_out")
            )
            _ = (
                total
                | "Sum" >> beam.CombineGlobally(_sum_pairs)
                | "ToJson" >> beam.Map(json.dumps)
                | "Total" >> _write_one(notes / "total")
            )

    def _judge(self, corrupt: list[str]) -> None:
        """Tells of corrupt images, by an error if the user asked for it."""
        if not corrupt:
            return
        names = ", ".join(line.partition("\t")[0] for line in corrupt[:10])
        more = ", ..." * (len(corrupt) > 10)
        if self._on_corrupt == "raise":
            raise InputError(
                f"{len(corrupt)} images are corrupt ({names}{more}): fetch their tars again, or "
                "prepare with on_corrupt='skip' to leave them out."
            )
        logging.warning(
            "%d corrupt images are left out (%s%s); %s lists them.",
            *(len(corrupt), names, more, CORRUPT_FILE),
        )

    def _write_shards(
        self,
        notes: epath.Path,
        space: LabelSpace,
        num_corrupt: int,
        download_config: tfds.download.DownloadConfig,
    ) -> None:
        """The second pipeline: copies the images into shards, and fills in `self.info`."""
        import apache_beam as beam

        num_images, num_bytes = json.loads((notes / "total").read_text())
        num_validation = self.builder_config.num_validation
        if not 0 < num_validation < num_images:
            raise InputError(
                f"num_validation {num_validation} must be 1 or more and fewer than the "
                f"{num_images} images in {self.builder_config.archive}: give the whole archive, or "
                "change it in a builder config of another name."
            )
        sizes = {"train": num_images - num_validation, "validation": num_validation}
        config = download_config.get_shard_config() or ShardConfig()
        shards = {}
        for split, size in sizes.items():
            count = config.get_number_shards(
                # The mean size stands for each image's, which is near enough to choose by.
                total_size=num_bytes * size // num_images,
                num_examples=size,
                uses_precise_sharding=False,
            )
            template = self._get_filename_template(split)
            shards[split] = [os.fspath(p) for p in template.sharded_filepaths(count)]
        write = _ShardWriter(str(notes), shards, self.info.features.serialize_example)
        held_out = (notes / "held_out").read_text().strip()
        with _pipeline(download_config) as pipeline:
            _ = (
                pipeline
                | "Notes" >> beam.io.ReadFromText(f"{notes / 'images'}*")
                | "Assign" >> beam.Map(_assign, held_out, {s: len(p) for s, p in shards.items()})
                | "Shard" >> beam.GroupByKey()
                | "Copy" >> beam.MapTuple(write)
                | "Lines" >> beam.Map(json.dumps)
                | "Results" >> _write_one(notes / "written")
            )
        lengths = {split: [0] * len(paths) for split, paths in shards.items()}
        written: Counter[str] = Counter()
        counts = {split: [0] * space.size for split in shards}
        max_labels = 0
        with (notes / "written").open() as results:
            for split, shard, length, size, most, per_class in map(json.loads, results):
                lengths[split][shard] = length
                written[split] += size
                max_labels = max(max_labels, most)
                for label, count in per_class:
                    counts[split][label] += count
        for split, paths in shards.items():
            for path, length in zip(paths, lengths[split], strict=True):
                if not length:  # Chance gave it no image, and TFDS expects a file all the same.
                    epath.Path(path).write_bytes(b"")
        self.info.set_splits(
            tfds.core.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=lengths[split],
                        num_bytes=written[split],
                        filename_template=self._get_filename_template(split),
                    )
                    for split in shards
                ]
            )
        )
        self.info.metadata.update(
            max_labels=max_labels,
            num_corrupt=num_corrupt,
            class_counts=counts,
            empty_synsets=[
                synset
                for synset, *number in zip(space.synsets, *counts.values(), strict=True)
                if not any(number)
            ],
        )
        if self.info.metadata["empty_synsets"]:
            logging.warning(
                "%d classes have no images and keep their labels: %s.",
                len(self.info.metadata["empty_synsets"]),
                ", ".join(self.info.metadata["empty_synsets"]),
            )


class OpenImagenet21k(NamedTuple):
    """A prepared release: its TFDS builder, its classes, and the most labels of an image."""

    builder: tfds.core.DatasetBuilder
    label_space: LabelSpace
    max_labels: int


def open_imagenet21k(data_dir: str | None = None, config: str = "winter21") -> OpenImagenet21k:
    """Opens a release that was prepared.

    Args:
      data_dir: TFDS's folder of data sets; None for TFDS's own default.
      config: the release: `winter21`, `fall11`, either with `_ancestors`, or the name of the
        config of your own that you prepared.

    Raises:
      InputError: the release is unknown or not prepared there.
    """
    try:
        builder = tfds.builder(f"imagenet21k/{config}", data_dir=data_dir)
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        raise unknown_name("release of imagenet21k", config, Imagenet21k.builder_configs) from error
    if not builder.is_prepared():
        raise InputError(
            f"imagenet21k/{config} is not prepared in {str(builder.data_path)!r}: run `python -m "
            f"effnetv2_jax.tools.prepare_data imagenet21k/{config}`, or set data_dir to where it "
            "is."
        )
    space = LabelSpace.load(builder.data_path / LABEL_SPACE_FILE)
    return OpenImagenet21k(builder, space, int(builder.info.metadata["max_labels"]))


def find_label_space(
    manual_dir: str, config: Imagenet21kConfig, synsets: Iterable[str]
) -> LabelSpace:
    """The label space of an archive's synsets, with names and parents where they are known.

    Args:
      manual_dir: may hold `words.txt` and `wordnet.is_a.txt` of image-net.org.
      config: the release.
      synsets: those in the archive, with or without images.

    Raises:
      InputError: `config.ancestors` is set and `wordnet.is_a.txt` is missing, or one is damaged.
    """
    words, is_a = (epath.Path(manual_dir) / name for name in (WORDS_FILE, IS_A_FILE))
    return LabelSpace.from_wordnet(
        f"imagenet21k/{config.name}",
        synsets,
        words=words if words.exists() else None,
        is_a=is_a if config.ancestors or is_a.exists() else None,
    )


def _labels(space: LabelSpace, synset: str, ancestors: bool) -> tuple[int, ...]:
    label = space.index(synset)
    return (label, *space.ancestors(label)) if ancestors else (label,)


def _pipeline(download_config: tfds.download.DownloadConfig) -> Any:
    """A Beam pipeline on the runner of the download config, or else on this machine."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import (
        PipelineOptions,
        StandardOptions,
        TypeOptions,
    )

    # An empty list: otherwise Beam parses the flags of the program that called.
    options = download_config.beam_options or PipelineOptions([])
    # Beam would take the two outputs of _read_tar for one type.
    options.view_as(TypeOptions).pipeline_type_check = False
    runner = download_config.beam_runner
    if runner is None and options.view_as(StandardOptions).runner is None:
        runner = _LOCAL_RUNNER
    return beam.Pipeline(runner=runner, options=options)


def _write_one(path: epath.Path) -> Any:
    """A transform that writes lines into a single file of just that name."""
    import apache_beam as beam

    return beam.io.WriteToText(str(path), num_shards=1, shard_name_template="")


def _read_tar(element: _Tar) -> Iterator[Any]:
    """(digest of the bytes, note without rank) of each image in a tar; corrupt ones apart."""
    import apache_beam as beam

    tar = element.tar
    counts: Counter[str] = Counter()

    def corrupt(name: str, reason: str) -> Any:
        counts["corrupt"] += 1
        beam.metrics.Metrics.counter("imagenet21k", "corrupt_images").inc()
        logging.warning("%s of %s is corrupt: %s", name, tar.name, reason)
        return beam.pvalue.TaggedOutput("corrupt", f"{name}\t{tar.name}\t{reason}")

    with open_file(tar.path) as file:
        try:
            for image in tar_members(file, tar):
                content = read_bytes(file, image)
                reason = _flaw(content)
                if reason is not None:
                    yield corrupt(image.name, reason)
                    continue
                counts["images"] += 1
                # SHA-1 of the bytes tells which images are the same: it is no defence here.
                digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                yield digest, (image.name, element.labels, image.path, image.offset, image.size)
        except DamagedTar as error:
            yield corrupt(tar.name, f"the tar {error}; its images up to there are used")
    beam.metrics.Metrics.counter("imagenet21k", "images").inc(counts["images"])
    logging.info(
        "[%d/%d] %s: %d images, %d corrupt.",
        *(element.number, element.total, tar.name, counts["images"], counts["corrupt"]),
    )


def _flaw(content: bytes) -> str | None:
    """Why the image does not decode, or None if it does; decoding is the training's own."""
    try:
        decode(tf.constant(content))
    except tf.errors.InvalidArgumentError as error:
        # TensorFlow puts the node that failed before its reason and the operation behind it.
        return error.message.rpartition("}} ")[2].partition(" [Op:")[0].partition("\n")[0]
    return None


def _merge(digest: str, images: Iterable[tuple[Any, ...]]) -> _Note:
    """One note for images of the same bytes."""
    copies = sorted(images)
    name, _, path, offset, size = copies[0]
    labels = sorted({label for copy in copies for label in copy[1]})
    # The digest only separates different images of one name.
    rank = _hash(name, b"split") + digest
    return _Note(name, labels, path, offset, size, rank, _hash(name, b"order") + digest)


def _hash(name: str, purpose: bytes) -> str:
    """16 hexadecimal digits that depend on the name and the purpose alone."""
    return hashlib.blake2b(name.encode(), digest_size=8, person=purpose).hexdigest()


def _sum_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    columns = list(pairs)
    return sum(pair[0] for pair in columns), sum(pair[1] for pair in columns)


def _assign(
    line: str, held_out: str, num_shards: dict[str, int]
) -> tuple[tuple[str, int], tuple[Any, ...]]:
    """((split, shard), (order, id, labels, path, offset, size)) of a note."""
    note = _Note(*json.loads(line))
    split = "validation" if note.rank <= held_out else "train"
    shard = int(note.order[:16], 16) * num_shards[split] >> 64
    return (split, shard), (note.order, note.id, note.labels, note.path, note.offset, note.size)


@dataclasses.dataclass(frozen=True)
class _ShardWriter:
    """Copies the images of one shard, in the order of their hashes, into its file."""

    scratch: str
    paths: dict[str, list[str]]
    serialize: Callable[[dict[str, Any]], bytes]

    def __call__(
        self, key: tuple[str, int], notes: Iterable[tuple[Any, ...]]
    ) -> tuple[str, int, int, int, int, list[tuple[int, int]]]:
        """Returns split, shard, examples, bytes, most labels of an image, images per class."""
        split, shard = key
        path = self.paths[split][shard]
        # A runner may give the same shard to two workers, or again after one died: the last one
        # to finish wins, and what the others began goes away with the notes.
        temporary = os.path.join(self.scratch, f"{split}-{shard}-{uuid.uuid4().hex}")
        length = size = most = 0
        per_class: Counter[int] = Counter()
        with tf.io.TFRecordWriter(temporary) as writer:
            for name, labels, content in _contents(sorted(notes)):
                example = self.serialize({"image": content, "labels": labels, "id": name})
                # The order of a protocol buffer's map differs from process to process.
                record = tf.train.Example.FromString(example).SerializeToString(deterministic=True)
                writer.write(record)
                length, size, most = length + 1, size + len(record), max(most, len(labels))
                per_class.update(labels)
        tf.io.gfile.rename(temporary, path, overwrite=True)
        logging.info(
            "Wrote %s shard %d of %d: %d images.", split, shard + 1, len(self.paths[split]), length
        )
        return split, shard, length, size, most, sorted(per_class.items())


def _contents(notes: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, list[int], bytes]]:
    """(id, labels, bytes) of the images; a file stays open while the next image is in it too."""
    file = None
    try:
        open_path = None
        for _, name, labels, path, offset, size in notes:
            if file is None or path != open_path:
                if file is not None:
                    file.close()
                file, open_path = open_file(path), path
            yield name, labels, read_bytes(file, Member(name, path, offset, size))
    finally:
        if file is not None:
            file.close()
