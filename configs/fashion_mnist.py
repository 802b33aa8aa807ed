"""A small EfficientNetV2 on the 70,000 pictures of Fashion-MNIST: progressive learning in an hour.

    python -m effnetv2_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Not a run of the paper: a data set that installs offline (Debian's package dataset-fashion-mnist,
or any folder with its four IDX files by --config.data.data_dir), and through TFDS elsewhere.
91.89 % top-1 (91.80 % by the averaged weights) in 50 minutes on two CPU cores, see
experiments/fashion_mnist.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import fashion_mnist


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; it takes no argument."""
    parse_argument(argument)
    return fashion_mnist()
