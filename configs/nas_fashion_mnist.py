"""Architecture search on a few thousand pictures of Fashion-MNIST: hours on two CPU cores.

    python -m effnetv2_jax.nas.search --config=configs/nas_fashion_mnist.py --workdir=runs/nas

The backbone is EfficientNetV2-B0 at half its width, whose first stride is left out for pictures of
28 px; layers are one fewer, as many, or one more than half of its own. Results are in
experiments/nas.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.nas.search import base_search_config
from effnetv2_jax.recipes import fashion_mnist_subset

# B0 with half of its layers, rounded up.
BACKBONE = "efficientnetv2-b0@f3e1x1.f3e4x1.f3e4x1.m3e4x2.m3e6x3.m3e6x4"


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `sampler=` random, reinforce, tpe or nsga2.
    """
    values = parse_argument(argument, sampler="random")
    config = base_search_config()
    config.num_trials = 60
    config.sampler.name = values["sampler"]
    config.space.backbone = BACKBONE

    config.trial = fashion_mnist_subset()
    config.trial.model.depth_multiplier = 1.0  # The backbone has its layers.
    # A choice: so short a training does without RandAugment, and gets more pictures instead.
    config.trial.num_epochs = 10.0
    config.trial.data.train_examples = 2000
    config.trial.augment.policy = "none"
    config.trial.progressive.randaug_magnitude = (0.0, 0.0)
    config.trial.progressive.num_stages = 1
    config.trial.eval.every_epochs = 10.0
    return config
