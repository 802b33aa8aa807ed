"""Starting weights from another run: fine-tuning, and transfer to other data sets.

The moving averages of the other run are taken, as evaluation takes them. Every tensor but the
classifier must have its counterpart; nothing is skipped silently.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetv2_jax.checkpoint import read_parts
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.workdir import CONFIG, read_class_names

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
    init_head: str,
    class_names: Sequence[str] | None,
) -> InitialWeights:
    """Reads the averaged weights of a checkpoint of ours for a new network.

    Args:
      init_from: a workdir (its newest checkpoint is read) or one checkpoint in it, for instance
        `DIR/best/1000`.
      shapes: {'params', 'batch_stats'} of the new network, anything with `shape`.
      init_head: `auto`: the classifier is kept if the classes are the same, and new otherwise;
        `keep`: it must fit; `new`: random; `pick`: the columns of the new network's classes are
        picked by name out of a classifier that knows more of them (1,000 out of ImageNet-21k),
        and a class that it does not know gets a random one.
      class_names: of the new network, in the order of its outputs; None if not known.

    Raises:
      InputError: there is no such checkpoint, it is damaged, or it is of another network.
    """
    if init_head not in HEADS:
        raise unknown_name("init_head", init_head, HEADS)
    workdir, checkpoint = _find_checkpoint(Path(init_from).expanduser().absolute())
    try:
        parts = read_parts(checkpoint, ("ema_params", "ema_batch_stats"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"init_from: the checkpoint {checkpoint} cannot be read ({reason}): name another one."
        ) from error
    source = flatten_dict(
        {"params": parts["ema_params"], "batch_stats": parts["ema_batch_stats"]}, sep="/"
    )
    target = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}

    body = {name for name in source if not name.startswith(_HEAD)}
    _check_same_network(checkpoint, body, source, target)
    values = {name: source[name] for name in body}
    head = [name for name in target if name.startswith(_HEAD)]
    old_names = read_class_names(workdir)
    known: np.ndarray | None = None
    if init_head == "pick":
        columns = _columns(old_names, class_names, checkpoint)
        spare = target[head[0]][-1] - len(columns)  # Outputs that stand for no class.
        columns = np.pad(columns, (0, spare), constant_values=-1)
        known = columns >= 0
        values.update({name: source[name][..., np.maximum(columns, 0)] for name in head})
    elif _keeps_head(init_head, old_names, class_names, source, target, head, checkpoint):
        values.update({name: source[name] for name in head})
    new = tuple(sorted(set(target) - set(values)))
    unused = tuple(sorted(set(source) - set(values)))
    logging.info(
        "Weights from %s: %d tensors matched, %d new (%s), %d unused (%s).%s",
        checkpoint,
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


def _find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The workdir and the checkpoint folder that `path` names."""
    if (path / "default").is_dir():
        return path.parent.parent, path
    if not (path / CONFIG).is_file():
        raise InputError(
            f"init_from {str(path)!r} is neither a workdir nor a checkpoint of one: name a folder "
            f"that holds {CONFIG}, or DIR/checkpoints/STEP."
        )
    folder = path / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise InputError(f"init_from {str(path)!r} has no checkpoint yet: train it first.")
    return path, folder / str(max(steps))


def _check_same_network(
    checkpoint: Path, body: set[str], source: dict[str, Any], target: dict[str, tuple[int, ...]]
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
            f"init_from: the checkpoint {checkpoint} is of another network ({problems[0]}{more}): "
            "use the same config.model."
        )


def _columns(
    old_names: Sequence[str] | None, new_names: Sequence[str] | None, checkpoint: Path
) -> np.ndarray:
    """For each new class its column in the old classifier, or -1."""
    if old_names is None or new_names is None:
        which = "the checkpoint's" if old_names is None else "the data set's"
        raise InputError(
            f"init_head 'pick' goes by class names, and {which} are not known: use init_head=new."
        )
    places = {name: column for column, name in enumerate(old_names)}
    columns = np.array([places.get(name, -1) for name in new_names])
    if (columns < 0).all():
        raise InputError(
            f"init_head 'pick': the classifier of {checkpoint} knows none of the "
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
    checkpoint: Path,
) -> bool:
    if init_head == "new":
        return False
    fits = all(name in source and source[name].shape == target[name] for name in head)
    same = fits and (old_names is None or new_names is None or list(old_names) == list(new_names))
    if init_head == "keep" and not same:
        raise InputError(
            f"init_head 'keep': the classifier of {checkpoint} is for other classes than the "
            "data set's: use init_head=new or pick."
        )
    return same
