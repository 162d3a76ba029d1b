"""One pass over the rules of a section finds all problems, and none that follows from another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, broken_rules, only_one


@dataclass
class Box(Section):
    width: int = 1
    height: int = 1
    depth: int | None = None
    volume: int | None = None

    limits: ClassVar = {"width": Limits(1), "height": Limits(1)}

    def rules(self) -> Rules:
        yield only_one(self, "are both given. Use one of them.", "depth", "volume")
        yield self._shape()
        yield self._depth()

    def _shape(self) -> Iterator[Problem]:
        if self.area % self.width > 0 or self.height > 2 * self.width:
            yield "height", f"{self.height} is more than twice the width."

    def _depth(self) -> Iterator[Problem]:
        if self.depth is not None and self.depth > self.height:
            yield "depth", "is more than the height."

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass
class Lid(Box):
    def rules(self) -> Rules:
        yield from super().rules()
        yield self._flat()

    def _flat(self) -> Iterator[Problem]:
        if isinstance(self, Lid) and self.height > 1:
            yield "height", "a lid is flat."


def keys(values: dict[str, Any], cls: type = Box) -> list[str | tuple[str, ...]]:
    given = {"width": 1, "height": 1, "depth": None, "volume": None} | values
    return [key for key, _ in broken_rules(cls, {k: v for k, v in given.items() if v != "missing"})]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"height": 3, "depth": 4}, ["height", "depth"]),
        ({"depth": 0, "volume": 0}, [("depth", "volume")]),
        ({"width": 0, "height": 5, "depth": 9}, ["width", "depth"]),
        ({"width": 0, "height": 0}, ["width", "height"]),
        ({"width": "missing", "height": 5, "depth": 9}, ["depth"]),
        ({"height": "missing", "depth": 9, "volume": 1}, [("depth", "volume")]),
    ],
)
def test_each_rule_is_judged_by_the_fields_it_asks_for(
    values: dict[str, Any], expected: list[str | tuple[str, ...]]
) -> None:
    assert keys(values) == expected


def test_a_section_has_the_rules_of_the_one_it_extends() -> None:
    assert keys({"height": 2, "depth": 3}, Lid) == ["depth", "height"]


def test_a_section_that_is_made_by_hand_raises_its_first_problem() -> None:
    with pytest.raises(ValueError, match=r"^height: 3 is more than twice the width\.$"):
        Box(height=3, depth=4)
    with pytest.raises(ValueError, match=r"^depth and volume are both given\. Use one of them\.$"):
        Box(depth=1, volume=1)
