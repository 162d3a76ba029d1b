"""Errors that the user can fix.

The command prints only the text of such an error, without a traceback (``MPTFOUNDRY_DEBUG=1``
shows one), and exits with the error's ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence


class MPTFoundryError(Exception):
    """Base of all errors whose text is written for the user.

    Attributes:
        of_this_machine: Other machines of the run may not have this error, so this process reports it itself.
    """

    exit_code = 1
    of_this_machine = False


class ConfigError(MPTFoundryError):
    """One or more values of a config are wrong; ``problems`` lists all that were found."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(MPTFoundryError):
    """Text, records or shards can't be read, or don't fit the run."""


class MissingError(DataError):
    """A data file or folder is missing on this machine; another machine may have it."""


class CheckpointError(MPTFoundryError):
    """A checkpoint or an exported folder is missing, damaged, or doesn't fit the model."""


class AnotherModelError(CheckpointError):
    """A model of an architecture that is not MPT."""


class TrainingError(MPTFoundryError):
    """Training can't continue: numbers are not finite, the loss exploded, or a rank is silent."""


class Worse(MPTFoundryError):
    """A comparison with `fail_if=worse` found a model significantly worse than the first one."""

    exit_code = 3


class RunStopped(Exception):
    """The run stopped on request; the text says how to continue. Schedulers restart a job that exits 143."""

    exit_code = 143


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, to end a sentence of ours, or the error's type."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
