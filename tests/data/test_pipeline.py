"""Batches: what they hold, that they repeat exactly, and which file an error names."""

import numpy as np
import pytest

from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.data.pipeline import eval_batches, train_batches
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
    ],
)
def test_mistakes_raise_before_the_first_batch(synthetic, changes, message):
    with pytest.raises(InputError, match=message):
        train(synthetic.train, **changes)


def test_an_unknown_evaluation_crop_is_refused(synthetic):
    with pytest.raises(InputError, match="unknown evaluation crop 'centre': did you mean center"):
        eval_batches(synthetic.eval, batch_size=4, image_size=16, num_classes=3, crop="centre")
    with pytest.raises(InputError, match="batch_size 4 must be a positive multiple"):
        eval_batches(synthetic.eval, batch_size=4, image_size=16, num_classes=3, process_count=3)
