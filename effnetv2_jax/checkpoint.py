"""Checkpoints: Orbax writes them in the background, checksums tell whether they are whole.

Layout: `DIRECTORY/<step>/` with Orbax's files and `checksums.json`. Orbax notices a truncated
file but restores a flipped byte silently, hence checksums of our own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from effnetv2_jax.errors import InputError
from effnetv2_jax.parallel import sum_over_processes, to_host, wait_for_all_processes
from effnetv2_jax.paths import absolute, files_below

CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one directory.

    Args:
      directory: created on the first save.
      keep: number of newest checkpoints to keep.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int):
        if keep < 1:
            raise InputError(f"checkpoint.keep is {keep}: it must be at least 1.")
        self.directory = absolute(directory)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._sealer: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def save(self, state: Any) -> None:
        """Starts writing a state; returns once its values are copied.

        A step that is already there is left alone: the same run reaches the same state.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        tree = flax.serialization.to_state_dict(state)
        if jax.process_count() > 1:
            # Orbax refuses the outputs of pmap on several processes; NumPy trees are fine.
            tree = to_host(tree)
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        self._sealer = threading.Thread(target=self._seal, args=(step,), name="checksums")
        self._sealer.start()

    def _seal(self, step: int) -> None:
        assert self._manager is not None
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_checksums(self.directory / str(step))

    def wait(self) -> None:
        """Waits until the last save is complete and sealed."""
        if self._sealer is not None:
            self._sealer.join()
            self._sealer = None
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore_newest(self, template: Any) -> Any | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones are reported and moved aside as `<step>.damaged`, so that training can write
        the step again.

        Args:
          template: a state of the same structure and shapes.

        Returns:
          The state with NumPy arrays, or None if there has never been a checkpoint.

        Raises:
          InputError: there are checkpoints and none is whole.
          OSError: some processes can read one and others cannot.
        """
        steps = self.steps()
        damaged = []
        for step in reversed(steps):
            path = self.directory / str(step)
            reason = ""
            try:
                state = read_checkpoint(path, template)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            if sum_over_processes(int(not reason)) % jax.process_count():
                # Not damaged, then, and going on from different steps would never end.
                raise OSError(
                    f"checkpoint {path} can be read by some processes alone"
                    f"{f', not by this one ({reason})' if reason else ''}: start again."
                )
            if reason:
                damaged.append(f"{step} ({reason})")
                logging.warning("Checkpoint %s is damaged: %s", path, reason)
                continue
            if damaged:
                logging.warning("Falling back to the checkpoint of step %d.", step)
                self._set_aside(steps, newer_than=step)
            return state
        if damaged:
            raise InputError(
                f"no checkpoint in {self.directory} can be read: {', '.join(damaged)}. Remove the "
                "folder to start again."
            )
        return None

    def _set_aside(self, steps: list[int], newer_than: int) -> None:
        wait_for_all_processes("damaged checkpoints are read")
        if jax.process_index() != 0:
            return
        for step in steps:
            if step > newer_than:
                names = (f"{step}.damaged{n or ''}" for n in itertools.count())
                free = next(n for n in names if not (self.directory / n).exists())
                (self.directory / str(step)).rename(self.directory / free)


def read_checkpoint(path: epath.Path, template: Any) -> Any:
    """Reads one checkpoint folder into the structure of `template`, as NumPy arrays.

    Raises:
      ValueError: a checksum differs, or Orbax cannot read the files.
    """
    verify_checksums(path)
    abstract = jax.tree.map(
        lambda a: np.empty(a.shape, a.dtype), flax.serialization.to_state_dict(template)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path / "default", abstract)
    return flax.serialization.from_state_dict(template, tree)


def read_parts(path: epath.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads some entries of a checkpoint's state, as trees of NumPy arrays.

    Unlike `read_checkpoint` it needs no template, and reads nothing else.

    Raises:
      ValueError: a checksum differs, or Orbax cannot read the files.
      KeyError: there is no such entry.
    """
    verify_checksums(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path / "default").item_metadata.tree
        parts = {name: stored[name] for name in names}
        arguments = ocp.args.PyTreeRestore(
            item=jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), parts),
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts),
            partial_restore=True,
        )
        return checkpointer.restore(path / "default", args=arguments)


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: epath.Path) -> None:
    """Writes the SHA-256 of every file of a checkpoint beside them, in one atomic step."""
    files = sorted(p for p in files_below(folder) if p.name != CHECKSUMS)
    digests = {str(p.relative_to(folder)): _digest(p) for p in files}
    temporary = folder / f".{CHECKSUMS}.tmp"
    temporary.write_text(json.dumps(digests, indent=1))
    temporary.replace(folder / CHECKSUMS)


def verify_checksums(folder: epath.Path) -> None:
    """Raises ValueError if a file is missing or differs from its checksum.

    A folder without checksums passes: the run was killed between Orbax's commit and ours.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return
    for name, digest in json.loads(path.read_text()).items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"file {name} is missing")
        if _digest(file) != digest:
            raise ValueError(f"the checksum of file {name} differs")
