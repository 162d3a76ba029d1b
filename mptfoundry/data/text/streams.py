"""The streams of a data mix: where each lies, how much of each is read, and whether it fits the run."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mptfoundry.config.data import TextLoaderConfig, sources_by_key
from mptfoundry.config.streams import StreamConfig
from mptfoundry.data.shards.index import ShardIndex, find_split, read_index
from mptfoundry.errors import DataError
from mptfoundry.places import is_url, path_of
from mptfoundry.tokenizer import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardStream:
    """One stream as it will be read.

    Attributes:
        where: Its key in the config, for errors: `train_loader.dataset.streams.code`.
        arguments: Those of streaming's Stream; remote is None if the shards are read in place.
    """

    where: str
    arguments: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its index and shards lie on this machine, once fetched."""
        return Path(self.arguments["local"]) / (self.arguments["split"] or "")


def plan_streams(loader: TextLoaderConfig, where: str) -> list[ShardStream]:
    """Decide where each stream is read from, and read the indexes that are on this machine.

    Args:
        loader: Its section of the config.
        where: The section's key, for errors.

    Raises:
        DataError: A local folder, its split or its index is missing, damaged or empty.
    """
    streams = sources_by_key(loader, where).items()
    return [_plan_stream(config, loader.dataset.split, key) for key, config in streams]


def read_stream(stream: ShardStream) -> ShardIndex:
    """The index of a stream, from this machine or from the folder that it is copied from.

    Raises:
        DataError: It lies elsewhere and has not been fetched.
    """
    remote = stream.arguments.get("remote")
    if remote and not is_url(remote):
        return read_index(Path(remote) / (stream.arguments["split"] or ""), stream.where)
    return read_index(stream.folder, stream.where)


def check_shards(stream: ShardStream, tokenizer: Any, max_seq_len: int) -> ShardIndex:
    """Compare what a stream's index says with the run.

    Returns:
        The index; its `meta` is None for shards of another maker, about which nothing is known.

    Raises:
        DataError: The shards were made for another sequence length or another tokenizer.
    """
    index = read_index(stream.folder, stream.where)
    if problem := length_problem(index, max_seq_len):
        raise DataError(f"{stream.where}: {problem}")
    if index.meta is not None and (problem := tokenizer_problem(index, fingerprint(tokenizer))):
        raise DataError(f"{stream.where}: {problem}")
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


def warn_of_unknown(streams: Sequence[ShardStream]) -> None:
    """Say once, on the first rank, which streams can't be compared with the run's tokenizer."""
    if streams and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: made by another tool, so the tokenizer can't be compared; only the ids' range is checked.",
            ", ".join(stream.where for stream in streams),
        )


def _plan_stream(config: StreamConfig, split: str | None, where: str) -> ShardStream:
    arguments = {key: value for key, value in asdict(config).items() if value is not None}
    arguments.setdefault("split", split)
    remote, local = config.remote, config.local
    place = config.place
    assert place is not None, "config asks for remote or local"
    origin = path_of(place)
    if origin is not None:
        read_index(find_split(origin, arguments["split"], where), where)
        kept = Path(local).expanduser() if local else origin
        arguments.update(remote=None if kept == origin else str(origin.absolute()), local=str(kept))
    elif not local:
        # Streaming's own default refuses to start when an earlier run left its folder behind.
        digest = hashlib.sha256(f"{remote}\0{arguments['split']}".encode()).hexdigest()[:16]
        arguments["local"] = str(Path(tempfile.gettempdir()) / "mptfoundry-streams" / digest)
    return ShardStream(where, arguments)
