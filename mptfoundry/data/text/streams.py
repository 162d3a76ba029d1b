"""The streams of a data mix: where each lies, how much of each is read, and whether it fits the run."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptfoundry.data.shards.index import ShardIndex, find_split, read_index
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.places import is_url, path_of
from mptfoundry.tokenizer import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One stream as it will be read.

    Attributes:
        where: What the user calls it, for errors: `train_loader.dataset.streams.code`.
        arguments: Those of streaming's Stream; remote is None if the shards are read in place.
    """

    where: str
    arguments: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its index and shards lie on this machine, once fetched."""
        return Path(self.arguments["local"]) / (self.arguments["split"] or "")


def plan_sources(
    streams: Mapping[str, Mapping[str, Any]] | None,
    remote: str | None,
    local: str | None,
    split: str | None,
    where: str,
) -> list[Source]:
    """Settle where each stream lies, and look at once if that is on this machine.

    Raises:
        ConfigError: It can't be told what to read.
        DataError: A local folder, its split or its index is missing, damaged or empty.
    """
    if streams and (remote or local):
        raise ConfigError(f"{where}.dataset: streams and remote/local are both given. Give one of them.")
    if not streams:
        return [_plan_source({"remote": remote, "local": local}, split, f"{where}.dataset")]
    sources = [
        _plan_source(stream, split, f"{where}.dataset.streams.{name}") for name, stream in streams.items()
    ]
    _check_weights(sources, where)
    return sources


def read_source(source: Source) -> ShardIndex:
    """The index of a stream, from this machine or from the folder that it is copied from.

    Raises:
        DataError: It lies elsewhere and has not been fetched.
    """
    remote = source.arguments.get("remote")
    if remote and not is_url(remote):
        return read_index(Path(remote) / (source.arguments["split"] or ""), source.where)
    return read_index(source.folder, source.where)


def check_shards(source: Source, tokenizer: Any, max_seq_len: int) -> ShardIndex:
    """Compare what a stream's index says with the run.

    Returns:
        The index; its `meta` is None for shards of another maker, about which nothing is known.

    Raises:
        DataError: The shards were made for another sequence length or another tokenizer.
    """
    index = read_index(source.folder, source.where)
    if problem := length_problem(index, max_seq_len):
        raise DataError(f"{source.where}: {problem}")
    if index.meta is not None and (problem := tokenizer_problem(index, fingerprint(tokenizer))):
        raise DataError(f"{source.where}: {problem}")
    return index


def length_problem(index: ShardIndex, max_seq_len: int) -> str | None:
    """Why the samples of an index do not fit a run of this length, and what to do; None if they do."""
    if index.meta is None or index.meta.max_seq_len == max_seq_len:
        return None
    return (
        f"the samples of {index.folder} have {index.meta.max_seq_len} tokens, but "
        f"max_seq_len is {max_seq_len}. Set max_seq_len: {index.meta.max_seq_len}, or prepare again."
    )


def tokenizer_problem(index: ShardIndex, fingerprint: str) -> str | None:
    """Why an index does not fit a run with the tokenizer of this fingerprint; None if it does."""
    if index.meta is None or index.meta.fingerprint == fingerprint:
        return None
    return (
        f"{index.folder} was prepared with another tokenizer ({index.meta.tokenizer}, "
        f"{index.meta.vocab_size} ids) than this run's. Use that one, or prepare the text again."
    )


def warn_of_unknown(sources: Sequence[Source]) -> None:
    """Say once, on the first rank, which streams can't be compared with the run's tokenizer."""
    if sources and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: made by another tool, so the tokenizer can't be compared; only the ids' range is checked.",
            ", ".join(source.where for source in sources),
        )


def _plan_source(stream: Mapping[str, Any], split: str | None, where: str) -> Source:
    arguments = {key: value for key, value in stream.items() if value is not None}
    arguments.setdefault("split", split)
    remote, local = arguments.get("remote"), arguments.get("local")
    if not remote and not local:
        raise ConfigError(f"{where}: neither local nor remote is given. Give local: a folder of shards.")
    origin = path_of(remote or local)
    if origin is not None:
        read_index(find_split(origin, arguments["split"], where), where)
        kept = Path(local).expanduser() if local else origin
        arguments.update(remote=None if kept == origin else str(origin.absolute()), local=str(kept))
    elif not local:
        # Streaming's own default refuses to start when an earlier run left its folder behind.
        digest = hashlib.sha256(f"{remote}\0{arguments['split']}".encode()).hexdigest()[:16]
        arguments["local"] = str(Path(tempfile.gettempdir()) / "mptfoundry-streams" / digest)
    return Source(where, arguments)


def _check_weights(sources: Sequence[Source], where: str) -> None:
    without = [source for source in sources if "proportion" not in source.arguments]
    if without and len(without) < len(sources):
        names = ", ".join(source.where.rsplit(".", 1)[-1] for source in without)
        raise ConfigError(
            f"{where}.dataset.streams: {names} has no proportion while others have one. "
            f"Give every stream a proportion, or none."
        )
    for source in sources:
        given = [key for key in ("proportion", "repeat", "choose") if key in source.arguments]
        if len(given) > 1:
            raise ConfigError(f"{source.where}: {' and '.join(given)} are both given. Give one of them.")
