"""The streams of a data mix: where each one is, how much to read, and whether it fits the run."""

from __future__ import annotations

import hashlib
import logging
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
from mptfoundry.ranks import rank
from mptfoundry.tokenizer import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardStream:
    """One stream and how to read it.

    Attributes:
        where: The stream's key in the config, for errors: `train_loader.dataset.streams.code`.
        arguments: Arguments of streaming's Stream; `remote` is None if the shards are read in place.
    """

    where: str
    arguments: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The local folder of the index and shards, after they are fetched."""
        return Path(self.arguments["local"]) / (self.arguments["split"] or "")


def plan_streams(loader: TextLoaderConfig, where: str) -> list[ShardStream]:
    """Decide where to read each stream from, and read the indexes that are on this machine.

    Raises:
        DataError: A local folder, its split or its index is missing, damaged or empty.
    """
    streams = sources_by_key(loader, where).items()
    return [_plan_stream(config, loader.dataset.split, key) for key, config in streams]


def read_stream(stream: ShardStream) -> ShardIndex:
    """Read a stream's index from its local folder, or from the folder it is copied from.

    Raises:
        DataError: The index is remote and has not been fetched.
    """
    remote = stream.arguments.get("remote")
    if remote and not is_url(remote):
        return read_index(Path(remote) / (stream.arguments["split"] or ""), stream.where)
    return read_index(stream.folder, stream.where)


def check_shards(stream: ShardStream, tokenizer: Any, max_seq_len: int) -> ShardIndex:
    """Check a stream's index against the run.

    Returns:
        The index. Its `meta` is None if another tool wrote the shards, and then nothing is checked.

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
    """Explain why an index's samples don't fit `max_seq_len`, and what to do; None if they fit."""
    if index.meta is None or index.meta.max_seq_len == max_seq_len:
        return None
    return (
        f"the samples of {index.folder} have {index.meta.max_seq_len} tokens, but "
        f"max_seq_len is {max_seq_len}. Set max_seq_len: {index.meta.max_seq_len}, or prepare again."
    )


def tokenizer_problem(index: ShardIndex, fingerprint: str) -> str | None:
    """Explain why an index doesn't fit the tokenizer with this fingerprint; None if it fits."""
    if index.meta is None or index.meta.fingerprint == fingerprint:
        return None
    return (
        f"{index.folder} was prepared with another tokenizer ({index.meta.tokenizer}, "
        f"{index.meta.vocab_size} ids) than this run's. Use that one, or prepare the text again."
    )


def warn_of_unknown(streams: Sequence[ShardStream]) -> None:
    """Warn on rank 0 about streams that can't be checked against the run's tokenizer."""
    if rank() == 0:
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
        arguments["local"] = str(_default_cache(f"{remote}\0{arguments['split']}"))
    return ShardStream(where, arguments)


def _default_cache(key: str) -> Path:
    """The folder for copies of a remote stream that names none.

    With streaming's default, a run fails to start if an earlier run left its folder behind.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / "mptfoundry-streams" / digest
