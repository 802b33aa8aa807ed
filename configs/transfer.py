"""Transfer from ImageNet-1k to CIFAR-10, CIFAR-100, Flowers and Cars: Table 8, mean of 5 runs.

              CIFAR-10     CIFAR-100    Flowers      Cars         top-1 in %
    V2-S      98.7 +-0.04  91.5 +-0.11  97.9 +-0.13  93.8 +-0.11
    V2-M      99.0 +-0.08  92.2 +-0.08  98.5 +-0.08  94.6 +-0.10
    V2-L      99.1 +-0.03  92.3 +-0.13  98.8 +-0.05  95.1 +-0.10

    python -m effnetv2_jax.main --config=configs/transfer.py:model=l,data=cifar100 \
        --config.init_from=DIR_OF_L --config.seed=0 --workdir=DIR

`init_from` is the workdir of configs/l.py (any run of the same network will do). 10,000 steps of
512 images; the paper gives neither hardware nor hours for them.
Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import transfer


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `model=` s, m, l, xl or b0 to b3; `data=` cifar10, cifar100, flowers or cars;
        `recipe=` paper or released.
    """
    values = parse_argument(argument, model="s", data="cifar10", recipe="paper")
    return transfer(f"efficientnetv2-{values['model']}", values["data"], values["recipe"])
