"""A thousand pictures of Fashion-MNIST and a network that can learn them by heart.

    python -m effnetv2_jax.main --config=configs/fashion_mnist_subset.py --workdir=DIR

Not a run of the paper. On so few pictures regularisation has something to do, and a run takes
minutes on two CPU cores. The experiments on the paper's training claims (experiments/table05 to
table14) start here, and experiments/small_network says what it is. The evaluation split is a
held-out part of the training pictures; for the test pictures afterwards,

    python -m effnetv2_jax.tools.evaluate --model=DIR --data=fashion_mnist
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.recipes import fashion_mnist_subset


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; it takes no argument."""
    parse_argument(argument)
    return fashion_mnist_subset()
