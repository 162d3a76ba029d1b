"""Batches of text for training and evaluation, from MDS shards that may be a mix of several streams.

Read are the shards of `mptfoundry prepare` and those of llm-foundry: a column `tokens` (an array of any
integer type, or bytes of the type `token_encoding_type`), or a column `text` that is tokenised on the fly.
A *stream* is one data set of the mix; a *sample* is one row of it. What one reads here first is
`build_text_loader`; `TextDataset` says what happens to a sample; the checks before a run are at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from composer.core import DataSpec
from streaming import StreamingDataLoader

from mptfoundry.data.collate import TextCollator, count_samples, count_tokens, filler_id, worker_options
from mptfoundry.data.shards.index import INTEGER_DTYPES
from mptfoundry.data.shards.token_ids import check_ids, read_sample
from mptfoundry.data.text.guarded import GuardedDataset, GuardedStream, Verify
from mptfoundry.data.text.streams import Source, check_shards, plan_sources, warn_of_unknown
from mptfoundry.errors import ConfigError, DataError, first_line
from mptfoundry.ranks import once_per_node
from mptfoundry.tokenizer import AS_TEXT


def build_text_loader(
    *,
    streams: Mapping[str, Mapping[str, Any]] | None = None,
    remote: str | None = None,
    local: str | None = None,
    split: str | None = None,
    tokenizer: Any,
    max_seq_len: int,
    vocab_size: int,
    device_batch_size: int,
    shuffle: bool = False,
    seed: int = 9176,
    drop_last: bool = True,
    is_training: bool = True,
    num_workers: int = 0,
    sequence_ids: bool = False,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    token_encoding_type: str = "int64",
    verify: Verify = "lazy",
    pin_memory: bool | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
    where: str = "train_loader",
    **streaming: Any,
) -> DataSpec:
    """Build the loader of one data set or mix, with everything checked that can be before the first batch.

    Args:
        streams: Name -> remote, local, split and one of proportion, repeat, choose (streaming's words).
            Either this or `remote` and `local`.
        remote: Where shards are fetched from; a folder given without `local` is read in place.
        local: Where shards lie, or are kept once fetched.
        split: Folder below each stream's, such as `train`; a stream's own goes before it.
        tokenizer: transformers' fast tokenizer; its fingerprint must be that of the shards.
        max_seq_len: Tokens in each row. Longer samples are refused, shorter ones padded; raw text is cut.
        vocab_size: The model's; each id must be below it.
        device_batch_size: Rows in a batch of one device.
        shuffle: Shuffle anew in each epoch, from `seed`.
        drop_last: Leave out a last batch that is not full.
        is_training: Epochs differ. An evaluation always reads the samples of the first, in their order.
        num_workers: Processes that read; 0 reads in the training process.
        sequence_ids: Add `sequence_id`, so that documents in a row do not see one another.
        eos_token_id: Ends a document, for `sequence_ids`. Default: the tokenizer's, unless BOS is given.
        bos_token_id: Starts a document, for `sequence_ids`.
        token_encoding_type: Type of the ids in a `tokens` column of bytes.
        verify: When shards are compared with their hashes; see GuardedDataset.
        pin_memory: Default: only if there is a GPU.
        where: What the user calls this loader, for errors.
        streaming: Further arguments of TextDataset and of streaming's StreamingDataset.

    Returns:
        Composer's DataSpec; batches are those of `mptfoundry.data.collate`.

    Raises:
        ConfigError: The arguments contradict one another.
        DataError: Shards are missing, damaged, empty, or made for another tokenizer or sequence length.
    """
    # The tokenizers library warns when a process that it used threads in is forked into workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sources = plan_sources(streams, remote, local, split, where)
    dataset = _build_dataset(
        sources,
        tokenizer=tokenizer,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
        token_encoding_type=token_encoding_type,
        verify=verify,
        varies=is_training,
        batch_size=device_batch_size,
        shuffle=shuffle,
        shuffle_seed=seed,
        where=where,
        **streaming,
    )
    once_per_node(dataset.check_files, what=f"{where}: checking shards")
    _check_streams(dataset, sources, tokenizer)
    if drop_last:
        _check_that_it_fills_a_batch(dataset, device_batch_size, where)
    loader = TextLoader(
        dataset,
        batch_size=device_batch_size,
        collate_fn=_collator(tokenizer, max_seq_len, sequence_ids, eos_token_id, bos_token_id, where),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        **worker_options(num_workers, prefetch_factor, persistent_workers, timeout),
        # Its own generator: making an iterator must not advance the random state that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count_tokens)


class TextDataset(GuardedDataset):
    """Samples of token ids, each checked as it is read.

    Args:
        stream_names: What the user calls each stream, for errors.
        tokenizer: For raw text only.
        max_seq_len: The most tokens that a sample may have.
        vocab_size: Each id must be below it.
        token_encoding_type: Type of the ids where they are stored as bytes.
        special_tokens: Raw text that spells a special token becomes that token, or, `as_text`, stays text.
        guarded: Arguments of GuardedDataset.

    Attributes:
        fingerprints: The content of each stream, by its key in the config.
    """

    def __init__(
        self,
        *,
        stream_names: Sequence[str],
        tokenizer: Any,
        max_seq_len: int,
        vocab_size: int,
        token_encoding_type: str,
        special_tokens: Literal["as_tokens", "as_text"] = "as_tokens",
        **guarded: Any,
    ) -> None:
        self.stream_names = list(stream_names)
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.token_encoding_type = token_encoding_type
        self.fingerprints: dict[str, str] = {}
        self.as_text = special_tokens == AS_TEXT
        super().__init__(**guarded)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Read one sample: `input_ids` (tokens,) int64 with 1 <= tokens <= max_seq_len, and `sample_id`.

        Raises:
            DataError: It can't be read, is too long, or holds an id that the model has no embedding for.
        """
        try:
            sample = super().get_item(sample_id, retry)
        except Exception as error:  # a damaged sample fails in any way
            reason = first_line(self.background_error or error)
            raise DataError(f"{self._place(sample_id)} can't be read: {reason}.") from error
        found = read_sample(sample, self.token_encoding_type, self._place(sample_id))
        ids = self._ids_of_text(found) if isinstance(found, str) else found
        if len(ids) > self.max_seq_len:
            raise DataError(
                f"{self._place(sample_id)} has {len(ids)} tokens; max_seq_len is {self.max_seq_len}. "
                f"Set max_seq_len: {len(ids)}, or prepare the text again for {self.max_seq_len}."
            )
        check_ids(ids, self.vocab_size, "model", self._place(sample_id))
        return {"input_ids": ids, "sample_id": int(sample_id)}

    def _ids_of_text(self, text: str) -> np.ndarray:
        options = {"split_special_tokens": True} if self.as_text else {}
        ids = self.tokenizer(text, truncation=True, max_length=self.max_seq_len, **options)["input_ids"]
        # A row of nothing but padding has no attention at all; one EOS has, and nothing to learn.
        return np.asarray(ids or [filler_id(self.tokenizer)], np.int64)

    def _place(self, sample_id: int) -> str:
        shard_id, row = self.spanner[sample_id]
        shard: Any = self.shards[shard_id]
        return (
            f"{self.stream_names[self.stream_per_shard[shard_id]]}: sample {row} of {shard.raw_data.basename}"
        )


class TextLoader(StreamingDataLoader):
    """StreamingDataLoader whose epochs are whole, and whose workers' DataErrors arrive as what they say.

    Args:
        dataset: A GuardedDataset.
        loader: Arguments of StreamingDataLoader.
    """

    dataset: GuardedDataset

    def __init__(self, dataset: GuardedDataset, **loader: Any) -> None:
        workers = max(1, loader.get("num_workers", 0))
        # In shared memory, where the workers put it.
        dataset.planned = torch.full((workers,), -1, dtype=torch.int64).share_memory_()
        super().__init__(dataset, **loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.dataset.planned.fill_(-1)
        try:
            yield from super().__iter__()
        except DataError as error:
            # Left to the garbage collector, they take seconds to end.
            workers: Any = self._iterator
            if workers is not None:
                workers._shutdown_workers()
            marker = f"{DataError.__module__}.{DataError.__qualname__}: "
            text = str(error)
            if marker not in text:
                raise
            raise DataError(text.rsplit(marker, 1)[1].strip()) from error
        self._check_that_all_came()

    def _check_that_all_came(self) -> None:
        """Raises DataError if the epoch is over, but not all was read that it deals to this rank."""
        planned, rows = self.dataset.planned, self.batch_size or 1
        due = int((planned // rows * rows if self.drop_last else planned).sum())
        if bool((planned < 0).any()) or self.num_samples_yielded != due:
            raise DataError(
                f"{self.dataset.where}: the epoch ended after {self.num_samples_yielded:,} samples of this "
                f"rank; its part has {due:,}. Samples were lost on the way: start again from the checkpoint."
            )


def _collator(
    tokenizer: Any,
    max_seq_len: int,
    sequence_ids: bool,
    eos_token_id: int | None,
    bos_token_id: int | None,
    where: str,
) -> TextCollator:
    if not sequence_ids:
        return TextCollator(max_seq_len, filler_id(tokenizer))
    if eos_token_id is not None and bos_token_id is not None:
        raise ConfigError(
            f"{where}.dataset: eos_token_id and bos_token_id are both given. Give the one that is at borders."
        )
    if eos_token_id is None and bos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None and bos_token_id is None:
        raise ConfigError(f"{where}.dataset.eos_token_id: the tokenizer has no EOS. Give eos_token_id.")
    return TextCollator(max_seq_len, filler_id(tokenizer), eos_token_id, bos_token_id)


def _build_dataset(
    sources: Sequence[Source], *, where: str, token_encoding_type: str, verify: Verify, **arguments: Any
) -> TextDataset:
    if token_encoding_type not in INTEGER_DTYPES:
        raise ConfigError(
            f"{where}.dataset.token_encoding_type: {token_encoding_type!r} is not an integer type. "
            f"Use one of {', '.join(INTEGER_DTYPES)}."
        )
    try:
        return TextDataset(
            token_encoding_type=token_encoding_type,
            where=f"{where}.dataset",
            verify=verify,
            streams=[
                GuardedStream(where=source.where, verify=verify, **source.arguments) for source in sources
            ],
            stream_names=[source.where for source in sources],
            **arguments,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{where}.dataset: {error}") from error


def _check_that_it_fills_a_batch(dataset: TextDataset, device_batch_size: int, where: str) -> None:
    if len(dataset) < device_batch_size:
        raise DataError(
            f"{where}: {len(dataset)} samples for each device don't fill one batch of {device_batch_size}. "
            f"Use a smaller batch, more text, or drop_last: false."
        )


def _check_streams(dataset: TextDataset, sources: Sequence[Source], tokenizer: Any) -> None:
    """Compare each stream's index with the run; look into shards whose index says nothing."""
    unknown = []
    for position, source in enumerate(sources):
        index = check_shards(source, tokenizer, dataset.max_seq_len)
        dataset.fingerprints[source.where] = index.fingerprint
        if index.meta is None:
            unknown.append(source)
            _check_some_samples(dataset, position, source)
    warn_of_unknown(unknown)


def _check_some_samples(dataset: TextDataset, position: int, source: Source) -> None:
    """Read the first and the last sample of a stream, where their shards are on this machine already."""
    first_shard = int(dataset.shard_offset_per_stream[position])
    last_shard = first_shard + int(dataset.shards_per_stream[position]) - 1
    first_sample = int(dataset.sample_offset_per_stream[position])
    last_sample = first_sample + int(dataset.samples_per_stream[position]) - 1
    for shard_id, sample_id in ((first_shard, first_sample), (last_shard, last_sample)):
        shard: Any = dataset.shards[shard_id]
        if (source.folder / shard.raw_data.basename).is_file():
            dataset.get_item(sample_id)
