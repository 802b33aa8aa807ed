"""What the commands of `effnetv2_jax.tools` share: flags, and mistakes told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from effnetv2_jax.errors import InputError


def run(
    main: Callable[[list[str]], int | None],
    define_flags: Callable[[], None],
    *,
    num_arguments: tuple[int, int | None],
    usage: str,
) -> None:
    """Runs a command: `run(main, define_flags, num_arguments=(1, 1), usage="convert ...")`.

    Flags are defined here rather than on import, so that a notebook may import every command.

    Args:
      main: gets the arguments that are not flags, and returns the exit status (None: 0); an
        `InputError` of it becomes one line and exit status 2.
      define_flags: defines the flags that `main` reads from `flags.FLAGS`.
      num_arguments: the least and the most arguments that are not flags (None: any number).
      usage: an example, printed when there are too few or too many of them.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        define_flags()
        try:
            rest: list[str] = flags.FLAGS(list(arguments))
            least, most = num_arguments
            count = len(rest) - 1
            if count < least or (most is not None and count > most):
                raise InputError(f"{count} arguments are given: write for instance `{usage}`.")
        except (InputError, flags.Error) as error:
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


def fail(error: BaseException | str) -> NoReturn:
    """Prints a mistake as one line and exits with status 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
