"""The paper's tables and figures, each against this project: `python -m experiments`."""

import os

# Nothing here computes on an accelerator, and the TPU compiler must not look for one. Before JAX is
# imported, wherever that happens first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
