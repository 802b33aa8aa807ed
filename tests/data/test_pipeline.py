"""Batches: what they hold, that they repeat exactly, and which file an error names."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from effnetv2_jax.data import pipeline
from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.data.pipeline import eval_batches, train_batches
from effnetv2_jax.data.sources import IndexedSource
from effnetv2_jax.errors import InputError


def train(source, **changes):
    arguments = {
        "seed": 3,
        "batch_size": 8,
        "first_step": 0,
        "last_step": 6,
        "image_size": 16,
        "randaug_magnitude": 10.0,
        "randaug_layers": 0,  # a second of tracing: on only where a test is about it
        "num_classes": 10,
    }
    return train_batches(source, **(arguments | changes))


def joined(batches, key="image"):
    return np.concatenate([batch[key] for batch in batches])


@pytest.fixture(scope="module")
def synthetic():
    return load_dataset("synthetic:classes=3,train=23,eval=7,size=12")


@pytest.fixture(params=["indexed", "records"])
def dataset(request, tfds_dir, synthetic):
    if request.param == "indexed":
        return synthetic
    return load_dataset("tfds:tiny_pictures", data_dir=tfds_dir, shuffle_buffer=5)


def test_training_batches_are_square_and_uint8(make_folder):
    root = make_folder({"a": 9, "b": 9})  # of seven different heights
    batches = list(train(load_dataset(f"folder:{root}").train, num_classes=2))
    assert len(batches) == 6
    for batch in batches:
        assert set(batch) == {"image", "label"}
        assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


def test_resuming_gives_the_same_bits(dataset):
    straight = list(train(dataset.train))
    for first_step in (1, 2, 3, 5):
        resumed = list(train(dataset.train, first_step=first_step))
        assert len(resumed) == 6 - first_step
        for key in ("image", "label"):
            np.testing.assert_array_equal(
                joined(resumed, key), joined(straight, key)[8 * first_step :]
            )


def test_resuming_gives_the_same_bits_with_randaugment(synthetic):
    straight = joined(train(synthetic.train, randaug_layers=2))
    resumed = joined(train(synthetic.train, randaug_layers=2, first_step=4))
    np.testing.assert_array_equal(resumed, straight[32:])


def test_processes_see_the_images_of_the_global_batch(synthetic):
    whole = joined(train(synthetic.train)).reshape(6, 8, 16, 16, 3)
    parts = [
        joined(train(synthetic.train, process_index=p, process_count=2)).reshape(6, 4, 16, 16, 3)
        for p in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_augmentation_differs_by_seed_epoch_and_example():
    one = load_dataset("synthetic:train=1,eval=1,size=32").train
    first, again, other = (
        joined(train(one, last_step=1, seed=seed, randaug_layers=2)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    # One example, so a batch is eight epochs.
    assert len({image.tobytes() for image in first}) == 8
    assert not (first == other).all(axis=(1, 2, 3)).any()


def test_examples_of_one_epoch_are_augmented_independently():
    source = load_dataset("synthetic:train=32,eval=1,size=16").train
    still = {"crop_area": (1.0, 1.0), "crop_aspect_ratio": (1.0, 1.0), "last_step": 4}
    flipped = joined(train(source, **still)) != joined(train(source, **still, flip=False))
    assert 8 <= flipped.any(axis=(1, 2, 3)).sum() <= 24


def test_each_augmentation_can_be_switched_off():
    source = load_dataset("synthetic:train=4,eval=1,size=16").train
    still = {"crop_area": (1.0, 1.0), "crop_aspect_ratio": (1.0, 1.0), "flip": False}

    def looks(**changes):
        """How many different images 40 epochs of four examples give."""
        images = joined(train(source, last_step=20, **changes))
        return len({image.tobytes() for image in images})

    assert looks(**still) == 4
    assert looks(**still, randaug_layers=2, randaug_magnitude=None) == 4
    assert looks(**(still | {"flip": True})) == 8
    assert looks(**still, randaug_layers=2) > 20
    assert looks(**(still | {"crop_area": (0.3, 1.0)})) > 60


STILL = {"crop": "squash", "flip": False, "policy": "none"}


def test_squash_and_resize_reach_the_images():
    dataset = load_dataset("synthetic:train=8,eval=1,size=24")
    looks = {}
    for resize in ("bilinear", "bicubic"):
        batch = next(train(dataset.train, **STILL, resize=resize, last_step=1))
        looks[resize] = sorted(image.tobytes() for image in batch["image"])
        again = joined(train(dataset.train, **STILL, resize=resize, first_step=5))
        assert sorted(image.tobytes() for image in again) == looks[resize]
    assert not set(looks["bilinear"]) & set(looks["bicubic"])


def test_legacy_crops_differ_from_random_ones_where_those_are_small(synthetic):
    small = {"crop_area": (0.01, 0.05), "flip": False}
    legacy = joined(train(synthetic.train, crop="legacy", **small))
    assert len({image.tobytes() for image in legacy}) <= 23  # One central square each.
    assert len({image.tobytes() for image in joined(train(synthetic.train, **small))}) > 40


def test_policies_act_on_the_same_crops_and_flips(synthetic):
    """The keys of crop and flip do not depend on what follows them."""
    plain = joined(train(synthetic.train, randaug_layers=0))
    np.testing.assert_array_equal(plain, joined(train(synthetic.train, policy="none")))
    changed = {}
    for policy in ("randaugment", "randaugment_released", "autoaugment"):
        # At level 5 the released blends and some sub-policies do nothing.
        arguments = {"policy": policy, "randaug_layers": 1, "randaug_magnitude": 5.0}
        images = joined(train(synthetic.train, **arguments))
        changed[policy] = (images != plain).any(axis=(1, 2, 3))
    shares = {policy: images.mean() for policy, images in changed.items()}
    assert 0.4 < shares["autoaugment"] < 0.95
    assert 0.4 < shares["randaugment_released"] < 0.9 < shares["randaugment"]


def test_autoaugment_needs_no_magnitude_and_resumes(synthetic):
    images = joined(train(synthetic.train, policy="autoaugment", randaug_magnitude=None))
    resumed = joined(train(synthetic.train, policy="autoaugment", first_step=4))
    np.testing.assert_array_equal(resumed, images[32:])


def test_noise_comes_last_and_moves_no_other_key(synthetic):
    arguments = {"policy": "randaugment", "randaug_layers": 1}
    plain, noisy = (
        joined(train(synthetic.train, **arguments, noise_cutout=noise)) for noise in (False, True)
    )
    changed = (noisy != plain).any(axis=-1)
    assert (noisy[changed] >= 128).all()
    assert changed.any(axis=(1, 2)).all() and changed.sum(axis=(1, 2)).max() <= 8 * 8
    assert len({row.tobytes() for row in changed}) > 30  # Places differ.


def test_evaluation_has_the_crop_and_resize_it_was_given(synthetic):
    def images(**choice):
        batches = eval_batches(synthetic.eval, batch_size=7, image_size=16, num_classes=3, **choice)
        return joined(batches).tobytes()

    looks = [
        images(crop=crop, resize=resize)
        for crop in ("center", "squash")
        for resize in ("bilinear", "bicubic")
    ]
    assert len(set(looks)) == 4
    assert images() == looks[0]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 9])
def test_evaluation_counts_every_example_once(dataset, batch_size):
    batches = eval_batches(dataset.eval, batch_size=batch_size, image_size=16, num_classes=3)
    assert len(batches) == -(-7 // batch_size)
    passes = [list(batches), list(batches)]
    for batch in passes[0]:
        assert batch["image"].shape == (batch_size, 16, 16, 3)
        assert batch["label"].dtype == np.int32 and batch["mask"].dtype == np.float32
    assert joined(passes[0], "mask").sum() == 7
    for key in ("image", "label", "mask"):
        np.testing.assert_array_equal(joined(passes[0], key), joined(passes[1], key))
    real = joined(passes[0])[joined(passes[0], "mask") == 1]
    assert len({image.tobytes() for image in real}) == 7


def test_no_tuner_sleeps_behind_the_batches(synthetic, monkeypatch):
    # The end of a stage would wait until tf.data's tuner wakes up, up to a minute.
    seen = []
    iterate = pipeline._Pipeline.iterate

    def record(self, batches):
        seen.append(batches)
        return iterate(self, batches)

    monkeypatch.setattr(pipeline._Pipeline, "iterate", record)
    next(train(synthetic.train))
    next(iter(eval_batches(synthetic.eval, batch_size=2, image_size=16, num_classes=3)))
    assert [batches.options().autotune.enabled for batches in seen] == [False, False]


@pytest.mark.parametrize("content", [b"garbage", b"", "cut short"])
def test_a_broken_image_is_named(make_folder, content, encode, picture):
    make_folder({"a": 20, "b": 20}, under="train")
    root = make_folder({"a": 6, "b": 6}, under="val")
    whole = encode(picture(0, 200, 200))
    content = whole[: len(whole) // 3] if content == "cut short" else content
    for broken in (root / "train" / "b" / "13.jpg", root / "val" / "b" / "2.jpg"):
        broken.write_bytes(content)
    dataset = load_dataset(f"folder:{root}")
    with pytest.raises(InputError, match=r"train/b/13\.jpg' cannot be decoded"):
        list(train(dataset.train, crop_area=(0.9, 1.0)))
    good = 0
    with pytest.raises(InputError, match=r"val/b/2\.jpg' cannot be decoded"):
        for _ in eval_batches(dataset.eval, batch_size=4, image_size=16, num_classes=2):
            good += 1
    assert good == 2  # the broken image is the ninth


@pytest.fixture
def pictures_source(encode, picture):
    """A source of 20 pictures, whose labels are their indices, with some of them broken."""

    def make(*broken, count=20):
        files = [b"GIF" if i in broken else encode(picture(i)) for i in range(count)]
        images, labels = tf.constant(files), tf.range(count)
        return IndexedSource(
            count, lambda index: (images[index], labels[index]), lambda index: f"picture {index}"
        )

    return make


def skipped_names(caplog):
    """The examples that the warnings name, with their count."""
    return [
        (record.args[0], record.args[1])
        for record in caplog.records
        if record.levelno == logging.WARNING and record.msg.startswith("Skipped")
    ]


def test_training_skips_a_broken_image_for_the_next_of_its_batch(pictures_source, caplog):
    arguments = {"num_classes": 20, "last_step": 5}
    whole = list(train(pictures_source(), **arguments))
    broken = (3, 4, 11)
    source = pictures_source(*broken)
    found = list(train(source, **arguments, on_corrupt="skip"))
    assert len(found) == 5
    met = []
    for expected, batch in zip(whole, found, strict=True):
        good = [row for row in range(8) if expected["label"][row] not in broken]
        # Of row 7 the next good row is the batch's first good one.
        taken = [
            next(g for g in (*good, *[8 + g for g in good]) if g >= row) % 8 for row in range(8)
        ]
        for key in ("image", "label"):
            np.testing.assert_array_equal(batch[key], expected[key][taken])
            assert batch[key].dtype == expected[key].dtype
        met += [f"picture {label}" for label in expected["label"] if label in broken]
    assert len(met) == 6  # In two epochs of 20.
    assert skipped_names(caplog) == [(name, i + 1) for i, name in enumerate(met)]
    resumed = train(source, **arguments, on_corrupt="skip", first_step=2)
    np.testing.assert_array_equal(joined(resumed), joined(found[2:]))


def test_evaluation_masks_and_counts_a_broken_image(pictures_source, caplog):
    def evaluation(source, **changes):
        return eval_batches(source, batch_size=8, image_size=16, num_classes=20, **changes)

    whole = list(evaluation(pictures_source()))
    # The last one is repeated as padding.
    batches = evaluation(pictures_source(3, 4, 19), on_corrupt="skip")
    for _ in range(2):
        found = list(batches)
        assert batches.skipped == 3
        good = ~np.isin(joined(whole, "label"), (3, 4, 19))
        np.testing.assert_array_equal(joined(found, "mask"), joined(whole, "mask") * good)
        np.testing.assert_array_equal(joined(found, "label"), joined(whole, "label"))
        np.testing.assert_array_equal(joined(found)[good], joined(whole)[good])
    assert skipped_names(caplog) == 2 * [("picture 3", 1), ("picture 4", 2), ("picture 19", 3)]


def test_padding_alone_may_be_broken(pictures_source):
    """Process 1 of 2 has nothing but copies of the last example, which process 0 has skipped."""
    source = pictures_source(0, count=1)
    skipped = []
    for process in range(2):
        batches = eval_batches(
            source,
            batch_size=4,
            image_size=16,
            num_classes=20,
            on_corrupt="skip",
            process_index=process,
            process_count=2,
        )
        assert joined(batches, "mask").tolist() == [0, 0]
        skipped.append(batches.skipped)
    assert skipped == [1, 0]


def test_a_batch_without_a_good_image_is_an_error(pictures_source):
    source = pictures_source(*range(8))
    with pytest.raises(InputError, match=r"none of the 8 images .* picture 0"):
        list(eval_batches(source, batch_size=8, image_size=16, num_classes=20, on_corrupt="skip"))
    with pytest.raises(InputError, match="none of the 1 images"):
        list(train(source, batch_size=1, num_classes=20, last_step=20, on_corrupt="skip"))


def test_what_becomes_of_broken_images_is_checked_at_once(synthetic):
    message = "unknown value of on_corrupt 'ignore': choose one of raise, skip"
    with pytest.raises(InputError, match=message):
        train(synthetic.train, on_corrupt="ignore")
    with pytest.raises(InputError, match=message):
        eval_batches(
            synthetic.eval, batch_size=4, image_size=16, num_classes=3, on_corrupt="ignore"
        )


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_record_file_is_named(tfds_dir, tmp_path, damage):
    shutil.copytree(tfds_dir, tmp_path / "data")
    dataset = load_dataset("tfds:tiny_pictures", data_dir=str(tmp_path / "data"))
    (path,) = Path(tmp_path / "data").rglob("*train.tfrecord-00002*")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-20] if damage == "cut" else content)
    problem = "missing" if damage == "gone" else "damaged"
    with pytest.raises(InputError, match=problem) as error:
        list(train(dataset.train))
    assert str(path) in str(error.value) and "node" not in str(error.value)


def multi_label_source(*labels):
    labels = tf.constant(labels)
    return IndexedSource(
        len(labels),
        lambda index: (tf.zeros([8, 8, 3], tf.uint8), labels[index]),
        lambda index: f"example {index}",
    )


def test_batches_of_several_labels():
    source = multi_label_source([4, 2, 0], [1, -1, -1], [3, 0, -1])
    batches = eval_batches(source, batch_size=2, image_size=16, num_classes=5)
    labels = joined(batches, "label")
    assert labels.dtype == np.int32
    assert labels.tolist() == [[4, 2, 0], [1, -1, -1], [3, 0, -1], [3, 0, -1]]
    for batch in train(source, num_classes=5):
        assert batch["label"].shape == (8, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 5, -1], r"label 5 of example 1 is outside 0 \.\. 4"),
        ([-2, 1, -1], r"label -2 of example 1 is outside 0 \.\. 4"),
        ([-1, -1, -1], "example 1 has no label"),
    ],
)
def test_mistakes_in_several_labels(labels, message):
    source = multi_label_source([4, 2, 0], labels)
    with pytest.raises(InputError, match=message):
        list(eval_batches(source, batch_size=2, image_size=16, num_classes=5))
    with pytest.raises(InputError, match=message):
        list(train(source, num_classes=5))


def test_a_single_label_has_no_padding():
    source = IndexedSource(
        3,
        lambda index: (tf.zeros([8, 8, 3], tf.uint8), tf.cast(index, tf.int32) - 1),
        lambda index: f"example {index}",
    )
    with pytest.raises(InputError, match=r"label -1 of example 0 is outside 0 \.\. 4"):
        list(eval_batches(source, batch_size=2, image_size=16, num_classes=5))


def test_a_label_out_of_range_names_its_file(make_folder):
    root = make_folder({"a": 9, "b": 9, "c": 9})
    dataset = load_dataset(f"folder:{root}", eval_fraction=0.3)
    for batches in (
        train(dataset.train, num_classes=2),
        eval_batches(dataset.eval, batch_size=4, image_size=16, num_classes=2),
    ):
        with pytest.raises(InputError, match=r"label 2 of '.*/c/\d\.jpg' is outside 0 \.\. 1"):
            list(batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_count": 3}, "batch_size 8 must be a positive multiple of .* 3"),
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 must be in 0 \.\. 1"),
        ({"image_size": 0}, "image_size 0 must be"),
        ({"first_step": 7}, "first_step 7 and last_step 6"),
        ({"first_step": -1}, "first_step -1"),
        ({"crop_area": (0.0, 1.0)}, r"crop_area \(0.0, 1.0\) must be"),
        ({"crop_area": (0.5, 1.1)}, "crop_area .* high <= 1"),
        ({"crop_area": (0.8, 0.5)}, "crop_area .* low <= high"),
        ({"crop_aspect_ratio": (2.0, 1.0)}, "crop_aspect_ratio .* low <= high"),
        ({"randaug_layers": -1}, "randaug_layers -1 must be 0"),
        ({"crop": "centre"}, "unknown training crop 'centre': choose one of legacy, random"),
        ({"resize": "bicubc"}, "unknown resize method 'bicubc': did you mean bicubic"),
        ({"policy": "autoaug"}, "unknown augmentation policy 'autoaug': did you mean autoaugment"),
        ({"noise_cutout": 1}, "noise_cutout 1 must be True or False"),
        ({"flip": "no"}, "flip 'no' must be True or False"),
    ],
)
def test_mistakes_raise_before_the_first_batch(synthetic, changes, message):
    with pytest.raises(InputError, match=message):
        train(synthetic.train, **changes)


def test_an_unknown_evaluation_crop_or_resize_is_refused(synthetic):
    with pytest.raises(InputError, match="unknown evaluation crop 'centre': did you mean center"):
        eval_batches(synthetic.eval, batch_size=4, image_size=16, num_classes=3, crop="centre")
    with pytest.raises(InputError, match="unknown resize method 'area': choose one of bicubic"):
        eval_batches(synthetic.eval, batch_size=4, image_size=16, num_classes=3, resize="area")
    with pytest.raises(InputError, match="batch_size 4 must be a positive multiple"):
        eval_batches(synthetic.eval, batch_size=4, image_size=16, num_classes=3, process_count=3)
