"""One source of data, a stream of shards or of records: where it is, and how much of it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from mptfoundry.config.engine.section_rules import (
    Limits,
    Problem,
    Rules,
    Section,
    not_empty,
    only_one,
    where_set,
)
from mptfoundry.places import is_url

Amount = Literal["proportion", "repeat", "choose"]
AMOUNTS: tuple[Amount, ...] = get_args(Amount)
_AMOUNT_LIMITS: dict[str, Limits] = {name: Limits(0) for name in AMOUNTS}


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Section):
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

    limits: ClassVar = {**_AMOUNT_LIMITS, "download_retry": Limits(0), "download_timeout": Limits(1)}

    def rules(self) -> Rules:
        yield self._some_source()
        yield not_empty(self, "remote")
        yield not_empty(self, "local")
        yield where_set(self, "remote", _whole_url)
        yield only_one(self, "are both given. Use one of them.", *AMOUNTS)

    def _some_source(self) -> Iterator[Problem]:
        if self.remote is None and self.local is None:
            yield "", "neither remote nor local is given. A stream needs the folder of its shards."

    @property
    def place(self) -> str | None:
        """Where it lies."""
        return self.remote or self.local


@dataclass(frozen=True, kw_only=True)
class RecordsConfig(Section):
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

    streams: ClassVar[None] = None
    limits: ClassVar = _AMOUNT_LIMITS

    def rules(self) -> Rules:
        yield from records_rules(self)
        yield only_one(self, "are both given. Use one of them.", *AMOUNTS)

    @property
    def place(self) -> str | None:
        """Where it lies."""
        return self.remote or self.hf_name or self.local


def records_rules(section: Any) -> Rules:
    """What holds for the keys that say where records lie and how they are read."""
    for name in ("hf_name", "local", "remote"):
        yield not_empty(section, name)
    yield _records_place(section)
    yield where_set(section, "remote", _whole_url)
    yield _hub_arguments(section)
    yield _columns(section)


def _records_place(section: Any) -> Iterator[Problem]:
    if section.streams is not None:
        return
    places = [name for name in ("hf_name", "local", "remote") if getattr(section, name) is not None]
    if not places:
        yield "", "neither hf_name nor local nor remote is given. Say where the records lie."
    elif "hf_name" in places and len(places) > 1:
        yield ("hf_name", places[1]), "are both given. Use one of them."


def _whole_url(section: Any) -> Iterator[Problem]:
    """The end of some URLs would be lost where shards are downloaded."""
    remote = section.remote
    if is_url(remote) and (letter := next((c for c in "#?" if c in remote), None)):
        text = f"contains {letter}, and StreamingDataset reads a URL only up to there. Rename the folder."
        yield "remote", f"{remote} {text}"


def _hub_arguments(section: Any) -> Iterator[Problem]:
    if section.hf_kwargs and section.hf_name is None and section.streams is None:
        yield "hf_kwargs", "belongs to hf_name, which is not given. Remove it."
    elif "trust_remote_code" in section.hf_kwargs and section.streams is None:
        yield "hf_kwargs.trust_remote_code", "no code of a data set is run. Remove it."


def _columns(section: Any) -> Iterator[Problem]:
    columns = section.preprocessing_fn
    if section.streams is not None:
        return
    if isinstance(columns, dict) and columns.keys() != {"prompt", "response"}:
        yield "preprocessing_fn", "columns are named as {prompt: ..., response: ...}."
    if isinstance(columns, str) and not re.fullmatch(r"[\w.]+:\w+", columns):
        yield "preprocessing_fn", f"{columns!r} is not module:function."


def shares(section: Any) -> Iterator[Problem]:
    """All streams of a mix have a share, or none."""
    streams: Mapping[str, StreamConfig | RecordsConfig] = section.streams
    weighted = {name for name, s in streams.items() if s.proportion is not None}
    if weighted and weighted != set(streams):
        missing = ", ".join(name for name in streams if name not in weighted)
        text = f"{missing} lacks the proportion that {min(weighted)} has. Give it to all or none."
        yield "streams", text
    elif weighted and not sum(s.proportion or 0 for s in streams.values()):
        yield "streams", "all proportions are 0. At least one must be positive."


def one_amount_for_all(section: Any) -> Iterator[Problem]:
    """One key says for all streams how much of each is read; without `repeat`, each is read once."""
    streams = section.streams or {}
    ways = {way: [name for name, s in streams.items() if getattr(s, way) is not None] for way in AMOUNTS}
    used = [way for way in AMOUNTS if ways[way]]
    if len(used) > 1:
        yield "streams", f"{' and '.join(used)} are both given. Use one of them for all streams."
    elif ways["choose"] and len(ways["choose"]) < len(streams):
        missing = ", ".join(name for name in streams if name not in ways["choose"])
        yield "streams", f"{missing} lacks the choose that others have. Give it to all or none."


def code_problem(section: Any) -> Iterator[Problem]:
    """Code that a config names runs only if the command line allows it."""
    if section.code_paths and not section.allow_code:
        yield "code_paths", "names code, which runs only with allow_code=true on the command line."
