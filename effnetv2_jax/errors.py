"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, told in one sentence: the value, the rule and the remedy.

    `effnetv2_jax.main` prints it without a stack trace and exits with status 2.
    """


def unknown_name(kind: str, value: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table, with its nearest neighbours.

    Args:
      kind: what is named, for instance `variant`.
      value: the name that was given.
      known: the names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if near:
        return InputError(f"unknown {kind} {value!r}: did you mean {' or '.join(near)}?")
    return InputError(f"unknown {kind} {value!r}: choose one of {', '.join(names)}.")
