"""What one preparation is: options, tokenizer, inputs, folders; and whether it is the one of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.prepare.encode import TextEncoder
from mptfoundry.data.prepare.journal import Journal, SplitProgress, read_state
from mptfoundry.data.records.inputs import Inventory, find_inputs
from mptfoundry.data.records.records import UNIT_BYTES
from mptfoundry.data.shards.index import INDEX, PREPARING, ShardMeta, narrowest_dtype, read_index
from mptfoundry.data.shards.writer import ShardWriter
from mptfoundry.errors import DataError
from mptfoundry.tokenizer import (
    Borders,
    count_ids,
    document_borders,
    documents_in_words,
    fingerprint,
    load_tokenizer,
    own_borders,
    spelled,
)

COMPRESSIONS = ("br", "bz2", "snappy", "zstd")


@dataclass(frozen=True)
class Job:
    """One preparation.

    Attributes:
        folders: Split -> folder, the main split first.
        options: The arguments of `prepare` that decide about the bytes.
        inventory: What is read.
        given: The inputs as the user wrote them.
        tokenizer_name: As the user wrote it.
        tokenizer_json: Content of `tokenizer.json`.
        encoder: Of that tokenizer.
        fingerprint: Of that tokenizer.
        vocab_size: Number of its ids.
        borders: The ids before and after each document.
        in_words: What stands around each document, for people.
        skip_bad_input: Leave out what can't be read.
    """

    folders: Mapping[str, Path]
    options: Mapping[str, Any]
    inventory: Inventory
    given: Sequence[str]
    tokenizer_name: str
    tokenizer_json: str
    encoder: TextEncoder
    fingerprint: str
    vocab_size: int
    borders: Borders
    in_words: str
    skip_bad_input: bool

    @property
    def split(self) -> str:
        """Name of the main split."""
        return str(self.options["split"])

    @property
    def folder(self) -> Path:
        """Folder of the main split."""
        return self.folders[self.split]

    @property
    def dtype(self) -> str:
        """Unsigned integer type of the ids."""
        return narrowest_dtype(self.vocab_size)

    @property
    def id_bytes(self) -> int:
        """Bytes of an id."""
        return np.dtype(self.dtype).itemsize

    @property
    def inputs(self) -> dict[str, Any]:
        """What is read, for the index."""
        return {
            "given": list(self.given),
            "count": len(self.inventory.inputs),
            "bytes": self.inventory.size,
            "digest": self.inventory.digest(),
        }

    def meta(self, samples: int, dropped_tokens: int, documents: int, text_bytes: int) -> ShardMeta:
        """What the index of a finished split says."""
        max_seq_len = int(self.options["max_seq_len"])
        return ShardMeta(
            tokenizer=self.tokenizer_name,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            max_seq_len=max_seq_len,
            eos_token_id=self.borders.after[-1] if self.borders.after else None,
            documents=documents,
            samples=samples,
            tokens=samples * max_seq_len,
            bytes=text_bytes,
            dropped_tokens=dropped_tokens,
            options=self.options,
            inputs=self.inputs,
        )


def plan_job(
    given: Sequence[str], out: Path, tokenizer_name: str, options: Mapping[str, Any], bad_input: str
) -> Job:
    """Check the options, load the tokenizer, and find the inputs.

    Raises:
        ConfigError: The tokenizer can't be loaded.
        DataError: An option or an input won't do.
    """
    _check_options(options, bad_input)
    tokenizer: Any = load_tokenizer(tokenizer_name)
    borders = document_borders(tokenizer, add_bos=options["add_bos"], add_eos=options["add_eos"])
    options = {**options, **_notes(borders, tokenizer, options)}
    kinds = ("text_key", "include", "exclude", "hf_subset", "hf_split")
    inventory = find_inputs(given, **{key: options[key] for key in kinds})
    splits = [options["split"], *([options["held_out_split"]] if options["held_out"] else [])]
    vocab_size = count_ids(tokenizer)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    return Job(
        folders={split: out / split for split in splits},
        options=options,
        inventory=inventory,
        given=given,
        tokenizer_name=tokenizer_name,
        tokenizer_json=tokenizer_json,
        encoder=TextEncoder(tokenizer_json, narrowest_dtype(vocab_size), as_text="special_tokens" in options),
        fingerprint=fingerprint(tokenizer),
        vocab_size=vocab_size,
        borders=borders,
        in_words=documents_in_words(
            *(spelled(each, tokenizer) for each in (borders, own_borders(tokenizer)))
        ),
        skip_bad_input=bad_input == "skip",
    )


def _notes(borders: Borders, tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """How the options are kept in the index, so that shards tell what stands around their documents. What is
    as it always was is kept as it always was, since the options of finished folders are compared."""
    notes: dict[str, Any] = {"add_bos": bool(borders.before), "add_eos": bool(borders.after)}
    usual = {side: {(), (getattr(tokenizer, f"{side}_token_id"),)} for side in ("bos", "eos")}
    if borders.before not in usual["bos"] or borders.after not in usual["eos"]:
        notes["borders"] = [list(side) for side in spelled(borders, tokenizer)]
    return notes


def find_finished(job: Job) -> list[ShardMeta]:
    """What the indexes of the job's folders say, if it is finished; else nothing.

    Raises:
        DataError: The folder is finished, but was prepared in another way, or isn't ours.
    """
    if not (job.folder / INDEX).is_file() or read_state(job.folder) is not None:
        return []
    metas = []
    for folder in job.folders.values():
        index = read_index(folder, str(folder))
        if index.meta is None:
            raise DataError(f"{folder}: another tool made these shards. Give another out folder.")
        _refuse_differences(
            folder,
            "was prepared",
            {**dict(index.meta.options), "tokenizer": index.meta.fingerprint, "inputs": index.meta.inputs},
            {**job.options, "tokenizer": job.fingerprint, "inputs": job.inputs},
        )
        for entry in (shard["zip_data"] or shard["raw_data"] for shard in index.shards):
            path = folder / entry["basename"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path}: the shard is missing or cut short. Remove {folder} and prepare again."
                )
        metas.append(index.meta)
    return metas


def open_journal(job: Job) -> Journal:
    """Begin, or continue where a killed preparation of the same job was. The job's folders are locked.

    Raises:
        DataError: The folder holds something else, or a preparation with other options or inputs.
    """
    options = {**job.options, "unit_bytes": UNIT_BYTES, "cut_texts": job.encoder.can_cut}
    inputs = {**job.inputs, "digest": job.inventory.digest(with_times=True)}
    identity = {"options": options, "tokenizer": job.fingerprint, "inputs": inputs}
    state = read_state(job.folder)
    if state is not None:
        then = state.get("identity", {})
        _refuse_differences(
            job.folder,
            "is half prepared",
            {**then.get("options", {}), "tokenizer": then.get("tokenizer"), "inputs": then.get("inputs")},
            {**options, "tokenizer": job.fingerprint, "inputs": inputs},
        )
    splits = {}
    for name, folder in job.folders.items():
        if state is None:
            _make_folder(folder)
        splits[name] = SplitProgress(
            ShardWriter(
                folder,
                dtype=job.dtype,
                max_seq_len=job.options["max_seq_len"],
                shard_bytes=job.options["shard_bytes"],
                compression=job.options["compression"],
            )
        )
    journal = Journal(job.folder, identity, splits)
    if state is not None:
        journal.resume(state)
    else:
        journal.begin()
    return journal


def _make_folder(folder: Path) -> None:
    """Make the folder. A preparation saves a state before its first shard, so whatever lies there is not of
    one that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name != PREPARING)
    if others:
        raise DataError(
            f"{folder}: the folder is not empty ({others[0]}). Give another out folder, or remove that one."
        )
    (folder / PREPARING).mkdir(exist_ok=True)


def _refuse_differences(folder: Path, state: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = []
    # An option that has its usual value may not have been known then, or not be kept.
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
            f"Use the same options and inputs, give another out folder, or remove that one."
        )


def _describe_inputs(inputs: Mapping[str, Any] | None) -> str:
    return (
        f"of {inputs['count']} files, {inputs['bytes']:,} bytes, {inputs['digest'][:8]}"
        if inputs
        else "unknown"
    )


def _check_options(options: Mapping[str, Any], bad_input: str) -> None:
    max_seq_len, held_out = options["max_seq_len"], options["held_out"]
    if max_seq_len < 2:
        raise DataError(f"max_seq_len: {max_seq_len} leaves nothing to predict. Use 2 or more, such as 2048.")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out: {held_out} is not a share from 0 to 1. Use one such as 0.01.")
    for key in ("split", "held_out_split"):
        name = options[key]
        if name is not None and (not name or Path(name).name != name or name.startswith(".")):
            raise DataError(f"{key}: {name!r} is not the name of a folder. Use one such as train or val.")
    if options["split"] == options["held_out_split"]:
        raise DataError(f"held_out_split: it has the same name as split, {options['split']!r}. Use another.")
    if bad_input not in ("error", "skip"):
        raise DataError(f"bad_input: {bad_input!r} is not allowed. Use error or skip.")
    compression = options["compression"]
    if compression is not None and compression.split(":")[0] not in COMPRESSIONS:
        raise DataError(f"compression: {compression!r} is not allowed. Use one of {', '.join(COMPRESSIONS)}.")
