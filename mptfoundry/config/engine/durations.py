"""Training durations in Composer's format: a number and a unit.

`1000ba` is a thousand batches, `3ep` three epochs, `1000000tok` a million tokens, `0.1dur` a tenth of the
run; a bare integer counts epochs.
"""

from __future__ import annotations

import re
from typing import Annotated

from mptfoundry.config.engine.forms import LARGEST, Form

UNITS = {
    "ep": "epochs",
    "ba": "batches",
    "sp": "samples",
    "tok": "tokens",
    "iter": "iterations",
    "sec": "seconds",
    "dur": "fractions of the run",
}
EXAMPLES = "a duration, such as 1000ba (batches), 2ep (epochs), 1000000tok (tokens) or 0.1dur (of the run)"
_FORM = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([a-z]+)\s*")


def parse_duration(value: int | str) -> tuple[float, str]:
    """Split a duration into number and unit; a bare integer counts epochs.

    The number is an int except for `dur`.

    Raises:
        ValueError: The text is not a duration; the message says what is allowed.
    """
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative. Expected {EXAMPLES}.")
        if value > LARGEST:
            raise ValueError(f"{value} is too large. Use {LARGEST} or less.")
        return value, "ep"
    match = _FORM.fullmatch(value.lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"'{value}' is not a duration. Expected {EXAMPLES}.")
    number = float(match[1].replace("_", ""))
    if number > LARGEST:
        raise ValueError(f"'{value}' is too large. Use {LARGEST} or less.")
    if match[2] == "dur":
        if number > 1:
            raise ValueError(f"'{value}' is more than the whole run, which is 1dur.")
        return number, "dur"
    if number % 1:
        raise ValueError(f"'{value}' is not a whole number of {UNITS[match[2]]}.")
    return int(number), match[2]


Duration = Annotated[int | str, Form(EXAMPLES, parse_duration)]
