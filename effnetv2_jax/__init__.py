"""EfficientNetV2 and its progressive learning in JAX.

Names are loaded on first use, so importing the package is quick and never loads TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Predictor": "effnetv2_jax.prediction",
    "create_model": "effnetv2_jax.models.create",
    "export_model": "effnetv2_jax.weights.export",
    "list_variants": "effnetv2_jax.models.specs",
    "load_model": "effnetv2_jax.weights.model_folder",
    "make_plan": "effnetv2_jax.config",
    "save_model": "effnetv2_jax.weights.model_folder",
    "train_and_evaluate": "effnetv2_jax.train",
    "InputError": "effnetv2_jax.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
