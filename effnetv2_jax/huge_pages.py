"""Large arrays in large pages.

The C library takes large arrays from the system anew each time, and the system clears them 4 KB
at a time, which takes a good part of a training step on a CPU (experiments/fashion_mnist). Since
glibc 2.35 it can ask for pages of 2 MB instead, but decides so once, when a process starts.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment_with_huge_pages() -> dict[str, str] | None:
    """The environment that a process has to start with, or None where nothing is to be gained.

    That is: another C library, a kernel that never gives huge pages or always does, or a choice
    that the user has made in `GLIBC_TUNABLES`.
    """
    if TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if not _has_tunable() or "[madvise]" not in _kernel_setting():
        return None
    return _environment(f"{TUNABLE}=1")


def environment_without_huge_pages() -> dict[str, str]:
    """The environment in which a command of ours stays without them."""
    return _environment(f"{TUNABLE}=0")


def environment_without_choice() -> dict[str, str]:
    """The environment in which a command of ours decides anew."""
    return _environment()


def restart_with_huge_pages() -> None:
    """Replaces this process by the same command in that environment, if it is a command of ours.

    The process keeps its number, files and parent. Call it before anything is imported that
    takes time.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # Not where another program, as a notebook's kernel, runs the module within itself.
    is_command = spec is not None and ["-m", spec.name] == sys.orig_argv[1:3]
    environment = environment_with_huge_pages()
    if is_command and environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _environment(*choice: str) -> dict[str, str]:
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    others = [tunable for tunable in tunables if tunable and not tunable.startswith(TUNABLE)]
    return {**os.environ, "GLIBC_TUNABLES": ":".join((*others, *choice))}


def _has_tunable() -> bool:
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError):  # Not a system with glibc.
        return False
    version = re.fullmatch(r"glibc (\d+)\.(\d+).*", name)
    return version is not None and (int(version[1]), int(version[2])) >= (2, 35)


def _kernel_setting() -> str:
    try:
        return _KERNEL_SETTING.read_text(encoding="ascii")
    except OSError:
        return ""
