"""Eight simulated devices, and compiled programs shared by all test processes."""

import os
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Frees a module's programs: all of them together need more maps than Linux allows (65,530)."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
