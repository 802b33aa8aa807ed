"""Starting weights from another run or a model folder: fine-tuning, and transfer.

Every tensor but the classifier must have its counterpart; nothing is skipped silently.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models.network import Network
from effnetv2_jax.weights.model_folder import ModelSpec
from effnetv2_jax.weights.trained import load_trained

HEADS = ("auto", "keep", "new", "pick")
_HEAD = "params/classifier/"


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Tensors by name that replace a new network's.

    Attributes:
      values: `params/...` and `batch_stats/...` -> array of the new network's shape.
      new: tensors that keep their random initial values.
      unused: tensors of the source that have no place in the new network.
      known_classes: bool [classes]: those whose column of the classifier is in `values`; None
        if the classifier is replaced as a whole or not at all.
    """

    values: dict[str, np.ndarray]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    known_classes: np.ndarray | None = None

    def apply(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The variables {'params', 'batch_stats'} with the tensors replaced."""
        flat = flatten_dict(variables, sep="/")
        for name, value in self.values.items():
            if name.startswith(_HEAD) and self.known_classes is not None:
                value = np.where(self.known_classes, value, flat[name])
            flat[name] = value
        return unflatten_dict(flat, sep="/")


def load_initial_weights(
    init_from: str | os.PathLike[str],
    shapes: dict[str, Any],
    *,
    model: Network,
    mean: Sequence[float],
    std: Sequence[float],
    init_head: str,
    class_names: Sequence[str] | None,
) -> InitialWeights:
    """Reads trained weights for a new network, of a run the averaged ones.

    Args:
      init_from: what `weights.trained.load_trained` reads: a model folder, a workdir or one
        checkpoint in it.
      shapes: {'params', 'batch_stats'} of the new network, anything with `shape`.
      model: the new network.
      mean: that the new run subtracts from images, in grey levels.
      std: that it divides by.
      init_head: `auto`: the classifier is kept if the classes are the same, and new otherwise;
        `keep`: it must fit; `new`: random; `pick`: the columns of the new network's classes are
        picked by name out of a classifier that knows more of them (1,000 out of ImageNet-21k),
        and a class that it does not know gets a random one.
      class_names: of the new network, in the order of its outputs; None if not known.

    Raises:
      InputError: there are no such weights, they are damaged, or of another network.
    """
    if init_head not in HEADS:
        raise unknown_name("init_head", init_head, HEADS)
    spec, variables = load_trained(init_from)
    _check_same_arithmetic(init_from, spec, model, mean, std)
    source = flatten_dict(variables, sep="/")
    where = os.fspath(init_from)
    target = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}

    body = {name for name in source if not name.startswith(_HEAD)}
    _check_same_network(where, body, source, target)
    values = {name: source[name] for name in body}
    head = [name for name in target if name.startswith(_HEAD)]
    old_names = spec.classes
    known: np.ndarray | None = None
    if init_head == "pick":
        columns = _columns(old_names, class_names, where)
        spare = target[head[0]][-1] - len(columns)  # Outputs that stand for no class.
        columns = np.pad(columns, (0, spare), constant_values=-1)
        known = columns >= 0
        values.update({name: source[name][..., np.maximum(columns, 0)] for name in head})
    elif _keeps_head(init_head, old_names, class_names, source, target, head, where):
        values.update({name: source[name] for name in head})
    new = tuple(sorted(set(target) - set(values)))
    unused = tuple(sorted(set(source) - set(values)))
    logging.info(
        "Weights from %s: %d tensors matched, %d new (%s), %d unused (%s).%s",
        where,
        len(values),
        len(new),
        ", ".join(new) or "none",
        len(unused),
        ", ".join(unused) or "none",
        ""
        if known is None
        else f" Of the {len(known)} classes {known.sum()} were picked out of {len(old_names or ())}"
        f", {(~known).sum()} are new.",
    )
    return InitialWeights(values, new, unused, known)


def _check_same_arithmetic(
    init_from: str | os.PathLike[str],
    spec: ModelSpec,
    model: Network,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """What tensors do not show: the same weights compute something else with another padding."""
    for field in ("padding", "bn_epsilon", "stem_stride"):
        old, new = getattr(spec, field), getattr(model, field)
        if old != new:
            raise InputError(
                f"init_from: the weights in {os.fspath(init_from)!r} were trained with {field} "
                f"{old!r} and config.model.{field} is {new!r}: set --config.model.{field}={old}."
            )
    # The authors themselves go from 128 to 127.5 between pretraining and fine-tuning.
    if max(abs(a - b) for a, b in zip((*spec.mean, *spec.std), (*mean, *std), strict=True)) > 1:
        logging.warning(
            "The weights in %s were trained on images normalised by mean %s and std %s, and "
            "config.normalize has %s and %s: fine-tuning has to make up for it.",
            os.fspath(init_from),
            spec.mean,
            spec.std,
            tuple(mean),
            tuple(std),
        )


def _check_same_network(
    where: str, body: set[str], source: dict[str, Any], target: dict[str, tuple[int, ...]]
) -> None:
    wanted = {name for name in target if not name.startswith(_HEAD)}
    problems = [f"{name} is missing" for name in sorted(wanted - body)]
    problems += [f"{name} has no place" for name in sorted(body - wanted)]
    problems += [
        f"{name} has shape {source[name].shape} instead of {target[name]}"
        for name in sorted(body & wanted)
        if source[name].shape != target[name]
    ]
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise InputError(
            f"init_from: {where} is of another network ({problems[0]}{more}): "
            "use the same config.model."
        )


def _columns(
    old_names: Sequence[str] | None, new_names: Sequence[str] | None, where: str
) -> np.ndarray:
    """For each new class its column in the old classifier, or -1."""
    if old_names is None or new_names is None:
        which = "the weights'" if old_names is None else "the data set's"
        raise InputError(
            f"init_head 'pick' goes by class names, and {which} are not known: use init_head=new."
        )
    places = {name: column for column, name in enumerate(old_names)}
    columns = np.array([places.get(name, -1) for name in new_names])
    if (columns < 0).all():
        raise InputError(
            f"init_head 'pick': the classifier of {where} knows none of the "
            f"{len(columns)} classes ({new_names[0]}, ...): use init_head=new."
        )
    return columns


def _keeps_head(
    init_head: str,
    old_names: Sequence[str] | None,
    new_names: Sequence[str] | None,
    source: dict[str, Any],
    target: dict[str, tuple[int, ...]],
    head: list[str],
    where: str,
) -> bool:
    if init_head == "new":
        return False
    fits = all(name in source and source[name].shape == target[name] for name in head)
    same = fits and (old_names is None or new_names is None or list(old_names) == list(new_names))
    if init_head == "keep" and not same:
        raise InputError(
            f"init_head 'keep': the classifier of {where} is for other classes than the "
            "data set's: use init_head=new or pick."
        )
    return same
