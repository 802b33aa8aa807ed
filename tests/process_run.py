"""One of several processes of a run: `process_run.py INDEX COUNT PORT OVERRIDES WORKDIR`.

OVERRIDES is a JSON object of flat configuration keys.
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    index, count, port, overrides, workdir = sys.argv[1:]

    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))

    from effnetv2_jax.train import train_and_evaluate
    from tests.tiny import get_config

    config = get_config()
    config.update_from_flattened_dict(json.loads(overrides))
    train_and_evaluate(config, workdir)
