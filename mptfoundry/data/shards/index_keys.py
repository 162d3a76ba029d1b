"""Check the keys of an MDS folder's `index.json` and their types before anything else is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

Kind = Callable[[Any], bool]
# The allowed type of each key, in words and as a test.
Kinds = Mapping[str, tuple[str, Kind]]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


def _list_of(kind: Kind) -> Kind:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_INDEX: Kinds = {
    "version": ("2, the only one that is read", lambda value: type(value) is int and value == 2),
    "shards": ("a list of objects", _list_of(_is_object)),
}
_SHARD: Kinds = {
    "column_encodings": ("a list of text", _list_of(_is_text)),
    "column_names": ("a list of text", _list_of(_is_text)),
    "column_sizes": ("a list of counts and null", _list_of(_or_null(_is_count))),
    "compression": ("text or null", _or_null(_is_text)),
    "format": ("text", _is_text),
    "hashes": ("a list of text", _list_of(_is_text)),
    "raw_data": ("an object", _is_object),
    "samples": ("a count", _is_count),
    "size_limit": ("a count, text or null", _or_null(lambda value: _is_count(value) or _is_text(value))),
    "version": _INDEX["version"],
    "zip_data": ("an object or null", _or_null(_is_object)),
}
_FILE: Kinds = {
    "basename": ("text", _is_text),
    "bytes": ("a count", _is_count),
    "hashes": ("digests by algorithm", _is_hashes),
}
# The metadata that `prepare` adds to an index.
META_KINDS: Kinds = {
    **dict.fromkeys(("tokenizer", "fingerprint"), ("text", _is_text)),
    **dict.fromkeys(
        ("vocab_size", "max_seq_len", "documents", "samples", "tokens", "bytes", "dropped_tokens"),
        ("a count", _is_count),
    ),
    "eos_token_id": ("a count or null", _or_null(_is_count)),
    **dict.fromkeys(("options", "inputs"), ("an object", _is_object)),
}


def check_index_keys(content: Any) -> None:
    """Raise ValueError unless an index has the keys that streaming reads, with values of the right type."""
    check_keys(content, _INDEX, "it", others="kept")
    for number, shard in enumerate(content["shards"]):
        place = f"shards[{number}]"
        check_keys(shard, _SHARD, place)
        for part in ("raw_data", "zip_data"):
            if shard[part] is not None:
                check_keys(shard[part], _FILE, f"{place}.{part}")
        if len({len(shard[f"column_{what}"]) for what in ("names", "encodings", "sizes")}) > 1:
            raise ValueError(f"{place}: column_names, column_encodings and column_sizes differ in length")


def check_keys(
    value: Any, kinds: Kinds, place: str, *, others: Literal["kept", "refused"] = "refused"
) -> None:
    """Raise ValueError unless a value is an object with these keys, and no others unless those are kept."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {shortened(value)}, but must be an object")
    for key, (words, is_kind) in kinds.items():
        if key not in value:
            raise ValueError(f"{place} lacks the key {key!r}")
        if not is_kind(value[key]):
            raise ValueError(f"{place}: {key} is {shortened(value[key])}, but must be {words}")
    unknown = [key for key in value if key not in kinds]
    if unknown and others == "refused":
        raise ValueError(f"{place} has the unknown key {shortened(unknown[0])}")


def shortened(value: Any) -> str:
    """Format a value for an error."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
