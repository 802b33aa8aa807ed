"""Architecture search on ImageNet at the paper's scale (section 3.3).

    python -m effnetv2_jax.nas.search --config=configs/nas_imagenet.py --workdir=DIR

The paper: up to 1,000 networks around EfficientNet-B4, about 10 epochs each, on smaller images,
scored on 25,000 held-out training images by A * S^-0.07 * P^-0.05. It does not say how small the
images are: 224 px here. Start the same command on as many machines as there are, with
--storage=ADDRESS of one database (or a journal file on a disk that all see).

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import parse_argument
from effnetv2_jax.nas.search import base_search_config


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `sampler=` random, reinforce, tpe or nsga2.
    """
    values = parse_argument(argument, sampler="random")
    config = base_search_config()
    config.sampler.name = values["sampler"]

    trial = config.trial
    trial.batch_size = 1024
    trial.progressive.num_stages = 1
    trial.progressive.image_size = (224, 224)
    trial.progressive.randaug_magnitude = (5.0, 5.0)
    trial.progressive.dropout_rate = (0.1, 0.1)
    trial.learning_rate.schedule = "cosine"
    trial.learning_rate.warmup_epochs = 1.0
    trial.ema_decay = 0.999  # Of 12,267 steps.
    trial.eval.image_size = 224
    trial.eval.every_epochs = 10.0
    trial.checkpoint.keep = 1
    return config
