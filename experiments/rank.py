"""How alike two rankings are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation over the pairs that are both known; NaN for fewer than three."""
    pairs = [
        (a, b) for a, b in zip(one, other, strict=True) if math.isfinite(a) and math.isfinite(b)
    ]
    if len(pairs) < 3:
        return math.nan
    ranks = [_ranks(values) for values in np.transpose(pairs)]
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value; equal ones share the mean of theirs."""
    smaller = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return smaller + (equal - 1) / 2
