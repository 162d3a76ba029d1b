"""The `train_loader` and `eval_loader` sections: which samples a run reads, in which mix and order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from mptfoundry import plugins
from mptfoundry.config.engine.forms import (
    ByteSize,
    SampleCount,
    TargetPrompts,
    TokenType,
    parse_bytes,
    parse_count,
)
from mptfoundry.config.engine.schema import show
from mptfoundry.config.engine.section_rules import (
    Limits,
    Problem,
    Rules,
    Section,
    not_empty,
    only_one,
    where_set,
)
from mptfoundry.config.engine.signatures import Own, belongs_to, own_arguments, own_parameters
from mptfoundry.config.streams import (
    AMOUNTS,
    Amount,
    RecordsConfig,
    StreamConfig,
    one_amount_for_all,
    records_rules,
    shares,
)


@dataclass(frozen=True, kw_only=True)
class _AnyLoaderConfig(Section):
    """What all kinds of loaders have.

    Attributes:
        name: The kind of loader.
        dataset: Which samples, in which mix and order.
        label: Name of an evaluation loader in all results. Default: `eval`.
        drop_last: Drop a last batch that is not full. Default: true in training, false in evaluation.
        num_workers: Processes per device that make batches. `auto` chooses by the number of processors.
    """

    name: str
    dataset: Any
    label: str | None = None
    drop_last: bool | None = None
    num_workers: int | Literal["auto"] = "auto"

    limits: ClassVar = {"num_workers": Limits(0, 10_000, text=" is negative. Use 0 or more, or auto.")}


@dataclass(frozen=True, kw_only=True)
class _StreamingLoaderConfig(_AnyLoaderConfig):
    """A loader whose workers read ahead.

    Attributes:
        pin_memory: Read into page-locked memory, for faster copies to a GPU.
        prefetch_factor: Batches that each worker reads ahead.
        persistent_workers: Keep the workers from one epoch to the next.
        timeout: Seconds to wait for a batch before the run ends with an error; 0: forever.
    """

    pin_memory: bool = True
    prefetch_factor: int = 2
    persistent_workers: bool = True
    timeout: float = 0

    limits: ClassVar = {**_AnyLoaderConfig.limits, "prefetch_factor": Limits(1), "timeout": Limits(0)}


@dataclass(frozen=True, kw_only=True)
class TextDatasetConfig(Section):
    """Tokenized (or raw) text in MDS shards, each sample one sequence of `max_seq_len` tokens.

    Attributes:
        streams: The data mix: sources by name. A stream set to null is left out.
        remote: Folder or URL to download the shards from, if there is only one source.
        local: Folder of the shards, or the cache of `remote`, if there is only one source.
        split: Subfolder of `remote` and `local`, such as `train` or `val`.
        max_seq_len: Tokens in a sample. Default, and has to equal: the run's `max_seq_len`.
        shuffle: Read the samples in random order. Default: true in training, false in evaluation.
        shuffle_seed: Seed of that order. Default, and has to equal: the run's `seed`.
        shuffle_algo: How samples are shuffled between and within shards.
        shuffle_block_size: Samples shuffled together. Default: derived from `num_canonical_nodes`.
        num_canonical_nodes: Parts into which the order of samples is divided; keeps the order the same when
            the number of nodes changes. Default: the nodes of the first start.
        epoch_size: Samples in an epoch, such as 10000 or `64M`. Default: all samples.
        predownload: Samples that each worker downloads ahead. Default: 8 batches.
        cache_limit: Size of the shard cache, such as `100gb`; the least used shards are removed. Default:
            none.
        download_retry: How often a failed download is retried.
        download_timeout: Seconds that a download may take.
        verify: When shards are compared with the hashes in their index: `lazy`, each before it is first read
            in this run; `full`, also all those on this machine before the first batch; `off`, never. Sizes
            are always compared.
        validate_hash: The hash to compare, such as `sha1`. Default: the fastest one in the index.
        keep_zip: Keep the compressed shard next to the decompressed one.
        partition_algo: How samples are assigned to devices and workers.
        sampling_method: Draw a stream's samples again each epoch (`balanced`), or only once (`fixed`).
        sampling_granularity: Samples drawn together from a shard when it is repeated in part.
        batching_method: How streams mix within a batch.
        replication: Consecutive devices that read the same samples. Only 1 is supported.
        allow_unsafe_types: Only `false`: pickled columns can run code.
        token_encoding_type: Integer type of `tokens` that are stored as bytes; arrays store their own type.
        special_tokens: What a special token spelled out in a `text` column, such as `<|endoftext|>`, becomes:
            that token, or plain text.
        eos_token_id: This id ends each document in a packed row, and separates the documents.
        bos_token_id: This id begins each document in a packed row, and separates the documents.
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
    verify: Literal["lazy", "full", "off"] = "lazy"
    validate_hash: str | None = None
    keep_zip: bool = False
    partition_algo: Literal["relaxed", "orig"] = "relaxed"
    sampling_method: Literal["balanced", "fixed"] = "balanced"
    sampling_granularity: int = 1
    batching_method: Literal["random", "stratified", "per_stream", "device_per_stream"] = "random"
    replication: Literal[1] | None = None
    allow_unsafe_types: Literal[False] = False
    token_encoding_type: TokenType = "int64"
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    limits: ClassVar = {
        "shuffle_block_size": Limits(1),
        "num_canonical_nodes": Limits(1),
        "predownload": Limits(1),
        "download_retry": Limits(0),
        "download_timeout": Limits(1),
        "sampling_granularity": Limits(1),
    }

    def rules(self) -> Rules:
        yield self._sources()
        yield where_set(self, "streams", shares)
        yield not_empty(self, "remote")
        yield not_empty(self, "local")
        yield only_one(
            self, "are both given. One of them separates documents.", "eos_token_id", "bos_token_id"
        )
        yield where_set(self, "epoch_size", partial(_at_least_one, key="epoch_size", parse=parse_count))
        yield where_set(self, "cache_limit", partial(_at_least_one, key="cache_limit", parse=parse_bytes))
        yield where_set(self, "validate_hash", TextDatasetConfig._verification)

    def _sources(self) -> Iterator[Problem]:
        if self.streams is not None:
            yield from self._streams_alone()
        elif self.remote is None and self.local is None:
            yield "", "neither streams nor remote nor local is given. Say where the shards lie."

    def _streams_alone(self) -> Iterator[Problem]:
        for name in ("remote", "local"):
            if getattr(self, name) is not None:
                yield ("streams", name), "are both given. Use one of them."
                return
        if not self.streams:
            yield "streams", "is empty. Name at least one source of data."

    def _verification(self) -> Iterator[Problem]:
        if self.verify == "off":
            yield "validate_hash", "has no effect with verify: off. Remove one of them."

    @property
    def separates_documents(self) -> bool:
        """Whether a token separates the documents of a packed row."""
        return self.eos_token_id is not None or self.bos_token_id is not None

    @property
    def sources(self) -> dict[str, StreamConfig]:
        """The sources by name; a single one is called by its split, or `data`."""
        if self.streams is not None:
            return self.streams
        return {self.split or "data": StreamConfig(remote=self.remote, local=self.local, split=self.split)}


def _at_least_one(section: Any, key: str, parse: Callable[[Any], int]) -> Iterator[Problem]:
    value = getattr(section, key)
    if parse(value) < 1:
        yield key, f"{value} is too small. Use 1 or more."


@dataclass(frozen=True, kw_only=True)
class TextLoaderConfig(_StreamingLoaderConfig):
    """Batches of text for pretraining, or for evaluation on held-out text."""

    name: Literal["text"] = "text"
    dataset: TextDatasetConfig


@dataclass(frozen=True, kw_only=True)
class LabelledDatasetConfig(Section):
    """Labelled examples in JSONL or Parquet files, or in a data set.

    The model decides what a record holds: `text`, optionally `text_pair`, and `label`; or `words` and
    `labels`; or `question`, `context` and `answers` as in SQuAD. Labels are names in `model.id2label` or
    numbers; two texts are joined the way the tokenizer joins pairs.

    Attributes:
        hf_name: A file or folder of JSONL or Parquet, a folder that `datasets` saved, or the name of a data
            set on the Hugging Face hub.
        local: The same, except that it can't be a name on the hub.
        split: Subfolder, word in the file names, or split of a data set.
        fields: Maps names of a record's fields to those in the data, such as `{text: sentence}`.
        max_seq_len: Tokens in an example; longer ones are cut. Default, and has to equal: the run's
            `max_seq_len`.
        shuffle: Read the examples in random order. Default: true in training, false in evaluation.
        shuffle_seed: Seed of that order. Default, and has to equal: the run's `seed`.
        cache_folder: Folder of tokenized examples. Default: `~/.cache/mptfoundry/examples`.
    """

    hf_name: str | None = None
    local: str | None = None
    split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    max_seq_len: int | None = None
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    cache_folder: str | None = None
    epoch_size: ClassVar[None] = None
    separates_documents: ClassVar[bool] = False

    def rules(self) -> Rules:
        yield not_empty(self, "hf_name")
        yield not_empty(self, "local")
        yield only_one(self, "are both given. Give the one that has the examples.", "hf_name", "local")
        yield self._some_source()

    def _some_source(self) -> Iterator[Problem]:
        if self.hf_name is None and self.local is None:
            yield "", "neither hf_name nor local is given. Say where the examples lie."

    @property
    def sources(self) -> dict[str, RecordsConfig]:
        """The one source, called by its split, or `data`."""
        source = RecordsConfig(hf_name=self.hf_name, local=self.local, split=self.split)
        return {self.split or "data": source}


@dataclass(frozen=True, kw_only=True)
class LabelledLoaderConfig(_AnyLoaderConfig):
    """Batches of labelled examples, for models that end in a head."""

    name: Literal["labelled"]
    dataset: LabelledDatasetConfig


@dataclass(frozen=True, kw_only=True)
class FinetuningDatasetConfig(Section):
    """Prompts and responses, or conversations, with a loss mask over their tokens.

    A record has `prompt` and `response` (or `completion`), or `messages`, or ShareGPT's `conversations`,
    or `instruction`, optionally `input`, and `output` (or `context` and `response`), or `input_ids` and
    `labels`. It is tokenized once, and kept on disk.

    Attributes:
        streams: The data mix: sources by name. A stream set to null is left out.
        hf_name: A file or folder of JSONL, Parquet or MDS shards, a folder that `datasets` saved, or the name
            of a data set on the Hugging Face hub, `NAME@REVISION` for a branch, tag or commit; or `json` or
            `parquet` with `hf_kwargs`.
        hf_kwargs: For files: `data_files` or `data_dir`. For the hub: arguments of `datasets.load_dataset`.
        safe_load: Has no effect: code from a data set is never run.
        local: A file or folder as in `hf_name`; or the folder for a copy of `remote`.
        remote: URL of MDS shards.
        split: Subfolder, word in the file names, or split of a data set; also the default for streams.
        preprocessing_fn: The same as in a stream; also the default for streams.
        max_seq_len: Tokens in a row. Default, and has to equal: the run's `max_seq_len`.
        decoder_only_format: Only `true`: prompt and response form one sequence.
        target_prompts: Which prompts are trained on: `none`, `all`, or those of `length>=N` tokens.
        target_responses: Which responses of a conversation are trained on: the `last`, or `all`.
        special_tokens: What a special token spelled out in a prompt or response, such as `<|endoftext|>`,
            becomes: that token, or plain text. With `as_text`, a conversation that spells one is a bad
            record.
        packing_ratio: Examples per row, on average; they don't see one another. `auto`: as many as fit.
            Default: one.
        allow_pad_trimming: Cut off padding that all rows of a batch share.
        shuffle: Read the examples in random order. Default: true in training, false in evaluation.
        shuffle_seed: Seed of that order. Default, and has to equal: the run's `seed`.
        max_bad_records: How many bad records of a source may be left out; more end the run.
        max_dropped: Share of a source's examples that may be dropped because they have nothing to train on:
            `max_seq_len` cuts it off, or a prompt or response is empty.
        token_encoding_type: Integer type of `input_ids` and `labels` that are stored as bytes; lists and
            arrays store their own type.
        cache_folder: Folder of tokenized examples. Default: `~/.cache/mptfoundry/examples`.
    """

    streams: dict[str, RecordsConfig] | None = None
    hf_name: str | None = None
    hf_kwargs: dict[str, Any] = field(default_factory=dict)
    safe_load: bool = False
    local: str | None = None
    remote: str | None = None
    split: str | None = None
    preprocessing_fn: str | dict[str, str] | None = None
    max_seq_len: int | None = None
    decoder_only_format: Literal[True] = True
    target_prompts: TargetPrompts = "none"
    target_responses: Literal["last", "all"] = "last"
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"
    packing_ratio: float | Literal["auto"] | None = None
    allow_pad_trimming: bool = False
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    max_bad_records: int = 0
    max_dropped: float = 0.2
    token_encoding_type: TokenType = "int64"
    cache_folder: str | None = None
    epoch_size: ClassVar[None] = None
    separates_documents: ClassVar[bool] = False
    limits: ClassVar = {"max_bad_records": Limits(0)}

    def rules(self) -> Rules:
        yield self._sources()
        yield from records_rules(self)
        yield where_set(self, "streams", shares)
        yield one_amount_for_all(self)
        yield self._packing()
        yield self._share_dropped()

    def _sources(self) -> Iterator[Problem]:
        for name in ("hf_name", "local", "remote"):
            if self.streams is not None and getattr(self, name) is not None:
                yield ("streams", name), "are both given. Use one of them."
                return
        if self.streams is not None and not self.streams:
            yield "streams", "is empty. Name at least one source of records."

    def _packing(self) -> Iterator[Problem]:
        if self.packing_ratio != "auto" and self.packing_ratio is not None and self.packing_ratio < 1:
            yield "packing_ratio", f"{self.packing_ratio} is less than one example in a row. Use auto."

    def _share_dropped(self) -> Iterator[Problem]:
        if not 0 <= self.max_dropped <= 1:
            yield "max_dropped", f"{self.max_dropped} is not a share from 0 to 1."

    @property
    def sources(self) -> dict[str, RecordsConfig]:
        """The sources by name; a single one is called by its split, or `data`."""
        if self.streams is None:
            names = ("hf_name", "hf_kwargs", "local", "remote", "split", "preprocessing_fn")
            return {self.split or "data": RecordsConfig(**{name: getattr(self, name) for name in names})}
        return {
            name: replace(
                stream,
                split=stream.split or self.split,
                preprocessing_fn=stream.preprocessing_fn or self.preprocessing_fn,
            )
            for name, stream in self.streams.items()
        }

    @property
    def amounts(self) -> tuple[Amount, list[float] | None]:
        """How much of each stream is read, and what the numbers are; None: all of everything, once."""
        streams = (self.streams or {}).values()
        for name in AMOUNTS:
            amounts = [getattr(stream, name) for stream in streams]
            if any(amount is not None for amount in amounts):
                return name, [1.0 if amount is None else float(amount) for amount in amounts]
        return "proportion", None


@dataclass(frozen=True, kw_only=True)
class FinetuningLoaderConfig(_StreamingLoaderConfig):
    """Batches of finetuning examples with a loss mask: instructions, conversations."""

    name: Literal["finetuning"]
    dataset: FinetuningDatasetConfig


@dataclass(frozen=True)
class OwnSource:
    """What there is to say about the data of a dataset of the user's own: the arguments of its class."""

    place: str
    split: ClassVar[None] = None
    proportion: ClassVar[None] = None
    repeat: ClassVar[None] = None
    choose: ClassVar[None] = None


@dataclass(frozen=True)
class OwnDataset:
    """What the `dataset` section of other loaders says, for a dataset of the user's own."""

    sources: dict[str, OwnSource]
    shuffle: bool | None
    streams: ClassVar[None] = None
    split: ClassVar[None] = None
    max_seq_len: ClassVar[None] = None
    shuffle_seed: ClassVar[None] = None
    epoch_size: ClassVar[None] = None
    separates_documents: ClassVar[bool] = False


# Arguments that a dataset of the user's own gets from the run, if its signature names them.
FROM_THE_RUN = ("tokenizer", "max_seq_len", "seed")


@dataclass(frozen=True, kw_only=True)
class OwnLoaderConfig(_StreamingLoaderConfig):
    """Batches of a dataset of your own, a class in `plugins.datasets`, with the arguments of its signature.

    Attributes:
        name: Its name in the table.
        shuffle: Read the items in random order. Default: true in training, false in evaluation.
    """

    shuffle: bool | None = None
    # Not a field, since the keys of the dataset are here.
    dataset: ClassVar[Any] = property(lambda self: self._dataset())  # type: ignore[misc]

    def rules(self) -> Rules:
        yield self._another_name()
        yield self._keys_of_the_loader()

    def _another_name(self) -> Iterator[Problem]:
        if self.name in ("text", "labelled", "finetuning"):
            yield "name", f"{self.name} is a loader of mptfoundry's. Give your dataset another name."

    def _keys_of_the_loader(self) -> Iterator[Problem]:
        own = plugins.datasets.get(self.name)
        for each in own_parameters(own, FROM_THE_RUN) if own is not None else ():
            if belongs_to(OwnLoaderConfig, each.name):
                text = "is a key of the loader, and also an argument of your class. Rename the argument."
                yield "name", f"{each.name} {text}"

    def _dataset(self) -> OwnDataset:
        given = own_arguments(self, OwnLoaderConfig)
        place = ", ".join(f"{key} {show(value)}" for key, value in given.items())
        return OwnDataset({self.name: OwnSource(place)}, self.shuffle)


LoaderConfig = (
    TextLoaderConfig
    | LabelledLoaderConfig
    | FinetuningLoaderConfig
    | Annotated[
        OwnLoaderConfig,
        Own("the name of an own one", plugins.datasets, OwnLoaderConfig, supplied=FROM_THE_RUN),
    ]
)


def loaders_by_label(given: LoaderConfig | tuple[LoaderConfig, ...] | None) -> dict[str, LoaderConfig]:
    """Evaluation loaders by label; a single one without a label is `eval`."""
    if given is None:
        return {}
    loaders = given if isinstance(given, tuple) else (given,)
    return {loader.label or "eval": loader for loader in loaders}


def label_problems(section: Any) -> Iterator[Problem]:
    """Each of several evaluation loaders has a label of its own."""
    given = section.eval_loader
    if isinstance(given, tuple) and len(given) > 1:
        yield from _problems_of_labels([loader.label for loader in given])


def _problems_of_labels(labels: list[str | None]) -> Iterator[Problem]:
    for index, label in enumerate(labels):
        if label is None:
            yield f"eval_loader[{index}].label", "is missing. Each of several loaders needs its own label."
        elif label in labels[:index]:
            yield f"eval_loader[{index}].label", f"'{label}' is another loader's. Use a label of its own."


def some_batches(section: Any, name: str) -> Iterator[Problem]:
    """A number of batches is not 0."""
    if getattr(section, name) == 0:
        yield name, "0 batches leave nothing to do. Use -1 for all of them."


def sources_by_key(loader: LoaderConfig, where: str) -> dict[str, Any]:
    """The sources of a loader by their keys in the config: `train_loader.dataset.streams.code`."""
    dataset = loader.dataset
    if getattr(dataset, "streams", None) is None:
        return {f"{where}.dataset": source for source in dataset.sources.values()}
    return {f"{where}.dataset.streams.{name}": source for name, source in dataset.sources.items()}
