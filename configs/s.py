"""EfficientNetV2-S on ImageNet-1k from scratch.

Table 7: 83.9 % top-1 in 7.1 h on 32 TPUv3 cores; released checkpoint 83.9 %.

    python -m effnetv2_jax.main --config=configs/s.py --workdir=DIR
    python -m effnetv2_jax.main --config=configs/s.py:recipe=released --workdir=DIR

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import imagenet1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; `argument` is `recipe=paper` or `recipe=released`."""
    return imagenet1k("efficientnetv2-s", **parse_argument(argument, recipe="paper"))
