"""What can go wrong, with the exit code that says so.

Each error names the thing, the value seen, the place and the remedy. `vertebra.cli` turns them into one
line on stderr and the exit code of the class; Python callers catch them by type.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class VertebraError(Exception):
    """Base of every error meant for the user; exit code 1."""

    exit_code = 1


class UsageError(VertebraError, ValueError):
    """A name, option or value that vertebra does not know; exit code 2."""

    exit_code = 2


class DataError(VertebraError, ValueError):
    """Data that cannot be read or fails its check; exit code 3."""

    exit_code = 3


class ParityError(VertebraError):
    """A converted or exported model does not reproduce its source; exit code 4."""

    exit_code = 4


class DivergedError(VertebraError):
    """A training's loss or gradient is not finite; the weights are as they were before that step. Exit code 1."""


class Preempted(VertebraError):
    """SIGTERM arrived and a good checkpoint was written; exit code 75, schedulers start the run again."""

    exit_code = 75


class Interrupted(VertebraError):
    """Ctrl-C arrived and a good checkpoint was written; exit code 130."""

    exit_code = 130


def near(word: str, known: Iterable[str], most: int = 3) -> str:
    """A clause that names the known words closest to `word`, or "" where none is close.

    >>> near("swim", ["swin", "dpn"])
    '; did you mean swin?'
    """
    spelling = {name.lower(): name for name in known}
    matches = [spelling[match] for match in get_close_matches(word.lower(), spelling, n=most, cutoff=0.5)]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
