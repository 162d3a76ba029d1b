from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from mptfoundry.config.engine.document import Document
from mptfoundry.config.engine.schema import describe, field_types
from mptfoundry.config.engine.signatures import (
    CALLBACKS,
    GIVEN,
    LOGGERS,
    NARROWED,
    REFUSED_CALLBACKS,
    REFUSED_LOGGERS,
    described,
    own_arguments,
    own_section,
)
from mptfoundry.config.engine.walk import build
from mptfoundry.errors import ConfigError

Problems = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize("where", sorted({*CALLBACKS.values(), *LOGGERS.values()}))
def test_signatures_read_from_sources_are_those_of_the_classes(where: str) -> None:
    module, _, name = where.partition(":")
    theirs = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    plain = [p for p in theirs if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    read = {argument.name: argument.default is MISSING for argument in fields(described(name, where))}
    given = GIVEN.get(where, ())
    assert {p.name: p.default is p.empty for p in plain if p.name not in given}.items() <= read.items()


def test_no_name_is_both_known_and_refused() -> None:
    assert not CALLBACKS.keys() & REFUSED_CALLBACKS.keys()
    assert not LOGGERS.keys() & REFUSED_LOGGERS.keys()


def test_narrower_types_are_of_arguments_that_exist() -> None:
    for where, types in NARROWED.items():
        assert types.keys() <= {argument.name for argument in fields(described("name", where))}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "callbacks: {speed_monitr: {}}",
            "callbacks.speed_monitr: is not known. Did you mean speed_monitor? Allowed: activation_monitor, ",
        ),
        (
            "callbacks: {speed_monitor: {windowsize: 3}}",
            "callbacks.speed_monitor.windowsize: unknown key. Did you mean window_size? speed_monitor takes "
            "window_size, gpu_flops_available, time_unit.",
        ),
        (
            "callbacks: {speed_monitor: {window_size: ten}}",
            "callbacks.speed_monitor.window_size: 'ten' is not allowed here. Expected a whole number.",
        ),
        (
            "callbacks: {early_stopper: {monitor: loss}}",
            "callbacks.early_stopper.dataloader_label: is missing. Expected text.",
        ),
        (
            "callbacks: {lr_monitor: {x: 1}}",
            "callbacks.lr_monitor.x: unknown key. lr_monitor takes no arguments.",
        ),
        (
            "callbacks: {lr_monitor: 3}",
            "callbacks.lr_monitor: 3 is not allowed here. Expected its arguments as a section; {} for none.",
        ),
        (
            "callbacks: [lr_monitor]",
            "callbacks: ['lr_monitor'] is not allowed here. Expected a section of callbacks by name.",
        ),
        (
            "algorithms: {gradient_clipping: {clipping_type: nrm, clipping_threshold: 1}}",
            "algorithms.gradient_clipping.clipping_type: 'nrm' is not allowed here. Did you mean norm? "
            "Expected norm or value.",
        ),
        (
            "loggers: {wandb: {tags: x}}",
            "loggers.wandb.tags: 'x' is not allowed here. Expected a list or null.",
        ),
    ],
)
def test_what_composers_classes_do_not_take_is_refused(problems: Problems, line: str, said: str) -> None:
    found = problems(line)
    assert len(found) == 1
    assert found[0].startswith(f"run.yaml:25: {said}")


@pytest.fixture
def annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type]:
    """The description of a class in a package on disk whose one argument has this annotation."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").touch()

    def describe_class(annotation: str) -> type:
        text = f"class Thing:\n    def __init__(self, value: {annotation}): ...\n"
        (tmp_path / "elsewhere" / "things.py").write_text(text)
        described.cache_clear()
        return described("thing", "elsewhere.things:Thing")

    return describe_class


@pytest.mark.parametrize(
    ("annotation", "value", "taken"),
    [
        ("int", 3, True),
        ("int", True, False),
        ("int", 3.5, False),
        ("float", 3, True),
        ("Optional[str]", None, True),
        ("str", None, False),
        ("Union[int, str, Time]", "3ba", True),
        ("Union[str, int, Time]", 3, True),
        ("str | int | None", 3, True),
        ("Optional[Union[str, Callable[[Any], Any]]]", [3], False),
        ("list[str]", ["a"], True),
        ("list[str]", "a", False),
        ("list[str]", [None], False),
        ("str | None", None, True),
        ("dict[str, Any]", {}, True),
        ("SomethingElse", [1], True),
    ],
)
def test_plain_annotations_are_checked_and_others_left_alone(
    annotated: Callable[[str], type], annotation: str, value: object, taken: bool
) -> None:
    schema, document = annotated(annotation), Document("x", {"value": value})
    if taken:
        assert build(schema, document).value == value  # type: ignore[attr-defined]
    else:
        with pytest.raises(ConfigError, match=r"is not allowed here|has no value"):
            build(schema, document)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("Optional[Union[str, Callable[[Any], Any]]]", "text or null"),
        ("Union[int, str, Time]", "a whole number, text or a duration"),
        ("Optional[Callable[[Any], str]]", "null"),
    ],
)
def test_annotations_are_described_in_words(
    annotated: Callable[[str], type], annotation: str, words: str
) -> None:
    assert describe(field_types(annotated(annotation))["value"]) == words


class Base:
    def __init__(self, first: object, size: int = 3, kind: Literal["a", "b"] = "a") -> None: ...


class Derived(Base):
    def __init__(self, first: object, *, rate: float, made: object = object(), **kwargs: Any) -> None: ...


def test_arguments_of_own_classes_are_those_of_the_objects() -> None:
    """Also those of the base class that `**kwargs` stands for, without defaults that YAML can't write."""
    section = own_section("own", Derived, None, 1)
    types = {name: describe(type_) for name, type_ in field_types(section).items()}
    assert list(types) == ["rate", "made", "size", "kind"]
    assert (types["rate"], types["size"], types["kind"]) == ("a number", "a whole number", "a or b")
    made = section(rate=0.5, kind="b")
    assert (made.size, made.made) == (3, None) and own_arguments(made) == {"rate": 0.5, "kind": "b"}
