"""Plan a preparation: options, tokenizer, inputs and folders. Also check if it is already done or started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.config.verbs import PrepareConfig
from mptfoundry.data.jobs import STATE, Job, read_state
from mptfoundry.data.prepare.encode import make_encoder
from mptfoundry.data.prepare.sink import ShardSink, SplitProgress
from mptfoundry.data.prepare.work import EncodingPlan
from mptfoundry.data.records.inputs import Inventory, find_inputs
from mptfoundry.data.records.records import UNIT_BYTES
from mptfoundry.data.shards.index import INDEX, PREPARING, ShardMeta, narrowest_dtype, read_index
from mptfoundry.data.shards.writer import ShardWriter
from mptfoundry.errors import DataError
from mptfoundry.tokenizer import (
    AS_TEXT,
    Borders,
    count_ids,
    document_borders,
    documents_in_words,
    fingerprint,
    load_tokenizer,
    own_borders,
    spelled,
)

# These options affect the bytes of the shards, so the index stores them.
OPTIONS = (
    *("max_seq_len", "split", "text_key", "held_out", "held_out_split"),
    *("hf_subset", "hf_split", "compression", "shard_bytes"),
)


@dataclass(frozen=True)
class Preparation:
    """One preparation of text.

    Attributes:
        config: The user's config.
        folders: Split -> folder, the main split first.
        options: Options that affect the bytes of the shards, as stored in the index.
        inventory: The inputs.
        encoding: How to encode the inputs.
        fingerprint: Fingerprint of the tokenizer.
        vocab_size: Number of ids of the tokenizer.
        in_words: Description of the special tokens around each document.
    """

    config: PrepareConfig
    folders: Mapping[str, Path]
    options: Mapping[str, Any]
    inventory: Inventory
    encoding: EncodingPlan
    fingerprint: str
    vocab_size: int
    in_words: str

    @property
    def folder(self) -> Path:
        """The folder of the main split."""
        return self.folders[self.config.split]

    @property
    def can_cut(self) -> bool:
        """Whether a long text may be encoded in pieces."""
        return make_encoder(self.encoding.tokenizer_json, self.encoding.dtype, self.encoding.as_text).can_cut

    @property
    def inputs(self) -> dict[str, Any]:
        """A summary of the inputs, for the index."""
        return {
            "given": list(self.config.inputs),
            "count": len(self.inventory.inputs),
            "bytes": self.inventory.size,
            "digest": self.inventory.digest(),
        }

    def meta(self, samples: int, dropped_tokens: int, documents: int, text_bytes: int) -> ShardMeta:
        """Return the metadata for the index of a finished split."""
        after = self.encoding.borders.after
        return ShardMeta(
            tokenizer=self.config.tokenizer,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            max_seq_len=self.config.max_seq_len,
            eos_token_id=after[-1] if after else None,
            documents=documents,
            samples=samples,
            tokens=samples * self.config.max_seq_len,
            bytes=text_bytes,
            dropped_tokens=dropped_tokens,
            options=self.options,
            inputs=self.inputs,
        )


def plan_preparation(config: PrepareConfig) -> Preparation:
    """Load the tokenizer, and find the inputs.

    Raises:
        ConfigError: The tokenizer can't be loaded.
        DataError: An input is invalid.
    """
    tokenizer: Any = load_tokenizer(config.tokenizer)
    borders = document_borders(tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)
    options = {name: getattr(config, name) for name in OPTIONS}
    options |= {"include": list(config.include), "exclude": list(config.exclude)}
    options["held_out_split"] = config.held_out_split if config.held_out else None
    # Older versions don't have this option, so it is stored only if it is not the default.
    if config.special_tokens != "as_tokens":
        options["special_tokens"] = config.special_tokens
    options |= _notes(borders, tokenizer)
    kinds = ("text_key", "include", "exclude", "hf_subset", "hf_split")
    inventory = find_inputs(config.inputs, **{key: getattr(config, key) for key in kinds})
    splits = [config.split, *([config.held_out_split] if config.held_out else [])]
    vocab_size = count_ids(tokenizer)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    encoding = EncodingPlan(
        tokenizer_json=tokenizer_json,
        dtype=narrowest_dtype(vocab_size),
        text_key=config.text_key,
        borders=borders,
        as_text=config.special_tokens == AS_TEXT,
        held_out=config.held_out,
        skip_bad_input=config.bad_input == "skip",
        datasets=inventory.datasets,
    )
    return Preparation(
        config=config,
        folders={split: Path(config.out).expanduser() / split for split in splits},
        options=options,
        inventory=inventory,
        encoding=encoding,
        fingerprint=fingerprint(tokenizer),
        vocab_size=vocab_size,
        in_words=documents_in_words(
            *(spelled(each, tokenizer) for each in (borders, own_borders(tokenizer)))
        ),
    )


def _notes(borders: Borders, tokenizer: Any) -> dict[str, Any]:
    """Describe the special tokens around documents, for the index.

    The usual ones are stored in the old format, because options are compared with those of finished folders.
    """
    notes: dict[str, Any] = {"add_bos": bool(borders.before), "add_eos": bool(borders.after)}
    usual = {side: {(), (getattr(tokenizer, f"{side}_token_id"),)} for side in ("bos", "eos")}
    if borders.before not in usual["bos"] or borders.after not in usual["eos"]:
        notes["borders"] = [list(side) for side in spelled(borders, tokenizer)]
    return notes


def find_finished(plan: Preparation) -> list[ShardMeta]:
    """Read the metadata of a finished preparation; empty if it is not finished.

    Raises:
        DataError: The folder was prepared with other options, tokenizer or inputs, or by another tool.
    """
    if not (plan.folder / INDEX).is_file() or _state_of(plan.folder) is not None:
        return []
    metas = []
    for folder in plan.folders.values():
        index = read_index(folder, str(folder))
        if index.meta is None:
            raise DataError(f"{folder}: another tool made these shards. Give another out folder.")
        _refuse_differences(
            folder,
            "was prepared",
            {**dict(index.meta.options), "tokenizer": index.meta.fingerprint, "inputs": index.meta.inputs},
            {**plan.options, "tokenizer": plan.fingerprint, "inputs": plan.inputs},
        )
        for entry in (shard["zip_data"] or shard["raw_data"] for shard in index.shards):
            path = folder / entry["basename"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path}: the shard is missing or cut short. Remove {folder} and prepare again."
                )
        metas.append(index.meta)
    return metas


def open_job(plan: Preparation) -> tuple[Job, ShardSink]:
    """Start a preparation, or resume one that was killed. The caller has locked its folders.

    Raises:
        DataError: The folder contains other files, or a preparation with other options or inputs.
    """
    options = {**plan.options, "unit_bytes": UNIT_BYTES, "cut_texts": plan.can_cut}
    inputs = {**plan.inputs, "digest": plan.inventory.digest(with_times=True)}
    identity = {"options": options, "tokenizer": plan.fingerprint, "inputs": inputs}
    state = _state_of(plan.folder)
    if state is not None:
        then = state.get("identity", {})
        _refuse_differences(
            plan.folder,
            "is half prepared",
            {**then.get("options", {}), "tokenizer": then.get("tokenizer"), "inputs": then.get("inputs")},
            {**options, "tokenizer": plan.fingerprint, "inputs": inputs},
        )
    splits = {}
    for name, folder in plan.folders.items():
        if state is None:
            _make_folder(folder)
        splits[name] = SplitProgress(
            ShardWriter(
                folder,
                dtype=plan.encoding.dtype,
                max_seq_len=plan.config.max_seq_len,
                shard_bytes=plan.config.shard_bytes,
                compression=plan.config.compression,
            )
        )
    id_bytes = np.dtype(plan.encoding.dtype).itemsize
    sink = ShardSink(plan.folder, splits, id_bytes, plan.config.max_seq_len, plan.meta)
    title = f"prepare {plan.config.split}"
    job = Job(plan.folder / PREPARING, title, plan.inventory.size, sink, identity)
    if state is None:
        sink.begin()
        job.save()
        return job, sink
    try:
        job.restore(state)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(plan.folder, error) from error
    return job, sink


def _state_of(folder: Path) -> dict[str, Any] | None:
    """Read the state of an unfinished preparation; None if there is none."""
    try:
        return read_state(folder / PREPARING)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> DataError:
    path = folder / PREPARING / STATE
    return DataError(f"{path} is damaged ({error!r}). Remove {folder} and start again.")


def _make_folder(folder: Path) -> None:
    """Create the folder, and refuse files in it.

    A preparation saves a state before its first shard, so without a state such files are not from a killed
    preparation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name != PREPARING)
    if others:
        raise DataError(
            f"{folder}: the folder is not empty ({others[0]}). Give another out folder, or remove this one."
        )
    (folder / PREPARING).mkdir(exist_ok=True)


def _refuse_differences(folder: Path, state: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = []
    # An option may be missing on one side: an older version didn't have it, or it is not stored by default.
    for key in {**now, **then}:
        before, value = then.get(key), now.get(key)
        if key == "inputs":
            if not before or before["digest"] != now[key]["digest"]:
                differences.append(f"inputs {_describe_inputs(before)} (now {_describe_inputs(now[key])})")
        elif key == "tokenizer":
            if before != value:
                differences.append("another tokenizer")
        elif key == "add_bos" and before != value:
            differences.append(
                f"{key}={before} (now {value}; the default is what the tokenizer does by itself)"
            )
        elif before != value:
            differences.append(f"{key}={before} (now {value})")
    if differences:
        raise DataError(
            f"{folder} {state} with {', '.join(differences)}. "
            f"Use the same options and inputs, give another out folder, or remove this one."
        )


def _describe_inputs(inputs: Mapping[str, Any] | None) -> str:
    return (
        f"of {inputs['count']} files, {inputs['bytes']:,} bytes, {inputs['digest'][:8]}"
        if inputs
        else "unknown"
    )
