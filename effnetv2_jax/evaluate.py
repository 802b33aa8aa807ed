"""Evaluation: every example counts exactly once, on any number of devices and hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effnetv2_jax.data.pipeline import check_eval_crop, eval_batches
from effnetv2_jax.data.sources import Source
from effnetv2_jax.parallel import AXIS, parallel_eval_step, split_batch
from effnetv2_jax.steps import make_eval_step


class Evaluator:
    """Evaluates sets of variables on a source; one compilation per image size.

    Args:
      model: the network.
      source: the held-out examples.
      batch_size: global; rounded up to a multiple of the devices and down to what the source
        can fill, since the tail is padded and masked anyway.
      crop: the evaluation crop, see `data.preprocess.eval_crop`.
      mean: of each colour channel, in grey levels.
      std: likewise.

    Raises:
      InputError: an unknown crop.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        *,
        batch_size: int,
        crop: str,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        check_eval_crop(crop)
        num_devices = jax.device_count()
        per_device = -(-min(batch_size, source.num_examples) // num_devices)
        self._batch_size = per_device * num_devices
        self._source = source
        self._num_classes = model.num_classes
        self._crop = crop
        self._step = parallel_eval_step(make_eval_step(model, mean=mean, std=std, axis_name=AXIS))
        self._batches: dict[int, Any] = {}

    def __call__(
        self, variables: Mapping[str, dict[str, Any]], image_size: int
    ) -> dict[str, float]:
        """Evaluates each set of variables in one pass over the data.

        Args:
          variables: name -> {'params', 'batch_stats'}, placed by `parallel.replicate`.
          image_size: side of the square images, pixels.

        Returns:
          `NAME/loss`, `NAME/top1`, `NAME/top5` (fractions) and `NAME/num_examples`.

        Raises:
          RuntimeError: an example was lost or counted twice.
        """
        if image_size not in self._batches:
            self._batches[image_size] = eval_batches(
                self._source,
                batch_size=self._batch_size,
                image_size=image_size,
                num_classes=self._num_classes,
                crop=self._crop,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        totals: dict[str, dict[str, float]] = {name: {} for name in variables}
        pending: list[tuple[str, Any]] = []
        for batch in self._batches[image_size]:
            split = split_batch(batch)
            launched = [(name, self._step(value, split)) for name, value in variables.items()]
            _add(totals, pending)
            pending = launched
        _add(totals, pending)

        results = {}
        for name, sums in totals.items():
            count = round(sums["count"])
            if count != self._source.num_examples:
                raise RuntimeError(
                    f"evaluation counted {count} of {self._source.num_examples} examples"
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
