"""Pages of experiments say what their rows say."""

from __future__ import annotations

import runpy
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_the_tables_of_tpu_compile_are_those_of_its_rows():
    page = (EXPERIMENTS / "tpu_compile/README.md").read_text(encoding="utf-8")
    tables = runpy.run_path(str(EXPERIMENTS / "tpu_compile/run.py"))["tables"]()
    assert len(tables) == 6
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, name


def test_the_tables_of_speed_are_those_of_its_rows():
    page = (EXPERIMENTS / "speed/README.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(EXPERIMENTS / "speed/run.py"))
    tables = script["tables"](script["read"]())
    assert len(tables) == 13
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, name
