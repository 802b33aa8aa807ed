"""The door: `python -m effnetv2_jax.main --config=configs/s.py --workdir=DIR`.

Reads flags, sets up logging, trains. Exit status: 0 complete, 2 bad input or a diverged loss,
128 + N stopped by signal N after a checkpoint (start again to go on).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from absl.logging import converter
from ml_collections import config_flags

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "Configuration file, for instance configs/s.py or configs/s.py:recipe=released."
)
flags.DEFINE_string("workdir", None, "Folder of the run: results go there, and it resumes there.")


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; a mistake is one sentence and exit status 2."""
    try:
        for argument in arguments:
            _check_config_file(argument)
        rest = FLAGS(list(arguments))
        for name in ("config", "workdir"):
            if FLAGS[name].value is None:
                raise InputError(f"--{name} is missing: {FLAGS[name].help}")
        if len(rest) > 1:
            raise InputError(f"argument {rest[1]!r} is not a flag: flags start with --.")
        FLAGS.config.to_dict()  # Raises what went wrong while the file was loaded.
    except (
        InputError,
        flags.Error,
        AttributeError,  # ml_collections: a key that the config does not have.
        KeyError,
        TypeError,
        ValueError,
        OSError,  # The config file is not there.
        ImportError,
        SyntaxError,
    ) as error:
        fail(error)
    return rest


def _check_config_file(argument: str) -> None:
    """ml_collections reports a missing file only when the configuration is first read."""
    flag, equals, value = argument.partition("=")
    path = value.partition(":")[0]
    if equals and flag.lstrip("-") == "config" and not Path(path).is_file():
        raise InputError(f"config file {path!r} does not exist: name one, as configs/s.py.")


def fail(error: BaseException) -> None:
    """Prints a mistake as one line and exits with status 2."""
    text = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        # ml_collections passes its hint on as the repr of a string.
        text = text.strip("'").replace("\\n", " ").replace("\\'", "'")
    if "Traceback" in text:
        # ml_collections puts the trace of an error in a config file into its own message; the
        # last line is the error, behind the name of its type.
        last_line = text.strip().splitlines()[-1]
        text = last_line.partition(f"{InputError.__name__}: ")[2] or last_line
    command_line.fail(text)


def main(arguments: Sequence[str]) -> None:
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
    except InputError as error:
        fail(error)
    except Interrupted as interruption:
        print(f"{interruption}; start again to go on.", file=sys.stderr)
        sys.exit(128 + interruption.signum)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
