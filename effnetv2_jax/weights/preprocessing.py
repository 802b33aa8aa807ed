"""How the images of published weights are prepared, which their files do not say."""

from __future__ import annotations

from typing import Any

from effnetv2_jax.models.specs import get_spec

# ImageNet's mean and standard deviation in grey levels (0.485 * 255, ...).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# torchvision/models/efficientnet.py, the presets of the newest weights: size of the short side,
# size of the crop, interpolation. L has weights of the authors, and their normalisation.
_TORCHVISION = {
    "efficientnet-b0": (256, 224, "bicubic"),
    "efficientnet-b1": (255, 240, "bilinear"),
    "efficientnet-b2": (288, 288, "bicubic"),
    "efficientnet-b3": (320, 300, "bicubic"),
    "efficientnet-b4": (384, 380, "bicubic"),
    "efficientnet-b5": (456, 456, "bicubic"),
    "efficientnet-b6": (528, 528, "bicubic"),
    "efficientnet-b7": (600, 600, "bicubic"),
    "efficientnetv2-s": (384, 384, "bilinear"),
    "efficientnetv2-m": (480, 480, "bilinear"),
    "efficientnetv2-l": (480, 480, "bicubic"),
    # torchvision/models/resnet.py.
    "resnet50": (232, 224, "bilinear"),
    "resnet152": (232, 224, "bilinear"),
}
# torchvision leaves PyTorch's default in these; the others have TensorFlow's.
_PYTORCH_EPSILON = (*(f"efficientnet-b{i}" for i in range(5)), "resnet50", "resnet152")
_SMALL_V2 = tuple(f"efficientnetv2-b{i}" for i in range(4))


def default_preprocessing(source: str, variant: str, num_classes: int) -> dict[str, Any]:
    """The fields of `ModelSpec` that follow from where weights were published.

    Args:
      source: of `convert.SOURCES`.
      variant: of the network.
      num_classes: tells ImageNet-21k (more than 20,000) from 1k: the authors normalise otherwise.

    Returns:
      eval_size, mean, std, crop, crop_fraction, resize, bn_epsilon and scores.
    """
    table = get_spec(variant)
    is_21k = num_classes > 20_000
    if source == "torchvision" and variant in _TORCHVISION:
        short_side, size, kernel = _TORCHVISION[variant]
        by_authors = variant == "efficientnetv2-l"
        return {
            "eval_size": size,
            "mean": (127.5,) * 3 if by_authors else IMAGENET_MEAN,
            "std": (127.5,) * 3 if by_authors else IMAGENET_STD,
            "crop": "center",
            "crop_fraction": size / short_side,
            "resize": f"{kernel}_antialias",
            "bn_epsilon": 1e-5 if variant in _PYTORCH_EPSILON else 1e-3,
        }
    if source == "plain_pytorch":
        return {
            "eval_size": table.eval_size,
            "mean": (127.5,) * 3,
            "std": (127.5,) * 3,
            "crop": "center",
            "crop_fraction": 1.0,
            "resize": "bilinear_antialias",
        }
    if variant.startswith("efficientnet-lite"):
        # tensorflow/tpu models/official/efficientnet/lite: MEAN_RGB, STDDEV_RGB; bicubic as V1.
        return {
            "eval_size": table.eval_size,
            "mean": (127.0,) * 3,
            "std": (128.0,) * 3,
            "crop": "legacy",
            "resize": "bicubic",
        }
    if variant.startswith("efficientnet-") or (variant in _SMALL_V2 and not is_21k):
        # preprocess_legacy.py.
        return {
            "eval_size": table.eval_size,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "crop": "legacy",
            "resize": "bicubic",
        }
    return {
        # ImageNet-21k is evaluated at 224 px (automl efficientnetv2/README.md), and its released
        # checkpoints were trained with a sigmoid loss.
        "eval_size": 224 if is_21k else table.eval_size,
        "mean": (128.0,) * 3,
        "std": (128.0,) * 3,
        "crop": "released",
        "resize": "bilinear",
        "scores": "sigmoid" if is_21k and source in ("released", "timm") else "softmax",
    }
