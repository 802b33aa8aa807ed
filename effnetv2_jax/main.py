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
    """Defines `--config`, `--workdir` and what several processes need to find each other."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, for instance configs/s.py or configs/s.py:recipe=released.",
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run: results go there, and it resumes there."
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT at which process 0 listens, the same for all processes. TPU pods, SLURM and "
        "Open MPI need neither this nor the next two.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes train together.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_integer(
        "start_timeout_seconds", 300, "How long this process waits for the others to come."
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        100,
        "A process that was silent for so long is dead, and the others end.",
    )


def main(arguments: list[str]) -> int:
    """Trains what the flags say."""
    del arguments
    warning = converter.absl_to_standard(logging.WARNING)
    # Orbax logs each thread of each save at INFO; its warnings stay.
    logging.get_absl_handler().python_handler.addFilter(
        lambda record: record.levelno >= warning or "orbax" not in record.pathname
    )
    # TensorFlow and JAX take seconds to import; bad flags should not wait for them.
    import jax

    from effnetv2_jax import processes

    processes.connect(
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        start_timeout_seconds=FLAGS.start_timeout_seconds,
        heartbeat_timeout_seconds=FLAGS.heartbeat_timeout_seconds,
    )
    with processes.leaving_on_failure():
        from effnetv2_jax.train import Interrupted, train_and_evaluate

        # One process tells people how it goes; the others speak up when something is wrong.
        is_first = jax.process_index() == 0
        logging.set_verbosity(logging.INFO if is_first else logging.WARNING)
        try:
            train_and_evaluate(FLAGS.config, FLAGS.workdir)
        except Interrupted as interruption:
            if is_first:
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
