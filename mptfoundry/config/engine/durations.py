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
    """Split a duration into number and unit; a bare integer counts epochs. Only `dur` takes a fraction.

    Raises:
        ValueError: The text is not a duration; the message says what is allowed.
    """
    if isinstance(value, int) and 0 <= value <= LARGEST:
        return value, "ep"
    match = _FORM.fullmatch(str(value).lower())
    number, unit = (float(match[1].replace("_", "")), match[2]) if match else (-1.0, "")
    if unit == "dur" and number <= 1:
        return number, unit
    if unit in UNITS and unit != "dur" and number <= LARGEST and number % 1 == 0:
        return int(number), unit
    raise ValueError(_why_not_a_duration(value, number, unit))


def _why_not_a_duration(value: int | str, number: float, unit: str) -> str:
    if isinstance(value, int) and value < 0:
        return f"{value} is negative. Expected {EXAMPLES}."
    if isinstance(value, int):
        return f"{value} is too large. Use {LARGEST} or less."
    if unit not in UNITS:
        return f"'{value}' is not a duration. Expected {EXAMPLES}."
    if number > LARGEST:
        return f"'{value}' is too large. Use {LARGEST} or less."
    if unit == "dur":
        return f"'{value}' is more than the whole run, which is 1dur."
    return f"'{value}' is not a whole number of {UNITS[unit]}."


Duration = Annotated[int | str, Form(EXAMPLES, parse_duration)]
