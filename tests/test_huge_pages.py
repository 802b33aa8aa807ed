"""Commands start again with huge pages where that helps, and nothing else does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effnetv2_jax import huge_pages

ROOT = Path(__file__).parents[1]


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system on which huge pages help; a function that changes one thing about it."""
    setting = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", setting)

    def change(*, library="glibc 2.36", kernel="always [madvise] never", tunables=""):
        monkeypatch.setattr(os, "confstr", lambda name: library)
        setting.write_text(kernel)
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)

    change()
    return change


def test_other_tunables_and_variables_stay(system, monkeypatch):
    monkeypatch.setenv("ANOTHER", "value")
    system(tunables="glibc.malloc.check=0")
    environment = huge_pages.environment_with_huge_pages()
    assert environment == {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1",
    }
    assert environment["ANOTHER"] == "value"


def test_a_choice_is_replaced(system):
    system(tunables="glibc.malloc.hugetlb=1:glibc.malloc.check=0")
    without = huge_pages.environment_without_huge_pages()
    assert without["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=0"
    assert huge_pages.environment_without_choice()["GLIBC_TUNABLES"] == "glibc.malloc.check=0"


@pytest.mark.parametrize(
    "change",
    [
        {"library": "glibc 2.34"},
        {"library": "musl"},
        {"kernel": "[always] madvise never"},
        {"kernel": "always madvise [never]"},
        {"tunables": "glibc.malloc.hugetlb=0"},
    ],
    ids=str,
)
def test_nothing_is_done_where_nothing_is_gained(system, change):
    assert huge_pages.environment_with_huge_pages() is not None
    system(**change)
    assert huge_pages.environment_with_huge_pages() is None


def test_a_kernel_without_the_setting(system, monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", tmp_path / "none")
    assert huge_pages.environment_with_huge_pages() is None


def test_only_commands_start_again(system, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    huge_pages.restart_with_huge_pages()  # The main module is pytest's.
    # As `%run -m` of a notebook has it: the module is the main one, and the process another's.
    spec = importlib.util.find_spec("effnetv2_jax.main")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    huge_pages.restart_with_huge_pages()
    assert started == []
    command = ["-m", "effnetv2_jax.main", "--config=c.py"]
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    huge_pages.restart_with_huge_pages()
    ((program, arguments, _),) = started
    assert (program, arguments) == (sys.executable, [sys.executable, *command])


@pytest.mark.skipif(
    huge_pages.environment_with_huge_pages() is None, reason="huge pages do not help here"
)
def test_a_command_starts_again_once_with_its_arguments(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import os, sys\n"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], flush=True)\n"
        "raise ValueError('the end')\n"
    )
    flags = [f"--config={config}", f"--workdir={tmp_path}/a b"]
    run = subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.main", *flags],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "the end" in run.stderr
    assert run.stdout.splitlines() == [f"glibc.malloc.hugetlb=1 {flags}"]
