"""A thousand pictures of Fashion-MNIST and a network that can learn them by heart.

    python -m effnetv2_jax.main --config=configs/fashion_mnist_subset.py --workdir=DIR

Not a run of the paper, but of its scale of difficulty: on 1,000 pictures regularisation decides,
as on ImageNet, and a run takes three minutes on two CPU cores. The experiments on the paper's
training claims (experiments/table05 to table14) start here. The evaluation split is a held-out
part of the training pictures; --config.data.eval_split=None evaluates on the test pictures.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import fashion_mnist_subset


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; it takes no argument."""
    parse_argument(argument)
    return fashion_mnist_subset()
