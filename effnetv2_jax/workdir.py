"""The working directory: what identifies a run, and the refusal to mix two of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from effnetv2_jax.config import RESUMABLE_CHANGES, Plan, to_plain
from effnetv2_jax.errors import InputError
from effnetv2_jax.parallel import on_first_process
from effnetv2_jax.paths import absolute, write_json

CONFIG = "config.json"
PLAN = "plan.json"
CLASSES = "classes.json"


def open_workdir(
    workdir: str | os.PathLike[str],
    config: ConfigDict,
    plan: Plan,
    class_names: Sequence[str] | None,
) -> epath.Path:
    """Creates a run's directory, or checks that the one there is of this run.

    Writes `config.json`, `plan.json` and, where class names are known, `classes.json`. A
    directory that is refused is left as it was.

    Raises:
      InputError: the directory holds another run, or files and no run.
    """
    path = absolute(workdir)

    def check_and_write() -> None:
        new_config, new_plan = to_plain(config), json.loads(json.dumps(dataclasses.asdict(plan)))
        try:
            _check(path, new_config, new_plan)
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / PLAN, new_plan)
            if class_names is not None:
                write_json(path / CLASSES, list(class_names))
            write_json(path / CONFIG, new_config)
        except InputError:
            raise
        except Exception as error:  # An OSError, or whatever a bucket's file system raises.
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise InputError(f"workdir {path} cannot be used ({reason}): name another.") from error

    on_first_process(check_and_write)
    return path


def read_class_names(workdir: epath.Path) -> list[str] | None:
    """The names of a run's classes in the order of its outputs, or None if it knew none."""
    path = workdir / CLASSES
    if not path.is_file():
        return None
    return list(json.loads(path.read_text(encoding="utf-8")))


def _check(path: epath.Path, config: dict[str, Any], plan: dict[str, Any]) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"workdir {path} is a file: name a folder.")
    if (path / CONFIG).exists():
        _check_same_run(path, config, plan)
    elif path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"workdir {path} is not empty and holds no run: name an empty or a new folder."
        )


def _check_same_run(path: epath.Path, config: dict[str, Any], plan: dict[str, Any]) -> None:
    try:
        old_config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        old_plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"workdir {path} holds a run whose {CONFIG} or {PLAN} cannot be read: "
            "name another folder."
        ) from error
    changes = [
        change
        for change in _differences(old_config, config)
        if change.split(":")[0] not in RESUMABLE_CHANGES
    ]
    if changes:
        raise InputError(
            f"workdir {path} holds a run with another config ({'; '.join(changes)}): name "
            "another folder, or start with the same config to resume."
        )
    examples = ("num_train_examples", "num_eval_examples", "num_classes")
    changes = _differences({k: old_plan.get(k) for k in examples}, {k: plan[k] for k in examples})
    if changes:
        raise InputError(
            f"the data set has changed since the run in {path} began ({'; '.join(changes)}): "
            "restore it, or name another folder."
        )


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [
            change
            for name in names
            for change in _differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else name
            )
        ]
    return [] if old == new else [f"{key}: {json.dumps(old)} -> {json.dumps(new)}"]
