"""A small EfficientNetV2 on the 70,000 pictures of Fashion-MNIST: progressive learning in an hour.

    python -m effnetv2_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Not a run of the paper: a data set that installs offline (Debian's package dataset-fashion-mnist,
or any folder with its four IDX files by --config.data.data_dir), and through TFDS elsewhere.
91.89 % top-1 (91.80 % by the averaged weights) in 50 minutes on two CPU cores, see
experiments/fashion_mnist.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration; it takes no argument."""
    parse_argument(argument)
    config = base_config()
    config.batch_size = 128
    config.num_epochs = 32.0

    # B0 halves 28 px five times; at half its width and depth, one halving less costs the same.
    config.model.variant = "efficientnetv2-b0"
    config.model.width_multiplier = 0.5
    config.model.depth_multiplier = 0.5
    config.model.stem_stride = 1
    config.model.drop_path_rate = 0.1
    config.model.dtype = "float32"  # CPUs have no fast bfloat16.
    config.data.name = "fashion_mnist"

    # A garment fills its picture; inverted or turned ones do not occur, so no RandAugment.
    config.augment.crop_area = (0.7, 1.0)
    config.augment.crop_aspect_ratio = (0.85, 1.18)
    config.augment.policy = "none"
    config.normalize.mean = (73.0, 73.0, 73.0)
    config.normalize.std = (90.0, 90.0, 90.0)

    # Up to 16 px the last feature map is a single pixel, and only the centre of a kernel is
    # trained: evaluated at 28 px such a network is no better than chance.
    config.progressive.num_stages = 3
    config.progressive.image_size = (18, 28)
    config.progressive.dropout_rate = (0.1, 0.3)
    config.progressive.randaug_magnitude = (0.0, 0.0)
    config.progressive.mixup_alpha = (0.0, 0.1)

    config.learning_rate.per_256_images = 0.008
    config.learning_rate.schedule = "cosine"
    config.learning_rate.warmup_epochs = 1.0
    config.ema_decay = 0.999

    config.eval.image_size = 28
    config.eval.crop = "squash"
    config.eval.batch_size = 500
    config.eval.every_epochs = 2.0
    config.eval.at_stage_size = False
    config.checkpoint.every_epochs = 1.0
    config.log_every_steps = 100
    return config
