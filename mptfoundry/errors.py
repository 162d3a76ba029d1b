"""Errors that the user can fix.

Every error of this family is printed as its text alone, without a traceback (``MPTFOUNDRY_DEBUG=1``
shows one), and ends the command with its ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence


class MPTFoundryError(Exception):
    """Base of all errors whose text is written for the user.

    Attributes:
        of_this_machine: Other machines of the run may not have it, so that this process says it itself.
    """

    exit_code = 1
    of_this_machine = False


class ConfigError(MPTFoundryError):
    """One or more values of a configuration are wrong; all that were found are in ``problems``."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(MPTFoundryError):
    """Text, records or shards can't be read, or don't fit the run."""


class MissingError(DataError):
    """A file or folder of data that should lie on this machine does not; another machine may have it."""


class CheckpointError(MPTFoundryError):
    """A checkpoint or an exported folder is missing, damaged, or doesn't fit the model."""


class TrainingError(MPTFoundryError):
    """The training can't continue: its numbers are not finite, its loss left all bounds, a rank is silent."""


class RunStopped(Exception):
    """The run was asked to stop, and did; its text says how it continues. Schedulers start 143 again."""

    exit_code = 143


def first_line(error: BaseException) -> str:
    """What an error of another library says, for the end of a sentence of ours; its name if nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
