"""Plain YAML means what OmegaConf takes it for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mptfoundry.config.engine.plain_yaml import from_text, to_text

TEXTS = [
    *("1e-3", "1", "0x1f", "yes", "no", "null", "~", "nan", ".nan", "1_0", "1:30", "2020-01-01", "", "  x"),
    *("#x", "- a", "[a", "{a", "!x", "&a", "*a", "%a", "@a", "`a", "'a'", '"q"', "é", "\t", "a\nb", "a\n"),
    *("=", "<<", "1.", "-.5", "+.5e3", "1e5", "1E+5", "12e03", "5e1", "e5", "1e", "1e+", "0o7", "010", "y"),
    *(".inf", "-.INF", "a" * 200 + " b" * 100, "a #b", "True", "tRue", "a: b", "\x07"),
]
WRITTEN = ["1e-3", "1E5", ".5e-1", "-1_0e2", "2020-01-01", "yes", "0b1", "${a.b}", "1:30"]
NUMBERS = [1e-5, 1e300, 1e22, 0.1, -0.0, math.inf, 3, 10**29, True, None, [], {}, [[1, "2"], {"a": [1.5]}]]


@pytest.mark.parametrize("value", [*TEXTS, *NUMBERS], ids=repr)
def test_values_are_read_back_here_and_by_omegaconf(value: Any) -> None:
    text = to_text({"key": value})
    assert from_text(text) == {"key": value}
    assert OmegaConf.to_container(OmegaConf.create(text)) == {"key": value}


@pytest.mark.parametrize(
    "written", ["1e-3", "1E5", ".5e-1", "-1_0e2", "2020-01-01", "yes", "0b1", "${a.b}", "1:30"]
)
def test_what_somebody_wrote_is_what_omegaconf_reads(written: str) -> None:
    text = f"key: {written}"
    assert from_text(text) == OmegaConf.to_container(OmegaConf.create(text))


def test_what_is_not_yaml_is_an_error() -> None:
    for text in ("a: [", "[" * 20_000):
        with pytest.raises(yaml.YAMLError):
            from_text(text)
