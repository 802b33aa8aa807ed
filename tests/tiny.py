"""A run that takes seconds: B0 cut down to one narrow block a row, on synthetic images.

Also a configuration file: `--config=tests/tiny.py`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effnetv2_jax.config import base_config

MODEL = {
    "variant": "efficientnetv2-b0",
    "dtype": "float32",
    "width_multiplier": 0.25,
    "depth_multiplier": 0.1,
    "stem_stride": 1,
    "bn_decay": 0.9,
}


def get_config() -> ConfigDict:
    config = base_config()
    config.batch_size = 16
    config.num_epochs = 6.0
    config.model.update(MODEL)
    config.data.name = "synthetic:classes=5,train=72,eval=13,size=24"
    config.augment.crop_area = (0.5, 1.0)
    config.progressive.num_stages = 3
    config.progressive.image_size = (16, 32)
    config.progressive.randaug_magnitude = (1.0, 5.0)
    config.progressive.mixup_alpha = (0.0, 0.2)
    config.learning_rate.per_256_images = 0.03
    config.learning_rate.schedule = "cosine"
    config.learning_rate.warmup_epochs = 1.0
    config.eval.image_size = 32
    config.eval.crop = "squash"
    config.eval.batch_size = 8
    config.eval.every_epochs = 1.5
    config.eval.at_stage_size = True
    config.checkpoint.every_epochs = 0.7
    config.log_every_steps = 4
    return config
