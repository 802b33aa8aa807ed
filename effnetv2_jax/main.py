"""The door: `python -m effnetv2_jax.main --config=configs/s.py --workdir=DIR`.

Reads flags, sets up logging, trains. Exit status: 0 complete, 2 bad input or a diverged loss,
128 + N stopped by signal N after a checkpoint (start again to go on).
"""

from __future__ import annotations

import sys

from absl import flags, logging
from absl.logging import converter
from ml_collections import config_flags

from effnetv2_jax import command_line

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines `--config` and `--workdir`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, for instance configs/s.py or configs/s.py:recipe=released.",
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run: results go there, and it resumes there."
    )


def main(arguments: list[str]) -> int:
    """Trains what the flags say."""
    del arguments
    logging.set_verbosity(logging.INFO)
    warning = converter.absl_to_standard(logging.WARNING)
    # Orbax logs each thread of each save at INFO; its warnings stay.
    logging.get_absl_handler().python_handler.addFilter(
        lambda record: record.levelno >= warning or "orbax" not in record.pathname
    )
    # TensorFlow and JAX take seconds to import; bad flags should not wait for them.
    from effnetv2_jax.train import Interrupted, train_and_evaluate

    try:
        train_and_evaluate(FLAGS.config, FLAGS.workdir)
    except Interrupted as interruption:
        print(f"{interruption}; start again to go on.", file=sys.stderr)
        return 128 + interruption.signum
    return 0


if __name__ == "__main__":
    command_line.run(
        main,
        define_flags,
        required=("config", "workdir"),
        usage="python -m effnetv2_jax.main --config=configs/digits.py --workdir=DIR",
    )
