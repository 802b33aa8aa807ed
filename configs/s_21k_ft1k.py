"""EfficientNetV2-S from ImageNet-21k to ImageNet-1k: Table 7, "EfficientNetV2-S (21k)".

84.9 % top-1 (released checkpoint 84.9 %); 9.0 h on 32 TPUv3 cores in Table 7.

    python -m effnetv2_jax.main --config=configs/s_21k_ft1k.py --config.init_from=DIR_OF_S_21K \
        --workdir=DIR

`init_from` is the workdir of configs/s_21k.py; the columns of the 1,000 classes are picked out of
its classifier. Also with s_21k_ft1k.py:recipe=released.
Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import finetune1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; `argument` is `recipe=paper` or `recipe=released`."""
    return finetune1k("efficientnetv2-s", **parse_argument(argument, recipe="paper"))
