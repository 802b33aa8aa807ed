"""What a run is: every default, and every number that follows from a configuration.

A configuration states causes (epochs, global batch size, learning rate per 256 images);
`make_plan` derives the consequences once (steps, peak learning rate, stages), so overriding
one cause moves everything that depends on it. Each section holds exactly the keyword arguments
of one function, so an unread key cannot exist.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.progressive import Stage, make_stages


def base_config() -> ConfigDict:
    """Every key with its default: EfficientNetV2-S on ImageNet by the paper's section 5.1.

    The result is locked: a configuration file can change keys but not invent them.
    """
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 4096  # Global: over all devices of all hosts.
    config.num_epochs = 350.0
    config.parallel = "pmap"  # How a step runs on all devices: or "shard_map", with the same bits.
    # Training is never shorter than this: small data sets are fine-tuned for 10,000 steps.
    config.min_steps = 0

    # initial_weights.load_initial_weights
    config.init_from = config_dict.placeholder(
        str
    )  # A workdir, a checkpoint in it or a model folder.
    config.init_head = "auto"

    # models.create.create_model
    config.model = ConfigDict()
    config.model.variant = "efficientnetv2-s"
    config.model.dtype = "bfloat16"
    config.model.width_multiplier = 1.0
    config.model.depth_multiplier = 1.0
    config.model.stem_stride = 2
    config.model.padding = "same"
    config.model.drop_path_rate = 0.2  # Survival probability 0.8.
    config.model.bn_decay = 0.99
    config.model.bn_epsilon = 1e-3
    # Replicas that share batch statistics, at most. The paper names none; the released code
    # groups up to 8 cores (automl efficientnetv2/utils.py).
    config.model.bn_group_size = 8

    # data.datasets.load_dataset
    config.data = ConfigDict()
    config.data.name = "imagenet2012"
    config.data.data_dir = config_dict.placeholder(str)
    config.data.train_split = config_dict.placeholder(str)
    config.data.eval_split = config_dict.placeholder(str)
    config.data.eval_fraction = 0.1  # Of a folder without a split of its own.
    config.data.minival_examples = 0  # Of the training split, held out to stop early by.
    config.data.train_examples = config_dict.placeholder(int)  # Train on so few of the others.
    config.data.shuffle_buffer = 16384
    config.data.num_classes = config_dict.placeholder(int)  # Outputs, if more than classes.
    config.on_corrupt = "raise"  # What an image that cannot be decoded does: or "skip".

    # data.pipeline.train_batches
    config.augment = ConfigDict()
    config.augment.crop = "random"
    config.augment.crop_area = (0.05, 1.0)
    config.augment.crop_aspect_ratio = (0.75, 1.33)
    config.augment.resize = "bilinear"
    config.augment.flip = True
    config.augment.policy = "randaugment"
    config.augment.randaug_layers = 2
    config.augment.noise_cutout = False

    # steps.normalize
    config.normalize = ConfigDict()
    config.normalize.mean = (128.0, 128.0, 128.0)
    config.normalize.std = (128.0, 128.0, 128.0)

    # progressive.make_stages
    config.progressive = ConfigDict()
    config.progressive.form = "paper"
    config.progressive.num_stages = 4
    config.progressive.image_size = (128, 300)
    config.progressive.dropout_rate = (0.1, 0.3)
    config.progressive.randaug_magnitude = (5.0, 15.0)
    config.progressive.mixup_alpha = (0.0, 0.0)
    config.progressive.cutmix_alpha = (0.0, 0.0)
    config.progressive.size_multiple = 1
    config.progressive.order = "rising"
    config.progressive.num_draws = 1
    config.progressive.draw_seed = 0
    config.mixing = "per_example"  # mixing.mix

    # optimizers.make_optimizer
    config.optimizer = ConfigDict()
    config.optimizer.decay = 0.9
    config.optimizer.momentum = 0.9
    config.optimizer.epsilon = 1e-3
    config.optimizer.weight_decay = 1e-5
    config.optimizer.clip_norm = 0.0

    # optimizers.learning_rate_schedule, but for the first key
    config.learning_rate = ConfigDict()
    config.learning_rate.per_256_images = 0.016
    config.learning_rate.schedule = "exponential"
    config.learning_rate.warmup_epochs = 5.0
    config.learning_rate.decay_rate = 0.97
    config.learning_rate.decay_epochs = 2.4

    # memory.Fits: `auto`, a number, or one for each stage, as `1,1,2,4`.
    config.memory = ConfigDict()
    config.memory.micro_batches = "auto"
    config.memory.remat_groups = "auto"

    # losses.Loss
    config.loss = ConfigDict()
    config.loss.kind = "softmax"
    config.loss.label_smoothing = 0.1

    config.ema_decay = 0.9999

    # evaluate.Evaluator and, of image_size, its call; but for the last three keys
    config.eval = ConfigDict()
    config.eval.image_size = 384
    config.eval.crop = "released"
    config.eval.crop_fraction = config_dict.placeholder(float)  # Of `center`.
    config.eval.resize = "bilinear"
    config.eval.batch_size = 1024
    config.eval.every_epochs = 10.0
    config.eval.at_stage_size = False  # Evaluate at the stage's image size as well.
    # Training ends when the best evaluation is this old; 0 never. See train.selection_metric.
    config.eval.patience_epochs = 0.0

    # checkpoint.Checkpoints, but for the first key
    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep = 3

    config.log_every_steps = 100
    config.profile_steps = 0  # Steps to trace for TensorBoard's profiler.
    return config.lock()


# A resumed run may change these: they move no bit of the training, but for rounding.
RESUMABLE_CHANGES = (
    "parallel",
    # Sums in another order, as on another number of devices.
    "memory.micro_batches",
    "memory.remat_groups",
    "data.data_dir",
    "on_corrupt",  # A run that met no such image yet is the same with either.
    "eval.every_epochs",
    "checkpoint.every_epochs",
    "checkpoint.keep",
    "log_every_steps",
    "profile_steps",
)


def parse_argument(argument: str | None, **defaults: str) -> dict[str, str]:
    """Parses the part of `--config=FILE:ARGUMENT` behind the colon.

    Args:
      argument: values separated by commas, or None. `key=value` names its key; a value alone
        belongs to the first key that has none yet, so `b4,recipe=paper` is `variant=b4,...`.
      **defaults: the keys that the file takes in order, with their defaults.

    Raises:
      InputError: a key that the file does not take or is given twice, or too many values.
    """
    given: dict[str, str] = {}
    for part in filter(None, (argument or "").split(",")):
        if not defaults:
            raise InputError(f"config argument {part!r}: this file takes none.")
        key, equals, value = part.partition("=")
        if not equals:
            free = [name for name in defaults if name not in given]
            if not free:
                raise InputError(
                    f"config argument {part!r} is one too many: the file takes "
                    f"{','.join(f'{k}={v}' for k, v in defaults.items())}."
                )
            key, value = free[0], part
        if key not in defaults:
            raise unknown_name("config argument", key, defaults)
        if key in given:
            raise InputError(f"config argument {key!r} is given twice: give it once.")
        given[key] = value
    return {**defaults, **given}


def is_yes(values: Mapping[str, str], key: str) -> bool:
    """What an argument of `parse_argument` says that is `yes` or `no`.

    Raises:
      InputError: it is neither.
    """
    if values[key] not in ("no", "yes"):
        raise InputError(f"{key}={values[key]}: it must be yes or no.")
    return values[key] == "yes"


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as it stands in JSON: dicts, lists, strings, numbers and None."""
    return json.loads(json.dumps(config.to_dict()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every number that follows from a configuration and its data set.

    Attributes:
      num_train_examples: in one epoch.
      num_eval_examples: each is counted once by an evaluation.
      num_classes: width of the logits.
      steps_per_epoch: examples / batch size, not rounded: no example is dropped.
      total_steps: length of training.
      peak_learning_rate: for the whole global batch.
      eval_every_steps: evaluation also follows each stage.
      checkpoint_every_steps: a checkpoint also follows the last step.
      patience_steps: training ends when the best evaluation is this old; 0: never.
      stages: of progressive learning.
    """

    num_train_examples: int
    num_eval_examples: int
    num_classes: int
    steps_per_epoch: float
    total_steps: int
    peak_learning_rate: float
    eval_every_steps: int
    checkpoint_every_steps: int
    patience_steps: int
    stages: tuple[Stage, ...]

    @property
    def use_mixing(self) -> bool:
        """Whether any stage mixes examples."""
        return any(s.mixup_alpha > 0 or s.cutmix_alpha > 0 for s in self.stages)

    def remaining_cost(self, step: int) -> float:
        """Work left after `step` steps, in pixels of image side squared times steps."""
        return sum(
            max(0, stage.last_step - max(step, stage.first_step)) * float(stage.image_size**2)
            for stage in self.stages
        )


def make_plan(
    config: ConfigDict, *, num_train_examples: int, num_eval_examples: int, num_classes: int
) -> Plan:
    """Derives every number of a run.

    Args:
      config: as `base_config` has it.
      num_train_examples: of the data set.
      num_eval_examples: of the data set.
      num_classes: of the data set.

    Raises:
      InputError: a value that no run can have.
    """
    for key in ("batch_size", "num_epochs", "log_every_steps", "eval.image_size"):
        _check_positive(config, key)
    for key in ("eval.batch_size", "eval.every_epochs", "checkpoint.every_epochs"):
        _check_positive(config, key)
    if config.min_steps < 0 or config.eval.patience_epochs < 0:
        raise InputError(
            f"min_steps {config.min_steps} and eval.patience_epochs "
            f"{config.eval.patience_epochs} must be 0 or more."
        )
    if not 0.0 <= config.ema_decay < 1.0:
        raise InputError(f"ema_decay is {config.ema_decay}: it must be at least 0 and below 1.")
    steps_per_epoch = num_train_examples / config.batch_size
    total_steps = max(config.min_steps, int(config.num_epochs * steps_per_epoch))
    return Plan(
        num_train_examples=num_train_examples,
        num_eval_examples=num_eval_examples,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        peak_learning_rate=config.learning_rate.per_256_images * config.batch_size / 256,
        eval_every_steps=max(1, round(config.eval.every_epochs * steps_per_epoch)),
        checkpoint_every_steps=max(1, round(config.checkpoint.every_epochs * steps_per_epoch)),
        patience_steps=round(config.eval.patience_epochs * steps_per_epoch),
        stages=make_stages(total_steps, **config.progressive),
    )


def _check_positive(config: ConfigDict, key: str) -> None:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    if not 0 < value < math.inf:
        raise InputError(f"{key} is {value}: it must be above 0 and finite.")
