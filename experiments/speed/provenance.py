"""Where and from what a row was measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[2]


def host() -> str:
    """The processor and the version of Python."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """Of the code that ran, `-dirty` if the package was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    is_changed = git("status", "--porcelain", "--", "effnetv2_jax")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if is_changed else "")
