"""EfficientNetV2-B0 on the 1,797 handwritten digits of scikit-learn: the demo.

    python -m effnetv2_jax.main --config=configs/digits.py --workdir=runs/digits

Not a run of the paper: real images that need no download, small enough for two CPU cores.
Minutes and accuracy are in the README.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """The demo's configuration; it takes no argument."""
    parse_argument(argument)
    config = base_config()
    config.batch_size = 32
    config.num_epochs = 13.0

    config.model.variant = "efficientnetv2-b0"
    config.model.dtype = "float32"  # CPUs have no fast bfloat16.
    config.model.bn_decay = 0.9  # 0.99 would remember more than two epochs of 45 steps.
    config.data.name = "digits"

    # A digit fills its 8x8 image, and its mirror image is not a digit.
    config.augment.crop_area = (0.8, 1.0)
    config.augment.crop_aspect_ratio = (0.85, 1.18)
    config.augment.flip = False
    config.normalize.mean = (78.0, 78.0, 78.0)
    config.normalize.std = (96.0, 96.0, 96.0)

    # Below 33 px the last feature map is a single pixel, and BatchNorm sees 32 of them.
    config.progressive.num_stages = 3
    config.progressive.image_size = (40, 48)
    config.progressive.dropout_rate = (0.1, 0.3)
    config.progressive.mixup_alpha = (0.0, 0.05)
    # A dozen epochs are too few to learn inverted and solarized digits, or half of the network.
    config.augment.policy = "none"
    config.progressive.randaug_magnitude = (0.0, 0.0)
    config.model.drop_path_rate = 0.0

    config.learning_rate.per_256_images = 0.008  # 0.001 for a batch of 32.
    config.learning_rate.warmup_epochs = 1.0
    config.learning_rate.decay_rate = 0.82
    config.learning_rate.decay_epochs = 1.0

    config.eval.image_size = 48
    config.eval.crop = "squash"
    config.eval.batch_size = 128
    config.eval.every_epochs = 3.0
    config.eval.at_stage_size = True
    config.checkpoint.every_epochs = 2.0
    config.log_every_steps = 20
    return config
