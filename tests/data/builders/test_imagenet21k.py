"""ImageNet-21k from a miniature archive in the real layout, through Beam and TFDS."""

import hashlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from PIL import Image

from effnetv2_jax.data.builders import imagenet21k
from effnetv2_jax.data.builders.imagenet21k import (
    Imagenet21k,
    Imagenet21kConfig,
    open_imagenet21k,
)
from effnetv2_jax.data.preprocess import decode
from effnetv2_jax.errors import InputError
from tests.data import miniature_21k as miniature

NUM_VALIDATION = 5
SPLITS = ("train", "validation")


def prepare(root, *, on_corrupt="skip", num_shards=None, beam=(), **config):
    """Prepares `root`/manual in `root`/data as the config `miniature`."""
    config = Imagenet21kConfig(name="miniature", num_validation=NUM_VALIDATION, **config)
    builder = Imagenet21k(data_dir=str(root / "data"), config=config, on_corrupt=on_corrupt)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=root / "manual",
            beam_options=PipelineOptions(list(beam)),
            num_shards=num_shards,
        )
    )
    return builder


def read(builder, split):
    """Id -> (labels, encoded image) in the order of the shards."""
    dataset = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = list(tfds.as_numpy(dataset))
    found = {e["id"].decode(): (e["labels"].tolist(), e["image"]) for e in examples}
    assert len(found) == len(examples)
    return found


def held_out(names):
    """The rule of the split, told once more: the lowest hashes of the names."""
    ranks = {n: hashlib.blake2b(n.encode(), digest_size=8, person=b"split").digest() for n in names}
    return set(sorted(names, key=ranks.__getitem__)[:NUM_VALIDATION])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet21k")
    miniature.write_archive(root / "manual")
    return root


@pytest.fixture(scope="module")
def builder(root):
    return prepare(root)


@pytest.fixture(scope="module")
def examples(builder):
    return {split: read(builder, split) for split in SPLITS}


def test_every_image_is_there_once_with_its_labels_and_its_bytes(examples):
    expected = {
        name: ([label], content)
        for label, synset in enumerate(miniature.SYNSETS)
        for name, content in miniature.images()[synset].items()
    }
    del expected[miniature.TRUNCATED], expected[miniature.SHARED[1]]
    dog, cat = (miniature.SYNSETS.index(s) for s in (miniature.DOG, miniature.CAT))
    expected[miniature.SHARED[0]] = ([dog, cat], expected[miniature.SHARED[0]][1])
    assert len(expected) == miniature.NUM_IMAGES
    assert examples["train"] | examples["validation"] == expected


def test_held_out_are_the_lowest_hashes_of_the_names(examples):
    train, validation = examples["train"].keys(), examples["validation"].keys()
    assert not train & validation
    assert len(validation) == NUM_VALIDATION
    assert set(validation) == held_out(train | validation)


def test_the_order_is_not_that_of_the_archive(examples):
    assert list(examples["train"]) != sorted(examples["train"])


def test_cmyk_and_png_images_keep_their_bytes_and_decode(examples):
    images = examples["train"] | examples["validation"]
    cmyk, png = images[miniature.CMYK][1], images[miniature.PNG][1]
    with Image.open(io.BytesIO(cmyk)) as image:
        assert image.mode == "CMYK"
    assert png.startswith(b"\x89PNG")
    for encoded, tolerance in ((cmyk, 12), (png, 0)):
        with Image.open(io.BytesIO(encoded)) as image:
            expected = np.asarray(image.convert("RGB"), np.int32)
        assert np.abs(decode(imagenet21k.tf.constant(encoded)).numpy() - expected).max() <= (
            tolerance
        )


def test_corrupt_images_and_empty_classes_are_reported(builder):
    lines = (builder.data_path / "corrupt_images.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        [miniature.TRUNCATED, f"{miniature.CAR}.tar"]
    ]
    assert "Invalid JPEG data" in lines[0]
    assert builder.info.metadata["num_corrupt"] == 1
    assert builder.info.metadata["empty_synsets"] == [miniature.EMPTY]


def test_a_prepared_release_opens_with_its_classes_and_counts(root, builder, examples):
    prepared = open_imagenet21k(str(root / "data"), "miniature")
    assert prepared.label_space.synsets == miniature.SYNSETS
    assert prepared.label_space.human_names[1] == "dog"
    assert prepared.builder.info.features["labels"].feature.names == list(miniature.SYNSETS)
    assert prepared.max_labels == 2
    for split in SPLITS:
        labels = [label for labels, _ in examples[split].values() for label in labels]
        counts = np.bincount(labels, minlength=len(miniature.SYNSETS)).tolist()
        assert prepared.builder.info.metadata["class_counts"][split] == counts
        assert prepared.builder.info.splits[split].num_examples == len(examples[split])
    assert not list(builder.data_path.glob("notes*"))


def test_another_run_on_a_folder_of_tars_writes_the_same_files(root, builder, tmp_path):
    folder = tmp_path / "manual" / "winter21_whole"
    folder.mkdir(parents=True)
    for synset, files in reversed(miniature.images().items()):
        (folder / f"{synset}.tar").write_bytes(miniature.tar_of(dict(reversed(files.items()))))
    again = prepare(tmp_path)
    for split in SPLITS:
        names = [p.name for p in builder.data_path.glob(f"*{split}*")]
        assert len(names) == 1
        for name in names:
            assert (again.data_path / name).read_bytes() == (builder.data_path / name).read_bytes()


def test_copies_are_merged_alike_in_any_order_and_names_may_repeat():
    copies = [("b.JPEG", (3,), "x.tar", 0, 9), ("a.JPEG", (5, 1), "y.tar", 512, 9)]
    note = imagenet21k._merge("01", copies)
    assert note == imagenet21k._merge("01", copies[::-1])
    assert note[:5] == ("a.JPEG", [1, 3, 5], "y.tar", 512, 9)
    other = imagenet21k._merge("02", copies)
    assert other.id == note.id and other.rank > note.rank and other.order > note.order


def test_more_images_never_move_one_from_train_to_validation(examples, tmp_path):
    classes = miniature.images()
    new = "n00000015"
    classes[new] = {f"{new}_{i}.JPEG": miniature.encode(1000 + i) for i in range(8)}
    miniature.write_archive(tmp_path / "manual", "fall11_whole", classes, with_folder=False)
    grown = prepare(tmp_path, archive="fall11_whole")
    train, validation = (read(grown, split) for split in SPLITS)
    assert len(validation) == NUM_VALIDATION
    assert set(validation) == held_out(train.keys() | validation.keys())
    assert not validation.keys() & examples["train"].keys()
    # The new class would show nothing if none of its images were held out.
    assert any(name.startswith(new) for name in validation)


def test_ancestors_are_labels_too_and_several_shards_hold_everything(root, examples, tmp_path):
    (tmp_path / "manual").symlink_to(root / "manual")
    builder = prepare(tmp_path, ancestors=True, num_shards=12)
    animal = 0
    for split in SPLITS:
        lengths = builder.info.splits[split].shard_lengths
        assert len(lengths) == 12 and sum(lengths) == len(examples[split])
        assert len(list(builder.data_path.glob(f"*-{split}.tfrecord-*-of-00012"))) == 12
        found = read(builder, split)
        assert found.keys() == examples[split].keys()
        for name, (labels, content) in examples[split].items():
            below = not {1, 2}.isdisjoint(labels)  # Dogs and cats are animals, cars are not.
            assert found[name] == (sorted({animal, *labels} if below else labels), content)
    assert 0 in builder.info.splits["validation"].shard_lengths
    assert builder.info.metadata["max_labels"] == 3


def test_a_corrupt_image_can_be_fatal(root, tmp_path):
    (tmp_path / "manual").symlink_to(root / "manual")
    with pytest.raises(InputError, match=rf"1 images are corrupt \({miniature.TRUNCATED}\)"):
        prepare(tmp_path, on_corrupt="raise")
    assert not list((tmp_path / "data").rglob("*.tfrecord*"))
    with pytest.raises(InputError, match="unknown on_corrupt 'rise': did you mean raise"):
        Imagenet21k(data_dir=str(tmp_path), config="winter21", on_corrupt="rise")


def test_a_damaged_tar_is_reported_and_a_good_archive_reports_nothing(tmp_path):
    manual = tmp_path / "manual"
    folder = manual / "winter21_whole"
    folder.mkdir(parents=True)
    dogs = miniature.images()[miniature.DOG]
    whole = miniature.tar_of(dogs)
    (folder / f"{miniature.DOG}.tar").write_bytes(whole)
    builder = prepare(tmp_path)
    assert (builder.data_path / "corrupt_images.txt").read_text() == ""
    assert builder.info.metadata["num_corrupt"] == 0

    (folder / f"{miniature.DOG}.tar").write_bytes(whole[:-9_000])
    (tmp_path / "data").rename(tmp_path / "old")
    builder = prepare(tmp_path)
    report = (builder.data_path / "corrupt_images.txt").read_text()
    assert report.startswith(f"{miniature.DOG}.tar\t")
    assert NUM_VALIDATION < sum(info.num_examples for info in builder.info.splits.values()) < 8


def test_mistakes_are_one_sentence(root, tmp_path):
    with pytest.raises(InputError, match="manual_dir of imagenet21k is missing or empty"):
        prepare(tmp_path)
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "note.txt").write_text("")
    with pytest.raises(InputError, match=r"winter21_whole.tar.* is there"):
        prepare(tmp_path)
    miniature.write_archive(tmp_path / "manual")
    (tmp_path / "manual" / "wordnet.is_a.txt").unlink()
    with pytest.raises(InputError, match=r"wordnet.is_a.txt' cannot be read"):
        prepare(tmp_path, ancestors=True)
    few = {miniature.DOG: {}, miniature.CAT: {"a.JPEG": miniature.encode(0)}}
    miniature.write_archive(tmp_path / "manual", classes=few)
    with pytest.raises(InputError, match="num_validation 5 must be 1 or more and fewer than the 1"):
        prepare(tmp_path)


def test_opening_what_is_not_prepared(tmp_path):
    with pytest.raises(InputError, match=r"fall11 is not prepared in .*prepare_data"):
        open_imagenet21k(str(tmp_path), "fall11")
    with pytest.raises(InputError, match="unknown release of imagenet21k 'winter22'"):
        open_imagenet21k(str(tmp_path), "winter22")


def test_the_published_releases():
    configs = {c.name: c for c in Imagenet21k.BUILDER_CONFIGS}
    assert list(configs) == ["winter21", "fall11", "winter21_ancestors", "fall11_ancestors"]
    for name, config in configs.items():
        assert config.num_validation == 100_000
        assert config.archive == f"{name.partition('_')[0]}_whole"
        assert config.ancestors == name.endswith("ancestors")


@pytest.mark.slow
def test_several_processes_write_the_same_files(root, builder, tmp_path):
    (tmp_path / "manual").symlink_to(root / "manual")
    workers = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    again = prepare(tmp_path, beam=workers)
    for path in builder.data_path.glob("*.tfrecord*"):
        assert (again.data_path / path.name).read_bytes() == path.read_bytes()
