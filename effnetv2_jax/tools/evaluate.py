"""Accuracy of trained weights: `python -m effnetv2_jax.tools.evaluate --model=DIR --data=NAME`.

The images are prepared as the weights demand, and each is counted once. Exit status: 0 done, 2 bad
input.
"""

from __future__ import annotations

import json
import os

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.errors import InputError
from effnetv2_jax.evaluate import Evaluator
from effnetv2_jax.losses import Loss
from effnetv2_jax.parallel import replicate, use_every_core
from effnetv2_jax.weights.trained import load_trained

FLAGS = flags.FLAGS


def evaluate_model(
    model: str | os.PathLike[str],
    data: str,
    *,
    data_dir: str | None = None,
    eval_split: str | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    on_corrupt: str = "raise",
) -> dict[str, float]:
    """Evaluates trained weights on a data set's evaluation split.

    Args:
      model: a model folder, a workdir or one of its checkpoints (the averaged weights).
      data: as `load_dataset` names it.
      data_dir: see there.
      eval_split: see there.
      batch_size: images at once, over all devices.
      dtype: of the activations.
      on_corrupt: what an image that cannot be decoded does, see `data.pipeline.eval_batches`.

    Returns:
      `loss`, `top1`, `top5` (fractions) and `num_examples`.

    Raises:
      InputError: bad input, or a data set of other classes than the weights'.
    """
    spec, variables = load_trained(model)
    dataset = load_dataset(data, data_dir=data_dir, eval_split=eval_split)
    classes = dataset.class_names
    if dataset.num_classes > spec.num_classes or (
        spec.classes and classes and tuple(classes) != spec.classes
    ):
        raise InputError(
            f"{data!r} has {dataset.num_classes} classes that are not the {spec.num_classes} of "
            f"{os.fspath(model)!r}: fine-tune the weights on it first."
        )
    evaluator = Evaluator(
        spec.create_model(dtype=dtype),
        {"eval": dataset.eval},
        loss=Loss(kind=spec.scores, label_smoothing=0.0),
        batch_size=batch_size,
        crop=spec.crop,
        crop_fraction=spec.crop_fraction,
        resize=spec.resize,
        mean=spec.mean,
        std=spec.std,
        on_corrupt=on_corrupt,
    )
    results = evaluator("eval", {"eval": replicate(variables)}, spec.eval_size)
    return {name.removeprefix("eval/"): value for name, value in results.items()}


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "Model folder, workdir or checkpoint.")
    flags.DEFINE_string("data", None, "Data set, as imagenet2012 or folder:/path.")
    flags.DEFINE_string("data_dir", None, "TFDS's folder of data sets; TFDS's own by default.")
    flags.DEFINE_string("eval_split", None, "Split to evaluate, of TFDS.")
    flags.DEFINE_integer("batch_size", 64, "Images at once, over all devices.")
    flags.DEFINE_string("dtype", "float32", "Type of the activations: float32 or bfloat16.")
    flags.DEFINE_string("on_corrupt", "raise", "Images that do not decode: raise or skip.")


def main(arguments: list[str]) -> None:
    """The command line; it prints one JSON object."""
    del arguments
    use_every_core()
    results = evaluate_model(
        FLAGS.model,
        FLAGS.data,
        data_dir=FLAGS.data_dir,
        eval_split=FLAGS.eval_split,
        batch_size=FLAGS.batch_size,
        dtype=FLAGS.dtype,
        on_corrupt=FLAGS.on_corrupt,
    )
    print(json.dumps(results))


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        required=("model", "data"),
        usage="python -m effnetv2_jax.tools.evaluate --model=DIR --data=imagenet2012",
    )
