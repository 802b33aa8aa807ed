"""EfficientNetV2-M from ImageNet-21k to ImageNet-1k: Table 7, "EfficientNetV2-M (21k)".

86.2 % top-1 (released checkpoint 86.2 %); 15 h on 32 TPUv3 cores in Table 7.

    python -m effnetv2_jax.main --config=configs/m_21k_ft1k.py --config.init_from=DIR_OF_M_21K \
        --workdir=DIR

`init_from` is the workdir of configs/m_21k.py; the columns of the 1,000 classes are picked out of
its classifier. Also with m_21k_ft1k.py:recipe=released.
Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import finetune1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; `argument` is `recipe=paper` or `recipe=released`."""
    return finetune1k("efficientnetv2-m", **parse_argument(argument, recipe="paper"))
