"""Secrets in a configuration: known by their keys, or by their place in a URL, and replaced where shown.

A config is saved with its run and sent to loggers. Neither needs a secret: a run that starts takes it from
the user's own file or environment. A key is a secret's if a word of its name says so; the tokens of a
tokenizer are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

REDACTED = "<redacted>"

_SECRET = re.compile(
    r"token|secret|passw(or)?d|passphrase|api_?key|access_?key|private_?key|credential|webhook|bearer", re.I
)
_NO_SECRET = re.compile(
    r"tokenizer|tokens|token_(ids?|types?|encoding)|(bos|eos|pad|unk|sep|cls|mask|add)_\w*token|token_type|_token_\w*id",
    re.I,
)
_PASSWORD = re.compile(r"(\w[\w+.-]*://[^/\s:@]*):[^/\s@]+@")
_QUERY = re.compile(r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|key)|sig)=)[^&\s]+", re.I)


def redacted(value: Any, key: str = "") -> Any:
    """The same plain value, its secrets replaced by `<redacted>`.

    Args:
        value: Dicts, lists and plain values.
        key: The last key on the way to it.
    """
    if isinstance(value, dict):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET.search(key) and not _NO_SECRET.search(key):
        return REDACTED
    return _QUERY.sub(rf"\1{REDACTED}", _PASSWORD.sub(rf"\1:{REDACTED}@", value))


def redactions(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a configuration holds what stands for a secret, as the keys on the way."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from redactions(item, (*path, str(name)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from redactions(item, (*path, str(number)))
    elif isinstance(value, str) and REDACTED in value:
        yield path
