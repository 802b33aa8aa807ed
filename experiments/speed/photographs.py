"""JPEG files of ImageNet's usual size, made from the photographs that two packages bring along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Width and height of most ImageNet photographs, pixels.
_SIZE = (500, 375)
_QUALITY = 95


def make_photographs(folder: Path, count: int = 64) -> None:
    """Writes `folder/CLASS/*.jpg`: random crops, a little smaller or larger than they were.

    Args:
      folder: it is made; one that is there is left as it is.
      count: of files.
    """
    if folder.is_dir():
        return
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [*load_sample_images().images]
    photographs += [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")]
    random = np.random.default_rng(0)
    temporary = folder.with_suffix(".tmp")
    for number in range(count):
        image = Image.fromarray(photographs[number % len(photographs)])
        # As much of it as has the right form, then a part of that.
        scale = min(image.width / _SIZE[0], image.height / _SIZE[1]) * random.uniform(0.7, 1.0)
        width, height = (int(side * scale) for side in _SIZE)
        left = int(random.integers(0, image.width - width + 1))
        top = int(random.integers(0, image.height - height + 1))
        crop = image.crop((left, top, left + width, top + height))
        path = temporary / f"class{number % 2}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.resize(_SIZE, Image.Resampling.BICUBIC).save(path, quality=_QUALITY)
    temporary.rename(folder)
