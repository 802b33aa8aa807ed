"""Large arrays in large pages.

The C library takes large arrays from the system anew each time, and the system clears them 4 KB
at a time: on a CPU that is a third of a training step (experiments/speed). Since glibc 2.35 it
can ask for pages of 2 MB instead, but decides so once, when a process starts.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment_with_huge_pages(on: bool = True) -> dict[str, str] | None:
    """The environment that a process has to start with, or None where nothing is to be gained.

    That is: another C library, a kernel that never gives huge pages or always does, or a choice
    that the user has made in `GLIBC_TUNABLES`.

    Args:
      on: whether the process is to have huge pages; False makes that choice for it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not _has_tunable() or "[madvise]" not in _kernel_setting():
        return None
    return {
        **os.environ,
        "GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{TUNABLE}={int(on)}"))),
    }


def restart_with_huge_pages() -> None:
    """Replaces this process by the same command in that environment, if it is a command of ours.

    The process keeps its number, files and parent. Call it before anything is imported that
    takes time.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_command = spec is not None and spec.name.partition(".")[0] == __package__
    environment = environment_with_huge_pages()
    if is_command and environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


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
