"""`model.pretrained_model_name_or_path`: the model that is named there tells the architecture.

Its switches fill the `model` section before anything is checked. `config_overrides` change them; what the
section says itself has to agree, so that nothing is changed by accident.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mptfoundry.architecture.hub import locate, takes_a_hub_name
from mptfoundry.architecture.of_run import OWN, architecture_of, differing, leaves, takes_any_length
from mptfoundry.config.engine.document import Document, KeyPath, Origin, dotted
from mptfoundry.config.engine.schema import show
from mptfoundry.errors import CheckpointError, first_line
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.head_config import trunk_of

NAMED: KeyPath = ("model", "pretrained_model_name_or_path")
_OVERRIDES: KeyPath = ("model", "config_overrides")
_LENGTH: tuple[str, ...] = ("max_seq_len",)
_SIZES = (("d_model",), ("n_heads",), ("n_layers",), ("vocab_size",))
_ALIASES: dict[tuple[str, ...], tuple[str, ...]] = {("layer_norm_epsilon",): ("norm_eps",)}
# The sizes of published models, for a check that can't reach them: width, heads, layers, length. All have
# ALiBi, no biases and 50,432 rows of the vocabulary (their config.json on the hub).
PUBLISHED = {
    "mosaicml/mpt-7b": (4096, 32, 32, 2048),
    "mosaicml/mpt-7b-instruct": (4096, 32, 32, 2048),
    "mosaicml/mpt-7b-chat": (4096, 32, 32, 2048),
    "mosaicml/mpt-7b-8k": (4096, 32, 32, 8192),
    "mosaicml/mpt-7b-8k-instruct": (4096, 32, 32, 8192),
    "mosaicml/mpt-7b-8k-chat": (4096, 32, 32, 8192),
    "mosaicml/mpt-7b-storywriter": (4096, 32, 32, 65536),
    "mosaicml/mpt-30b": (7168, 64, 48, 8192),
    "mosaicml/mpt-30b-instruct": (7168, 64, 48, 8192),
    "mosaicml/mpt-30b-chat": (7168, 64, 48, 8192),
}


def fill_architecture(document: Document, lacking: dict[str, str] | None = None) -> list[str]:
    """Bring the architecture of the model that a document names (`NAMED`) into its `model` section, in place.

    Returns:
        Notes for the user: what was taken for what.
    """
    name: str = document.get(NAMED)
    notes: list[str] = []
    overrides = document.get(_OVERRIDES)
    named = _look_at(name, document, notes, lacking)
    _rename(name, document, notes if named is not None else [])
    written = leaves(overrides) if isinstance(overrides, dict) else {}
    if named is None:
        for path, value in written.items():
            document.put(("model", *_ALIASES.get(path, path)), value, document.origin(_OVERRIDES + path))
        return notes
    changes = {_ALIASES.get(path, path): value for path, value in written.items()}
    for path, expected, value in differing(named, document.tree["model"], changes):
        document.report(
            ("model", *path),
            f"{show(value)} is not what {name} says, {show(expected)}. Remove it, or change it with "
            f"config_overrides.{dotted(path)}.",
        )
        document.put(("model", *path), expected, document.origin(("model", *path)))
    _check_length(named, name, document, changes, notes)
    for path, value in written.items():
        document.put(("model", *_ALIASES.get(path, path)), value, document.origin(_OVERRIDES + path))
    for path, value in leaves(named.to_dict()).items():
        is_own = any(path[: len(own)] == own for own in OWN)
        if path not in changes and path != _LENGTH and not is_own and not document.has(("model", *path)):
            value = list(value) if isinstance(value, tuple) else value
            document.put(("model", *path), value, _told_by(document))
    return notes


def published_architecture(name: str) -> MPTConfig | None:
    """The architecture of a published model, without its weights; None if it is not in the table."""
    if name not in PUBLISHED:
        return None
    d_model, n_heads, n_layers, length = PUBLISHED[name]
    return MPTConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=n_layers,
        max_seq_len=length,
        vocab_size=50432,
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )


def _look_at(
    name: str, document: Document, notes: list[str], lacking: dict[str, str] | None
) -> MPTConfig | None:
    """The architecture of the model; None if it can't be read, which is a problem, or need not be.

    A section that says all of it, as a run's own `config.yaml` does, stands for a model on the hub or one
    that is gone: a resumed run does not need it. So does one that says its sizes, where
    the model can't be reached. Whoever reads the weights compares it. A check gives `lacking`, in which a
    model on the hub that can't be reached is described, by key: it is not a problem then.
    """
    try:
        is_here = Path(name).expanduser().exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        document.report(NAMED, f"{show(name)} can't be read: {reason}.")
        return None
    needed = [path for path, value in leaves(MPTConfig().to_dict()).items() if value is not None]
    if not is_here and all(document.has(("model", *path)) for path in needed):
        return None
    revision = document.get(("model", "revision"))
    try:
        folder = locate(name, None if revision is None else str(revision), config_only=True)
        config = trunk_of(architecture_of(folder))
    except CheckpointError as error:
        compared_later = document.get(("model", "pretrained")) is not False
        if not is_here and compared_later and all(document.has(("model", *size)) for size in _SIZES):
            return None
        if not is_here and lacking is not None and takes_a_hub_name(name):
            lacking[dotted(NAMED)] = str(error)
            return published_architecture(name)
        document.report(NAMED, str(error))
        return None
    if not is_here and revision != folder.name:
        origin = _told_by(document)
        document.put(("model", "revision"), folder.name, origin)
        notes.append(f"{origin.place}: model.revision: {name}'s {revision or 'main'} is {folder.name}.")
    return config


def _rename(name: str, document: Document, notes: list[str]) -> None:
    path: KeyPath = ("model", "name")
    if document.get(path) == "hf_causal_lm":
        origin = document.origin(path)
        document.put(path, "mpt_causal_lm", origin)
        notes.append(
            f"{origin.place}: model.name: hf_causal_lm is now mpt_causal_lm, since {name} is an MPT."
        )


def _check_length(
    named: MPTConfig, name: str, document: Document, changes: dict[tuple[str, ...], Any], notes: list[str]
) -> None:
    """The run's length may be another where positions allow it; learned positions have a last one."""
    length = changes.get(_LENGTH, document.get(_LENGTH))
    if not isinstance(length, int) or length == named.max_seq_len:
        return
    place: KeyPath = _OVERRIDES + _LENGTH if _LENGTH in changes else _LENGTH
    text = f"{length} is not the length of {name}, {named.max_seq_len}"
    if takes_any_length(named):
        if length > named.max_seq_len:
            text = f"{name} was made for {named.max_seq_len} tokens, this run has {length}."
            notes.append(f"{document.origin(place).place}: max_seq_len: {text}")
    elif named.has_learned_positions:
        document.report(
            place, f"{text}, which has a learned embedding for each position. Use {named.max_seq_len}."
        )
    elif _LENGTH not in changes:
        text += f", on which its rotary positions depend. Use {named.max_seq_len}, or say so with "
        document.report(place, f"{text}model.config_overrides.max_seq_len.")


def _told_by(document: Document) -> Origin:
    """The origin of what the model tells: the line that names it."""
    return replace(document.origin(NAMED), written=None, expression=None)
