"""Small data sets on disk for the data tests."""

import io

import numpy as np
import pytest
from PIL import Image


def encode_image(image, file_format="jpeg", **options):
    """The bytes of an image file, from pixels or a Pillow image."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_picture(seed, height=20, width=30):
    """A smooth random uint8 [height, width, 3], which JPEG keeps nearly as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


@pytest.fixture(scope="session")
def encode():
    return encode_image


@pytest.fixture(scope="session")
def picture():
    return make_picture


@pytest.fixture
def make_folder(tmp_path):
    """Writes JPEG files of differing sizes: make_folder({'cat': 3, 'dog': 4}, under='train')."""

    def make(classes, under="."):
        for number, (name, count) in enumerate(classes.items()):
            folder = tmp_path / "images" / under / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = make_picture(100 * number + i, height=20 + i % 7)
                (folder / f"{i}.jpg").write_bytes(encode_image(pixels))
        return tmp_path / "images"

    return make


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A data_dir with `tiny_pictures`: 23 training examples in 4 record files and 7 for test.

    Every image is of one colour, ten times the example's number, which its `id` tells too.
    """
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
                "id": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(23), "test": self._generate_examples(7)}

        def _generate_examples(self, count):
            for i in range(count):
                pixels = np.full((9 + i, 8, 3), 10 * i, np.uint8)
                yield i, {"image": pixels, "label": i % 3, "id": str(i)}

    directory = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=4)
    TinyPictures(data_dir=directory).download_and_prepare(download_config=config)
    return str(directory)
