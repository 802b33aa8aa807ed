"""Batches of image files: order, padding, and every way in which a file can be broken."""

import os

import numpy as np
import pytest
from PIL import Image

from effnetv2_jax.data import image_files
from effnetv2_jax.data.image_files import image_file_batches
from effnetv2_jax.errors import InputError


def batches(paths, **overrides):
    arguments = {
        "batch_size": 3,
        "image_size": 16,
        "crop": "squash",
        "crop_fraction": None,
        "resize": "bilinear",
        **overrides,
    }
    return list(image_file_batches([str(path) for path in paths], **arguments))


@pytest.fixture
def files(tmp_path, encode):
    """Eight PNG files, each of one grey level, ten times its number."""
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(encode(np.full((20, 30, 3), 10 * number, np.uint8), "png"))
    return paths


def test_batches_keep_the_order_and_are_padded_with_black(files):
    found = batches(files[::-1])
    assert [batch.paths for batch in found] == [
        tuple(map(str, part)) for part in (files[:4:-1], files[4:1:-1], files[1::-1])
    ]
    levels = [batch.images[:, 0, 0, 0].tolist() for batch in found]
    assert levels == [[70, 60, 50], [40, 30, 20], [10, 0, 0]]
    assert all(batch.images.shape == (3, 16, 16, 3) for batch in found)
    assert all(batch.images.dtype == np.uint8 for batch in found)
    assert all(error is None for batch in found for error in batch.errors)


def test_no_files_are_no_batches():
    assert batches([]) == []


def test_broken_files_are_named_and_the_others_go_on(files, encode, picture):
    whole = encode(picture(0))
    files[1].write_bytes(whole[: len(whole) // 2])
    files[2].write_bytes(b"no image at all")
    files[3].write_bytes(b"")
    files[4].unlink()
    files[5].unlink()
    files[5].mkdir()
    damaged = "is no JPEG, PNG, BMP or GIF image, or is damaged"
    for crop in ("squash", "legacy"):  # `legacy` decodes a JPEG in another way.
        found = batches(files, batch_size=8, crop=crop)[0]
        assert found.errors == (
            None,
            damaged,
            damaged,
            "is empty",
            "cannot be read (No such file or directory)",
            "cannot be read (Is a directory)",
            None,
            None,
        )
        assert found.images[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 60, 70]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(files):
    files[0].chmod(0)
    assert batches(files[:1])[0].errors == ("cannot be read (Permission denied)",)


@pytest.mark.parametrize("crop", ["squash", "legacy"])
@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "jpeg"), ("L", "jpeg"), ("RGBA", "png"), ("P", "gif"), ("L", "png")]
)
def test_every_kind_of_file_becomes_rgb(tmp_path, encode, mode, kind, crop):
    colour = (120, 120, 120) if mode == "L" else (204, 102, 51)  # In the palette.
    image = Image.new("RGB", (40, 40), colour).convert(mode)
    (tmp_path / "file").write_bytes(encode(image, kind))
    batch = batches([tmp_path / "file"], crop=crop)[0]
    assert batch.errors == (None,)
    assert np.abs(batch.images[0].astype(int) - colour).max() <= 4


def test_only_a_few_batches_are_read_ahead(files, monkeypatch):
    begun = []

    class Pool(image_files.ThreadPoolExecutor):
        def submit(self, function, path, *rest):
            begun.append(path)
            return super().submit(function, path, *rest)

    monkeypatch.setattr(image_files, "ThreadPoolExecutor", Pool)
    stream = image_file_batches(
        [str(path) for path in files],
        batch_size=1,
        image_size=16,
        crop="squash",
        crop_fraction=None,
        resize="bilinear",
    )
    assert begun == []
    next(stream)
    assert begun == [str(path) for path in files[:3]]
    next(stream)
    assert begun == [str(path) for path in files[:4]]
    stream.close()


def test_unknown_rules_are_refused(files):
    with pytest.raises(InputError, match="unknown evaluation crop 'centre': did you mean center"):
        batches(files, crop="centre")
    with pytest.raises(InputError, match="unknown resize method 'nearest'"):
        batches(files, resize="nearest")
