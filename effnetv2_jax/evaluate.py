"""Evaluation: every example counts exactly once, on any number of devices and hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effnetv2_jax.data.pipeline import check_evaluation, eval_batches
from effnetv2_jax.data.sources import Source
from effnetv2_jax.losses import Loss
from effnetv2_jax.memory import compile_within
from effnetv2_jax.parallel import AXIS, parallel_eval_step, split_batch, sum_over_processes
from effnetv2_jax.steps import make_eval_step


class Evaluator:
    """Evaluates sets of variables on held-out splits; one compilation per image size.

    Args:
      model: the network.
      splits: name -> source.
      loss: compares logits with labels.
      batch_size: global; rounded up to a multiple of the devices and down to what the largest
        split can fill, since the tail is padded and masked anyway.
      crop: the evaluation crop, see `data.preprocess.eval_crop`.
      crop_fraction: see there.
      resize: see there.
      mean: of each colour channel, in grey levels.
      std: likewise.
      on_corrupt: what an image that cannot be decoded does, see `data.pipeline.eval_batches`.
      parallel: how a step runs on all devices, a name of `parallel.FORMS`.

    Raises:
      InputError: an unknown crop or resize.
    """

    def __init__(
        self,
        model: Any,
        splits: Mapping[str, Source],
        *,
        loss: Loss,
        batch_size: int,
        crop: str,
        crop_fraction: float | None = None,
        resize: str,
        mean: Sequence[float],
        std: Sequence[float],
        on_corrupt: str = "raise",
        parallel: str = "pmap",
    ):
        check_evaluation(crop=crop, crop_fraction=crop_fraction, resize=resize)
        num_devices = jax.device_count()
        most = max(source.num_examples for source in splits.values())
        per_device = -(-min(batch_size, most) // num_devices)
        self.splits = splits
        self._batch_arguments = {
            "batch_size": per_device * num_devices,
            "num_classes": model.num_classes,
            "crop": crop,
            "crop_fraction": crop_fraction,
            "resize": resize,
            "on_corrupt": on_corrupt,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        step = make_eval_step(model, mean=mean, std=std, loss=loss, axis_name=AXIS)
        self._step = parallel_eval_step(step, form=parallel)
        self._batches: dict[tuple[str, int], Any] = {}

    def compile(
        self,
        variables: dict[str, Any],
        image_size: int,
        label_shape: tuple[int, ...] = (),
        *,
        limit: int | None = None,
    ) -> None:
        """Compiles the evaluation of one image size, which otherwise its first call does.

        Args:
          variables: {'params', 'batch_stats'}, as `parallel.stand_in` has them.
          image_size: side of the square images, pixels.
          label_shape: of one example: () or (max_labels,).
          limit: bytes of a device's memory; None: unknown.

        Raises:
          DoesNotFit: it needs more memory than a device has.
        """
        count = self._batch_arguments["batch_size"] // jax.process_count()
        batch = {
            "image": np.zeros((count, image_size, image_size, 3), np.uint8),
            "label": np.zeros((count, *label_shape), np.int32),
            "mask": np.zeros(count, np.float32),
        }
        compile_within(self._step.lower(variables, split_batch(batch)), limit)

    def __call__(
        self, split: str, variables: Mapping[str, dict[str, Any]], image_size: int
    ) -> dict[str, float]:
        """Evaluates each set of variables in one pass over a split.

        Args:
          split: its name.
          variables: name -> {'params', 'batch_stats'}, placed by `parallel.replicate`.
          image_size: side of the square images, pixels.

        Returns:
          `NAME/loss`, `NAME/top1`, `NAME/top5` (fractions) and `NAME/num_examples`.

        Raises:
          RuntimeError: an example was lost or counted twice.
        """
        source = self.splits[split]
        key = (split, image_size)
        if key not in self._batches:
            self._batches[key] = eval_batches(
                source, image_size=image_size, **self._batch_arguments
            )
        batches = self._batches[key]
        totals: dict[str, dict[str, float]] = {name: {} for name in variables}
        pending: list[tuple[str, Any]] = []
        for batch in batches:
            sharded = split_batch(batch)
            launched = [(name, self._step(value, sharded)) for name, value in variables.items()]
            _add(totals, pending)
            pending = launched
        _add(totals, pending)

        skipped = sum_over_processes(batches.skipped)
        results = {}
        for name, sums in totals.items():
            count = round(sums["count"])
            if count + skipped != source.num_examples:
                raise RuntimeError(
                    f"evaluation counted {count} and skipped {skipped} of {source.num_examples} "
                    "examples"
                )
            for metric in ("loss", "top1", "top5"):
                results[f"{name}/{metric}"] = sums[metric] / count
            results[f"{name}/num_examples"] = float(count)
        return results


def _add(totals: dict[str, dict[str, float]], sums: list[tuple[str, Any]]) -> None:
    """Adds a batch's sums in float64, after the next batch was launched."""
    for name, values in sums:
        for metric, value in jax.device_get(values).items():
            totals[name][metric] = totals[name].get(metric, 0.0) + float(value)
