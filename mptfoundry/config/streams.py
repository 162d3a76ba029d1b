"""One source of data, a stream of shards or of records: where it is, and how much of it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mptfoundry.config.engine.forms import check_at_least, check_not_empty
from mptfoundry.places import is_url

Amount = Literal["proportion", "repeat", "choose"]
AMOUNTS: tuple[Amount, ...] = get_args(Amount)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One source of the data mix.

    At most one of `proportion`, `repeat` and `choose` says how much of it is read; all streams of a
    data set use the same one.

    Attributes:
        remote: Folder or URL to download the shards from. Default: they are in `local` already.
        local: Folder of the shards, or the cache of `remote`.
        split: Subfolder of `remote` and `local`. Default: the data set's.
        proportion: Share of an epoch's samples; shares are relative to their sum.
        repeat: How often each sample is read per epoch, on average.
        choose: Samples read per epoch.
        download_retry: How often a failed download is retried. Default: the data set's.
        download_timeout: Seconds that a download may take. Default: the data set's.
        validate_hash: The hash to compare. Default: the data set's.
        keep_zip: Keep the compressed shard next to the decompressed one. Default: the data set's.
    """

    remote: str | None = None
    local: str | None = None
    split: str | None = None
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None
    download_retry: int | None = None
    download_timeout: float | None = None
    validate_hash: str | None = None
    keep_zip: bool | None = None

    def __post_init__(self) -> None:
        if self.remote is None and self.local is None:
            raise ValueError("neither remote nor local is given. A stream needs the folder of its shards.")
        check_not_empty(self, "remote", "local")
        check_remote(self.remote)
        check_at_least(self, download_retry=0, download_timeout=1)
        _check_amounts(self)

    @property
    def place(self) -> str | None:
        """Where it lies."""
        return self.remote or self.local


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """One source of records to finetune on.

    Attributes:
        hf_name: A file or folder of JSONL, Parquet or MDS shards, a folder that `datasets` saved, or the name
            of a data set on the Hugging Face hub, `NAME@REVISION` for a branch, tag or commit; or `json` or
            `parquet` with `hf_kwargs`.
        hf_kwargs: For files: `data_files` or `data_dir`. For the hub: arguments of `datasets.load_dataset`.
        local: A file or folder as in `hf_name`; or the folder for a copy of `remote`.
        remote: URL of MDS shards.
        split: Subfolder, word in the file names, or split of a data set.
        preprocessing_fn: The names of two columns, such as `{prompt: question, response: answer}`; or
            `module:function`, a function that turns a record into one of the known forms and runs only with
            `allow_code=true`.
        proportion: Share of an epoch's examples; shares are relative to their sum.
        repeat: How often each example is read per epoch, on average.
        choose: Examples read per epoch.
    """

    hf_name: str | None = None
    hf_kwargs: dict[str, Any] = field(default_factory=dict)
    local: str | None = None
    remote: str | None = None
    split: str | None = None
    preprocessing_fn: str | dict[str, str] | None = None
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None

    def __post_init__(self) -> None:
        check_records(self)
        _check_amounts(self)

    @property
    def place(self) -> str | None:
        """Where it lies."""
        return self.remote or self.hf_name or self.local


def check_remote(remote: str | None) -> None:
    """Raises ValueError for a URL whose end would be lost where shards are downloaded."""
    if remote is not None and is_url(remote) and (letter := next((c for c in "#?" if c in remote), None)):
        raise ValueError(
            f"remote: {remote} holds {letter}, and StreamingDataset reads a URL only up to there. Rename "
            "the folder."
        )


def check_records(given: Any) -> None:
    """Raises ValueError unless it is said once where records lie, and rightly how they are read."""
    check_not_empty(given, "hf_name", "local", "remote")
    places = [name for name in ("hf_name", "local", "remote") if getattr(given, name) is not None]
    if not places:
        raise ValueError("neither hf_name nor local nor remote is given. Say where the records lie.")
    if "hf_name" in places and len(places) > 1:
        raise ValueError(f"hf_name and {places[1]} are both given. Use one of them.")
    check_remote(given.remote)
    if given.hf_kwargs and given.hf_name is None:
        raise ValueError("hf_kwargs: belongs to hf_name, which is not given. Remove it.")
    if "trust_remote_code" in given.hf_kwargs:
        raise ValueError("hf_kwargs.trust_remote_code: no code of a data set is run. Remove it.")
    columns = given.preprocessing_fn
    if isinstance(columns, dict) and columns.keys() != {"prompt", "response"}:
        raise ValueError("preprocessing_fn: columns are named as {prompt: ..., response: ...}.")
    if isinstance(columns, str) and not re.fullmatch(r"[\w.]+:\w+", columns):
        raise ValueError(f"preprocessing_fn: {columns!r} is not module:function.")


def _check_amounts(stream: StreamConfig | RecordsConfig) -> None:
    shares = [n for n in AMOUNTS if getattr(stream, n) is not None]
    if len(shares) > 1:
        raise ValueError(f"{' and '.join(shares)} are both given. Use one of them.")
    for name in shares:
        if getattr(stream, name) < 0:
            raise ValueError(f"{name}: {getattr(stream, name)} is negative. Use 0 or more.")


def check_shares(streams: Mapping[str, StreamConfig | RecordsConfig]) -> None:
    """Raises ValueError unless all streams of a mix have a share, or none."""
    weighted = {name for name, s in streams.items() if s.proportion is not None}
    if weighted and weighted != set(streams):
        missing = ", ".join(name for name in streams if name not in weighted)
        raise ValueError(
            f"streams: {missing} lacks the proportion that {min(weighted)} has. Give it to all or none."
        )
    if weighted and not sum(s.proportion or 0 for s in streams.values()):
        raise ValueError("streams: all proportions are 0. At least one has to be positive.")


def check_uniform(streams: Mapping[str, RecordsConfig]) -> None:
    """Raises ValueError unless one way says how much of each stream is read; without `repeat`, once."""
    ways = {way: [name for name, s in streams.items() if getattr(s, way) is not None] for way in AMOUNTS}
    used = [way for way in AMOUNTS if ways[way]]
    if len(used) > 1:
        raise ValueError(f"streams: {' and '.join(used)} are both given. Use one of them for all streams.")
    if ways["choose"] and len(ways["choose"]) < len(streams):
        missing = ", ".join(name for name in streams if name not in ways["choose"])
        raise ValueError(f"streams: {missing} lacks the choose that others have. Give it to all or none.")
