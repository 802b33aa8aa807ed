"""What every command shares: flags, and mistakes told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from effnetv2_jax.errors import InputError
from effnetv2_jax.huge_pages import restart_with_huge_pages

# What a mistake in a flag, or in the configuration that a flag names, raises.
_MISTAKES = (
    InputError,
    flags.Error,
    AttributeError,  # ml_collections: a key that the config does not have.
    KeyError,
    TypeError,
    ValueError,
    OSError,  # The config file is not there.
    ImportError,
    SyntaxError,
)


def run(
    main: Callable[[list[str]], int | None],
    define_flags: Callable[[], None],
    *,
    usage: str,
    num_arguments: tuple[int, int | None] = (0, 0),
    required: Sequence[str] = (),
) -> None:
    """Runs a command.

    Flags are defined here rather than on import, so that a notebook may import every command.

    Args:
      main: gets the arguments that are not flags, and returns the exit status (None: 0); an
        `InputError` of it becomes one line and exit status 2.
      define_flags: defines the flags that `main` reads from `flags.FLAGS`.
      usage: an example, printed when there are too few or too many arguments.
      num_arguments: the least and the most arguments that are not flags (None: any number).
      required: flags that have to be given.
    """
    restart_with_huge_pages()

    def parse(arguments: Sequence[str]) -> list[str]:
        define_flags()
        try:
            for argument in arguments:
                _check_config_file(argument)
            rest: list[str] = flags.FLAGS(list(arguments))
            for name in required:
                if flags.FLAGS[name].value is None:
                    raise InputError(f"--{name} is missing: {flags.FLAGS[name].help}")
            _check_arguments(rest[1:], num_arguments, usage)
            if "config" in flags.FLAGS:
                flags.FLAGS.config.to_dict()  # Raises what went wrong while the file was loaded.
        except _MISTAKES as error:
            fail(error)
        return rest

    def guarded(arguments: Sequence[str]) -> int | None:
        # JAX tells at INFO which backends it did not find.
        logging.set_verbosity(logging.WARNING)
        try:
            return main(list(arguments[1:]))
        except InputError as error:
            fail(error)

    app.run(guarded, flags_parser=parse)


def _check_arguments(
    arguments: Sequence[str], num_arguments: tuple[int, int | None], usage: str
) -> None:
    least, most = num_arguments
    if most == 0 and arguments:
        raise InputError(f"argument {arguments[0]!r} is not a flag: flags start with --.")
    if len(arguments) < least or (most is not None and len(arguments) > most):
        raise InputError(f"{len(arguments)} arguments are given: write for instance `{usage}`.")


def _check_config_file(argument: str) -> None:
    """ml_collections reports a missing file only when the configuration is first read."""
    flag, equals, value = argument.partition("=")
    path = value.partition(":")[0]
    if equals and flag.lstrip("-") == "config" and not Path(path).is_file():
        raise InputError(f"config file {path!r} does not exist: name one, as configs/s.py.")


def check_output_file(path: str) -> None:
    """Raises `InputError` unless a file can be at `path`, in which `~` is the home folder."""
    file = Path(path).expanduser().absolute()
    if not file.parent.is_dir():
        raise InputError(f"the folder of {path!r} does not exist: make it first.")
    if file.is_dir():
        raise InputError(f"{path!r} is a folder: name a file.")


def fail(error: BaseException) -> NoReturn:
    """Prints a mistake as one line and exits with status 2."""
    tell(error)
    sys.exit(2)


def tell(error: BaseException) -> None:
    """Prints a mistake as one line."""
    text = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        # ml_collections passes its hint on as the repr of a string.
        text = text.strip("'").replace("\\n", " ").replace("\\'", "'")
    if "Traceback" in text:
        # ml_collections puts the trace of an error in a config file into its own message; the
        # last line is the error, behind the name of its type.
        last_line = text.strip().splitlines()[-1]
        text = last_line.partition(f"{InputError.__name__}: ")[2] or last_line
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
