"""The page of differences is that of the configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnetv2_jax.tools import compare_recipes
from effnetv2_jax.tools.compare_recipes import PAGE, REASONS, RUNS, differences, page


def test_the_committed_page_is_up_to_date():
    committed = Path(__file__).parents[2] / PAGE
    assert committed.read_text(encoding="utf-8") == page()


def test_every_reason_has_its_difference():
    found = {key for make in RUNS.values() for key in differences(make)}
    assert found == set(REASONS)


def test_a_difference_without_a_reason_is_an_error(monkeypatch):
    monkeypatch.delitem(compare_recipes.REASONS, "model.bn_decay")
    with pytest.raises(KeyError, match=r"ImageNet-1k, S: the difference in model\.bn_decay"):
        page()


def test_differences_of_s():
    assert differences(RUNS["ImageNet-1k, S"])["progressive.randaug_magnitude"] == (
        [5.0, 15.0],
        [5.0, 10.0],
    )
