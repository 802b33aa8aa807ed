"""EfficientNetV2-XL on ImageNet-21k: pretraining for Table 7's row "EfficientNetV2-XL (21k)".

Fine-tuned by configs/xl_21k_ft1k.py it has 87.3 % top-1 on ImageNet-1k; 45 h on 32 TPUv3 cores
in Table 7. No accuracy on ImageNet-21k itself is given.

    python -m effnetv2_jax.main --config=configs/xl_21k.py --workdir=DIR
    python -m effnetv2_jax.main --config=configs/xl_21k.py:recipe=released --workdir=DIR

The paper trains for 60 or 30 epochs and does not say which: --config.num_epochs=30 gives the other.
`python -m effnetv2_jax.tools.prepare_data imagenet21k/fall11 --manual_dir=...` prepares the data;
image-net.org now hands out winter21 with fewer classes: --config.data.name=imagenet21k/winter21.
Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import imagenet21k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; `argument` is `recipe=paper` or `recipe=released`."""
    return imagenet21k("efficientnetv2-xl", **parse_argument(argument, recipe="paper"))
