"""The `train_loader` and `eval_loader` sections: which samples a run reads, in which mix and order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mptfoundry.config.forms import ByteSize, SampleCount


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One source of the data mix.

    At most one of `proportion`, `repeat` and `choose` says how much of it is drawn; all streams of a
    data set use the same one.

    Attributes:
        remote: Folder or URL that the shards are downloaded from. Default: they lie in `local`.
        local: Folder of the shards, or of the cache of `remote`.
        split: Subfolder of `remote` and `local`. Default: the data set's.
        proportion: Share of the samples of an epoch; shares are relative to their sum.
        repeat: How often each sample is drawn in an epoch, on average.
        choose: Samples drawn in an epoch.
        download_retry: Further attempts after a failed download. Default: the data set's.
        download_timeout: Seconds that a download may take. Default: the data set's.
        validate_hash: Hash that each shard is checked by. Default: the data set's.
        keep_zip: Keep the compressed shard beside the decompressed one. Default: the data set's.
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
        shares = [n for n in ("proportion", "repeat", "choose") if getattr(self, n) is not None]
        if len(shares) > 1:
            raise ValueError(f"{' and '.join(shares)} are both given. Use one of them.")
        for name in shares:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative. Use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class TextDatasetConfig:
    """Tokenized (or raw) text in MDS shards, each sample one sequence of `max_seq_len` tokens.

    Attributes:
        streams: The data mix: named sources. A stream given as null is left out.
        remote: Folder or URL that the shards are downloaded from, where there is one source.
        local: Folder of the shards, or of the cache of `remote`, where there is one source.
        split: Subfolder of `remote` and `local`, such as `train` or `val`.
        max_seq_len: Tokens of a sample. Default, and must equal: the run's `max_seq_len`.
        shuffle: Read the samples in random order. Default: true in training, false in evaluation.
        shuffle_seed: Seed of that order. Default, and must equal: the run's `seed`.
        shuffle_algo: How samples are shuffled between and inside of shards.
        shuffle_block_size: Samples shuffled together. Default: from `num_canonical_nodes`.
        num_canonical_nodes: Into how many parts the order is cut, whatever the number of nodes; fixes
            the order when that number changes. Default: the nodes of the first start.
        epoch_size: Samples of an epoch, such as 10000 or `64M`. Default: as many as there are.
        predownload: Samples that each worker downloads ahead. Default: 8 batches.
        cache_limit: Size of the shard cache, such as `100gb`; the least used shards go. Default: none.
        download_retry: Further attempts after a failed download.
        download_timeout: Seconds that a download may take.
        validate_hash: Hash that each shard is checked by, where the shards carry one.
        keep_zip: Keep the compressed shard beside the decompressed one.
        partition_algo: How samples are dealt out to devices and workers.
        sampling_method: Draw the samples of a stream anew each epoch (`balanced`) or not (`fixed`).
        sampling_granularity: Samples drawn together from a shard for a partial repeat.
        batching_method: How the streams mix inside a batch.
        replication: Consecutive devices that read the same samples. Only 1 is supported.
        allow_unsafe_types: Pickled columns run code when read and are never allowed.
        token_encoding_type: Integer type of `tokens` stored as bytes; arrays know their own.
        eos_token_id: Documents of a packed row end with this id: they get sequence ids.
        bos_token_id: Documents of a packed row begin with this id: they get sequence ids.
    """

    streams: dict[str, StreamConfig] | None = None
    remote: str | None = None
    local: str | None = None
    split: str | None = None
    max_seq_len: int | None = None
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    shuffle_algo: Literal["py1e", "py1b", "py1br", "py1s", "py2s", "naive"] = "py1e"
    shuffle_block_size: int | None = None
    num_canonical_nodes: int | None = None
    epoch_size: SampleCount | None = None
    predownload: int | None = None
    cache_limit: ByteSize | None = None
    download_retry: int = 2
    download_timeout: float = 60.0
    validate_hash: str | None = None
    keep_zip: bool = False
    partition_algo: Literal["relaxed", "orig"] = "relaxed"
    sampling_method: Literal["balanced", "fixed"] = "balanced"
    sampling_granularity: int = 1
    batching_method: Literal["random", "stratified", "per_stream", "device_per_stream"] = "random"
    replication: Literal[1] | None = None
    allow_unsafe_types: Literal[False] = False
    token_encoding_type: Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"] = (
        "int64"
    )
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.streams is not None:
            if self.remote is not None or self.local is not None:
                raise ValueError("streams and remote or local are both given. Use one of them.")
            if not self.streams:
                raise ValueError("streams: is empty. Name at least one source of data.")
            _check_shares(self.streams)
        elif self.remote is None and self.local is None:
            raise ValueError("neither streams nor remote nor local is given. Say where the shards lie.")
        if self.eos_token_id is not None and self.bos_token_id is not None:
            raise ValueError("eos_token_id and bos_token_id are both given. Documents are told apart by one.")

    @property
    def separates_documents(self) -> bool:
        """Whether batches tell the documents of a packed row apart."""
        return self.eos_token_id is not None or self.bos_token_id is not None

    @property
    def sources(self) -> dict[str, StreamConfig]:
        """The sources by name; a single one is called by its split, or `data`."""
        if self.streams is not None:
            return self.streams
        return {self.split or "data": StreamConfig(remote=self.remote, local=self.local, split=self.split)}


def _check_shares(streams: dict[str, StreamConfig]) -> None:
    weighted = {name for name, s in streams.items() if s.proportion is not None}
    if weighted and weighted != set(streams):
        missing = ", ".join(name for name in streams if name not in weighted)
        raise ValueError(
            f"streams: {missing} lacks the proportion that {min(weighted)} has. Give it to all or none."
        )
    if weighted and not sum(s.proportion or 0 for s in streams.values()):
        raise ValueError("streams: all proportions are 0. At least one has to be positive.")


@dataclass(frozen=True, kw_only=True)
class TextLoaderConfig:
    """Batches of text for pretraining, or for evaluation on held-out text.

    Attributes:
        name: The kind of loader.
        dataset: Which samples, in which mix and order.
        label: Name of an evaluation loader in all results. Default: `eval`.
        drop_last: Leave out a last batch that is not full. Default: true in training, false in evaluation.
        num_workers: Processes that read ahead, for each device. `auto` chooses by the processors there.
        pin_memory: Read into page-locked memory, for faster copies to a GPU.
        prefetch_factor: Batches that each worker reads ahead.
        persistent_workers: Keep the workers from one epoch to the next.
        timeout: Seconds to wait for a batch before the run ends with an error; 0: for ever.
    """

    name: Literal["text"] = "text"
    dataset: TextDatasetConfig
    label: str | None = None
    drop_last: bool | None = None
    num_workers: int | Literal["auto"] = "auto"
    pin_memory: bool = True
    prefetch_factor: int = 2
    persistent_workers: bool = True
    timeout: float = 0

    def __post_init__(self) -> None:
        _check_workers(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class LabelledDatasetConfig:
    """Labelled examples in JSONL or Parquet files, or in a folder that `datasets` saved.

    What a record holds follows from the model: `text`, perhaps `text_pair`, and `label`; or `words` and
    `labels`; or `question`, `context` and `answers` as in SQuAD. Labels are names of `model.id2label` or
    numbers; two texts are joined as the tokenizer joins pairs.

    Attributes:
        local: A file, a folder of files, or a folder saved by `datasets`.
        split: In a folder: a file's name without its suffix, or a subfolder; or a saved data set's split.
        fields: Names of a record's fields -> their names in the data, such as `{text: sentence}`.
        max_seq_len: Longest example, others are cut. Default, and must equal: the run's `max_seq_len`.
        shuffle: Read the examples in random order. Default: true in training, false in evaluation.
        shuffle_seed: Seed of that order. Default, and must equal: the run's `seed`.
    """

    local: str
    split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    max_seq_len: int | None = None
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    epoch_size: ClassVar[None] = None
    separates_documents: ClassVar[bool] = False

    @property
    def sources(self) -> dict[str, StreamConfig]:
        """The one source, called by its split, or `data`."""
        return {self.split or "data": StreamConfig(local=self.local, split=self.split)}


@dataclass(frozen=True, kw_only=True)
class LabelledLoaderConfig:
    """Batches of labelled examples, for models that end in a head.

    Attributes:
        name: The kind of loader.
        dataset: Which examples.
        label: Name of an evaluation loader in all results. Default: `eval`.
        drop_last: Leave out a last batch that is not full. Default: true in training, false in evaluation.
        num_workers: Processes that make batches, for each device. `auto` chooses by the processors there.
    """

    name: Literal["labelled"]
    dataset: LabelledDatasetConfig
    label: str | None = None
    drop_last: bool | None = None
    num_workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _check_workers(self.num_workers)


def _check_workers(num_workers: int | str) -> None:
    if isinstance(num_workers, int) and num_workers < 0:
        raise ValueError(f"num_workers: {num_workers} is negative. Use 0 or more, or auto.")


LoaderConfig = TextLoaderConfig | LabelledLoaderConfig


def loaders_by_label(
    given: LoaderConfig | tuple[LoaderConfig, ...] | None,
) -> dict[str, LoaderConfig]:
    """Evaluation loaders by label; a single one without a label is `eval`."""
    if given is None:
        return {}
    loaders = given if isinstance(given, tuple) else (given,)
    return {loader.label or "eval": loader for loader in loaders}
