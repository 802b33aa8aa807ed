"""ResNet-50 and ResNet-152 with this project's training: Table 12.

    top-1 in %, time      fixed size          progressive
    ResNet-50,  224 px    78.1 %,  4.9 h      78.4 %, 3.5 h
    ResNet-50,  380 px    80.0 %, 14.3 h      80.3 %, 5.8 h
    ResNet-152, 380 px    82.4 %, 15.5 h      82.9 %, 7.2 h      on 32 TPUv3 cores

    python -m effnetv2_jax.main --config=configs/resnet.py:50,380 --workdir=DIR
    python -m effnetv2_jax.main --config=configs/resnet.py:50,380,progressive=yes --workdir=DIR

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import is_yes, parse_argument
from effnetv2_jax.errors import InputError
from effnetv2_jax.recipes import baseline_imagenet1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `depth=` 50 or 152; `size=` pixels at inference; `progressive=` no or yes.
    """
    values = parse_argument(argument, depth="50", size="224", progressive="no")
    if not values["size"].isdecimal():
        raise InputError(f"size={values['size']}: it must be a number of pixels.")
    return baseline_imagenet1k(
        f"resnet{values['depth']}", "paper", is_yes(values, "progressive"), int(values["size"])
    )
