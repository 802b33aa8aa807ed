"""EfficientNetV2-B0 on ImageNet-1k from scratch.

Table 11: 78.7 % top-1; released checkpoint 78.7 %.

The paper trains B0 to B3 without progressive learning, the released code in stages and with
AutoAugment. TPU hours are not given.

    python -m effnetv2_jax.main --config=configs/b0.py --workdir=DIR
    python -m effnetv2_jax.main --config=configs/b0.py:recipe=released --workdir=DIR

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import imagenet1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; `argument` is `recipe=paper` or `recipe=released`."""
    return imagenet1k("efficientnetv2-b0", **parse_argument(argument, recipe="paper"))
