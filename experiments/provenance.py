"""Where and from what a row was measured."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[1]


@functools.cache
def host() -> str:
    """The processor and the version of Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """Of the code that ran, `-dirty` if the package was changed since; empty outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        is_changed = git("status", "--porcelain", "--", "effnetv2_jax", "configs")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if is_changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions(packages: Iterable[str]) -> str:
    """Of installed packages, as `jax 0.10.2, flax 0.12.8`."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
