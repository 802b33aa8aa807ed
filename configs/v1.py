"""EfficientNet V1 (B0 to B7) on ImageNet-1k: the baseline of Tables 7, 10 and 12.

          Table 7          Table 12, fixed   Table 12, progressive
    B3    81.5 %,  10 h
    B4    82.9 %,  21 h    82.9 %, 20.8 h    83.1 %,  9.4 h
    B5    83.7 %,  43 h    83.7 %, 42.9 h    84.0 %, 15.2 h
    B6    84.3 %,  75 h
    B7    84.7 %, 139 h                      85.0 %, 54 h (Table 10)    on 32 TPUv3 cores

    python -m effnetv2_jax.main --config=configs/v1.py:b4 --workdir=DIR
    python -m effnetv2_jax.main --config=configs/v1.py:b4,progressive=yes --workdir=DIR
    python -m effnetv2_jax.main --config=configs/v1.py:b4,recipe=released --workdir=DIR
    python -m effnetv2_jax.main --config=configs/v1.py:b4-fused-1-3 --workdir=DIR    # Table 3

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import is_yes, parse_argument
from effnetv2_jax.recipes import baseline_imagenet1k


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `variant=` b0 to b7, or B4 with fused stages, b4-fused-1-3, -1-5 and -1-7;
        `recipe=` paper or released; `progressive=` no or yes.
    """
    values = parse_argument(argument, variant="b0", recipe="paper", progressive="no")
    return baseline_imagenet1k(
        f"efficientnet-{values['variant']}", values["recipe"], is_yes(values, "progressive")
    )
