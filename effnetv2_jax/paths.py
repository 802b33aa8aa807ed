"""Folders of a run, on a disk or in a bucket (`gs://bucket/run`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """A path that means the same from every folder; `~` is the home folder."""
    given = epath.Path(path)
    if is_remote(given):
        return given
    return epath.Path(os.path.abspath(given.expanduser()))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket: an object there is replaced as a whole, never added to."""
    return "://" in os.fspath(path)


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file of a folder and its subfolders."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole, or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
