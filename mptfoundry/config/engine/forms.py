"""Text formats, for fields whose type is more specific than `str`.

A field annotated `Annotated[int | str, Form(...)]` is checked by the form after its plain type. Errors and
explanations describe it in the form's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

# More tokens or bytes than any run has.
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Form:
    """The format of a value.

    Attributes:
        words: The format in words, as in `expected ...`.
        check: Raises ValueError for a value in another format.
    """

    words: str
    check: Callable[[Any], object]


def parse_bytes(value: int | str) -> int:
    """Parse bytes with a unit in powers of 1024, such as `100gb`.

    Raises:
        ValueError: The text is not a size.
    """
    units = {"": 1, "b": 1} | {f"{letter}b": 1024**i for i, letter in enumerate("kmgtp", 1)}
    return _scaled(value, units, "a size, such as 1000000 or 100gb")


def parse_count(value: int | str) -> int:
    """Parse a number with the suffix k, M, B or T, such as `64M`.

    Raises:
        ValueError: The text is not a number.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    return _scaled(value, units, "a number, such as 10000 or 64M")


def _scaled(value: int | str, units: dict[str, int], words: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(value).lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{value!r} is not allowed here. Expected {words}.")
    number = float(match[1]) * units[match[2]]
    if number > LARGEST:
        raise ValueError(f"{value!r} is too large. Use {LARGEST} or less.")
    return int(number)


def check_targets(value: str) -> None:
    """Raise ValueError unless `value` is a valid choice of prompts to train on."""
    if not re.fullmatch(r"none|all|length>=[1-9]\d*", value):
        raise ValueError(
            f"{value!r} is not allowed here. Expected none, all, or length>=N, such as length>=512."
        )


ByteSize = Annotated[int | str, Form("a size, such as 1000000 or 100gb", parse_bytes)]
SampleCount = Annotated[int | str, Form("a number, such as 10000 or 64M", parse_count)]
TokenType = Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
TargetPrompts = Annotated[str, Form("none, all, or length>=N, such as length>=512", check_targets)]
