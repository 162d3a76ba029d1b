"""Which of many cases an ordinary run of the tests has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some_of(cases: Iterable[Any], keeps: Callable[[int], bool] = lambda number: number % 2 == 0) -> list[Any]:
    """The cases as parameters; those whose number isn't kept, every second one, are for `make soak`."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*row, marks=() if keeps(number) else pytest.mark.soak) for number, row in enumerate(rows)
    ]
