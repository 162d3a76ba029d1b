"""llm-foundry's dialect: older layouts, translated; and what is not supported here, with the reason.

A translation moves values inside a document, before anything is checked, and leaves one line that says so.
What it removes had no effect on the numbers of a run. The tables are in legacy.yaml, all else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mptfoundry.architecture.dialects import FLAT_KEYS
from mptfoundry.config.engine.document import Document, KeyPath, dotted
from mptfoundry.config.engine.schema import field_types
from mptfoundry.config.run import TrainConfig

_TABLES: dict[str, dict[str, Any]] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"),
    Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
)
_MOVED = {**{f"model.{old}": f"model.{new}" for old, new in FLAT_KEYS.items()}, **_TABLES["moved"]}
# What a file that describes no training has in place of a model, and what to do with such a file.
OTHER_KINDS = _TABLES["other_kinds"]
# (class, key), (top section, its name) or (key, value) -> why.
REFUSED = {(owner, key): why for owner, table in _TABLES["refused"].items() for key, why in table.items()}


def translate(document: Document) -> list[str]:
    """Bring an older llm-foundry layout into today's, in place; return a line for each thing that changed."""
    notes: list[str] = []
    for section, name, translation in _OLD_NAMES:
        if document.get((section, "name")) == name:
            translation(document, notes)
    for path, translation in _TRANSLATIONS:
        if document.has(path):
            translation(document, notes)
    for loader in _loader_paths(document):
        for key, entry in _TABLES["dropped_from_loaders"].items():
            if document.has(loader + _path(key)):
                _drop(loader + _path(key), entry, document, notes)
    known = field_types(TrainConfig)
    if unknown := [k for k in document.tree if k not in known and ("TrainConfig", k) not in REFUSED]:
        top_level_variables(document, unknown, notes)
    return notes


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _loader_paths(document: Document) -> list[KeyPath]:
    loaders = document.get(("eval_loader",))
    indices = [(index,) for index in range(len(loaders))] if isinstance(loaders, list) else [()]
    return [("train_loader",), *(("eval_loader", *index) for index in indices)]


def _move(old: KeyPath, new: KeyPath, document: Document, notes: list[str]) -> None:
    origin, value = document.origin(old), document.get(old)
    if document.has(new):
        document.report(old, f"is the older name of {dotted(new)}, which is also given. Remove one.")
    else:
        document.put(new, value, origin)
        notes.append(f"{origin.place}: {dotted(old)} is now {dotted(new)}.")
    document.take(old)


def _drop(path: KeyPath, entry: Mapping[str, Any], document: Document, notes: list[str]) -> None:
    """Remove a key that had no effect; with `if`, only where it has that value."""
    value = document.get(path)
    if isinstance(value, dict) and value.keys() == {"name"}:
        value = value["name"]
    expected = entry.get("if")
    if "if" in entry and (value != expected or isinstance(value, bool) != isinstance(expected, bool)):
        return
    place = document.origin(path).place
    document.take(path)
    if path[-1] == "attn_scale":
        document.take(path[:-1])
    if "if" not in entry and (value is not None or path[0] == "algorithms"):
        notes.append(f"{place}: {dotted(path)} is left out: {entry['because']}.")


def _old_model_name(document: Document, notes: list[str]) -> None:
    name = ("model", "name")
    origin = document.origin(name)
    document.put(name, "mpt_causal_lm", origin)
    notes.append(f"{origin.place}: model.name: mosaic_gpt is now mpt_causal_lm.")


def _lion_in_8_bits(document: Document, notes: list[str]) -> None:
    """Its 8-bit momentum is ours in int8, with other groups; without `quantize` its numbers are float32."""
    name = ("optimizer", "name")
    origin, quantize = document.origin(name), document.get(("optimizer", "quantize"))
    document.put(name, "decoupled_lionw", origin)
    document.put(("optimizer", "momentum_dtype"), "float32" if quantize is False else "int8", origin)
    for key in ("quantize", "compress_state_dict", "error_correction"):
        if document.has(("optimizer", key)) and (
            key != "error_correction" or not document.get(("optimizer", key))
        ):
            document.take(("optimizer", key))
    dtype = document.get(("optimizer", "momentum_dtype"))
    notes.append(f"{origin.place}: decoupled_lionw_8b is now decoupled_lionw with momentum_dtype: {dtype}.")


def _low_precision_norm(document: Document, notes: list[str]) -> None:
    """The algorithm swaps layernorms for what MPT's default norm is already."""
    old, norm = ("algorithms", "low_precision_layernorm"), document.get(("model", "norm_type"))
    if norm is None or str(norm).startswith("low_precision"):
        because = f"model.norm_type is {norm or 'low_precision_layernorm'} already"
        _drop(old, {"because": because}, document, notes)


def _tasks_without_data(document: Document, notes: list[str]) -> None:
    """llm-foundry's finetuning files list tasks whose data the user is to fill in."""
    tasks = document.tree.get("icl_tasks")
    if isinstance(tasks, list) and all(isinstance(t, dict) and t.get("dataset_uri") is None for t in tasks):
        _drop(("icl_tasks",), {"because": "none of its tasks says where its data is"}, document, notes)


def _unmasked_packing(document: Document, notes: list[str]) -> None:
    """llm-foundry's packed examples see one another unless told otherwise: other mathematics than here."""
    switch = ("attn_config", "attn_uses_sequence_id")
    paths: list[KeyPath] = [("model", *switch), ("model", "config_overrides", *switch)]
    off = next((path for path in paths if document.get(path) is False), None)
    ratios = [document.get((*loader, "dataset", "packing_ratio")) for loader in _loader_paths(document)]
    if off and any(ratios):
        text = "is false, but packed examples never see one another here"
        note = f"{document.origin(off).place}: {dotted(off)} {text}."
        notes += [] if note in notes else [note]


def _local_checkpoints(document: Document, notes: list[str]) -> None:
    """The first FSDP's `local`: each rank saved its own part."""
    key = ("fsdp_config", "state_dict_type")
    if document.get(key) == "local":
        origin = document.origin(key)
        document.put(key, "sharded", origin)
        notes.append(f"{origin.place}: fsdp_config.state_dict_type: local is now sharded.")


def _multiquery(document: Document, notes: list[str]) -> None:
    old = ("model", "multiquery_attention")
    if isinstance(document.get(old), bool):
        origin = document.origin(old)
        kind = "multiquery_attention" if document.take(old) else "multihead_attention"
        document.put(("model", "attn_config", "attn_type"), kind, origin)
        notes.append(f"{origin.place}: model.multiquery_attention is now model.attn_config.attn_type.")


# Names of sections that stand for another name, and maybe other keys.
_OLD_NAMES: tuple[tuple[str, str, Callable[[Document, list[str]], None]], ...] = (
    ("model", "mosaic_gpt", _old_model_name),
    ("optimizer", "decoupled_lionw_8b", _lion_in_8_bits),
)
# What is done about a key where it is given, in this order.
_TRANSLATIONS: list[tuple[KeyPath, Callable[[Document, list[str]], None]]] = [
    *((_path(old), partial(_move, _path(old), _path(new))) for old, new in _MOVED.items()),
    *((_path(key), partial(_drop, _path(key), entry)) for key, entry in _TABLES["dropped"].items()),
    (_path("model.attn_config.attn_uses_sequence_id"), _unmasked_packing),
    (_path("model.config_overrides.attn_config.attn_uses_sequence_id"), _unmasked_packing),
    (_path("model.multiquery_attention"), _multiquery),
    (_path("fsdp_config.state_dict_type"), _local_checkpoints),
    (_path("icl_tasks"), _tasks_without_data),
    (_path("algorithms.low_precision_layernorm"), _low_precision_norm),
]


def top_level_variables(document: Document, keys: list[str], notes: list[str]) -> None:
    """Names at the top that only interpolations refer to, as before there was `variables`."""
    older = {"data_local", "data_remote", "global_seed", "tokenizer_name", "model_name", "max_split_size"}
    referred = {reference.split(".")[0].split("[")[0] for reference in document.references}
    for key in keys:
        if key not in older | referred:
            continue
        origin = document.origin((key,))
        value = document.take((key,))
        if key == "global_seed" and "seed" not in document.tree:
            document.put(("seed",), value, origin)
            notes.append(f"{origin.place}: global_seed is now seed.")
            continue
        document.put(("variables", key), value, origin)
        notes.append(f"{origin.place}: {key} is now variables.{key}, since only other values refer to it.")
