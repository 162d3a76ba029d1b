"""Load batches of text from MDS shards, for training and evaluation.

The loader reads shards written by `mptfoundry prepare` or llm-foundry. They have a column `tokens` (an array
of any integer type, or bytes of type `token_encoding_type`) or a column `text`, which is tokenized on the
fly. A *stream* is one dataset in the mix; a *sample* is one row of it. Start with `build_text_loader`.
`TextDataset` reads and checks each sample; the checks before a run are at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from composer.core import DataSpec
from streaming import StreamingDataLoader

from mptfoundry.config.data import TextLoaderConfig
from mptfoundry.data.collate import TextCollator, count_samples, count_tokens, filler_id
from mptfoundry.data.loading import LoaderContext, loader_options, raise_plainly
from mptfoundry.data.shards.token_ids import check_ids, read_sample
from mptfoundry.data.text.guarded import GuardedDataset, GuardedStream
from mptfoundry.data.text.streams import ShardStream, check_shards, plan_streams, warn_of_unknown
from mptfoundry.errors import ConfigError, DataError, first_line
from mptfoundry.ranks import once_per_node
from mptfoundry.tokenizer import AS_TEXT


def build_text_loader(loader: TextLoaderConfig, context: LoaderContext) -> DataSpec:
    """Build the loader of a dataset or mix, and run every check that doesn't need a batch.

    Returns:
        A Composer DataSpec; `mptfoundry.data.collate` describes its batches.

    Raises:
        ConfigError: The tokenizer has no EOS to separate documents.
        DataError: Shards are missing, damaged, empty, or made for another tokenizer or sequence length.
    """
    # The tokenizers library warns when a process that used its threads is forked into workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    streams = plan_streams(loader, context.where)
    try:
        dataset = TextDataset(loader, streams, context)
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{context.where}.dataset: {error}") from error
    once_per_node(dataset.check_files, what=f"{context.where}: checking shards")
    _check_streams(dataset, streams, context.tokenizer)
    if context.drops_last(loader) and len(dataset) < context.device_batch_size:
        raise DataError(
            f"{context.where}: {len(dataset)} samples for each device don't fill one batch of "
            f"{context.device_batch_size}. Use a smaller batch, more text, or drop_last: false."
        )
    return DataSpec(
        TextLoader(dataset, collate_fn=_collator(loader, context), **loader_options(loader, context)),
        get_num_samples_in_batch=count_samples,
        get_num_tokens_in_batch=count_tokens,
    )


# Keys of a text dataset that are passed to StreamingDataset.
STREAMING = (
    *("shuffle_algo", "shuffle_block_size", "num_canonical_nodes", "epoch_size", "predownload"),
    *("cache_limit", "download_retry", "download_timeout", "validate_hash", "keep_zip", "partition_algo"),
    *("sampling_method", "sampling_granularity", "batching_method", "allow_unsafe_types"),
)


class TextDataset(GuardedDataset):
    """A dataset of token ids that checks each sample when it is read.

    Args:
        loader: The loader's section of the config.
        streams: Where the shards of each stream are.
        context: What the loader needs from the run.

    Attributes:
        fingerprints: The content fingerprint of each stream, by its key in the config.
    """

    def __init__(
        self, loader: TextLoaderConfig, streams: Sequence[ShardStream], context: LoaderContext
    ) -> None:
        config = loader.dataset
        self.stream_names = [stream.where for stream in streams]
        self.tokenizer = context.tokenizer
        self.max_seq_len = context.max_seq_len
        self.vocab_size = context.model.vocab_size
        self.token_encoding_type = config.token_encoding_type
        self.as_text = config.special_tokens == AS_TEXT
        self.fingerprints: dict[str, str] = {}
        super().__init__(
            where=f"{context.where}.dataset",
            verify=config.verify,
            varies=context.is_training,
            streams=[GuardedStream(where=s.where, verify=config.verify, **s.arguments) for s in streams],
            batch_size=context.device_batch_size,
            shuffle=context.shuffles(loader),
            shuffle_seed=context.seed,
            **{name: getattr(config, name) for name in STREAMING},
        )

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Read one sample: `input_ids` (tokens,) int64 with 1 <= tokens <= max_seq_len, and `sample_id`.

        Raises:
            DataError: The sample can't be read, is too long, or has an id without an embedding.
        """
        try:
            sample = super().get_item(sample_id, retry)
        except Exception as error:  # a damaged sample can raise anything
            reason = first_line(self.background_error or error)
            raise DataError(f"{self._place(sample_id)} can't be read: {reason}.") from error
        content = read_sample(sample, self.token_encoding_type, self._place(sample_id))
        ids = self._ids_of_text(content) if isinstance(content, str) else content
        if len(ids) > self.max_seq_len:
            self._refuse_length(len(ids), sample_id)
        check_ids(ids, self.vocab_size, "model", self._place(sample_id))
        return {"input_ids": ids, "sample_id": int(sample_id)}

    def _ids_of_text(self, text: str) -> np.ndarray:
        options = {"split_special_tokens": True} if self.as_text else {}
        ids = self.tokenizer(text, truncation=True, max_length=self.max_seq_len, **options)["input_ids"]
        # Attention fails on a row that is all padding. A row of one token works and adds nothing to the loss.
        return np.asarray(ids or [filler_id(self.tokenizer)], np.int64)

    def _refuse_length(self, tokens: int, sample_id: int) -> NoReturn:
        raise DataError(
            f"{self._place(sample_id)} has {tokens} tokens; max_seq_len is {self.max_seq_len}. "
            f"Set max_seq_len: {tokens}, or prepare the text again for {self.max_seq_len}."
        )

    def _place(self, sample_id: int) -> str:
        shard_id, row = self.spanner[sample_id]
        shard: Any = self.shards[shard_id]
        return (
            f"{self.stream_names[self.stream_per_shard[shard_id]]}: sample {row} of {shard.raw_data.basename}"
        )


class TextLoader(StreamingDataLoader):
    """A StreamingDataLoader that checks that each epoch is complete and re-raises workers' DataErrors.

    Args:
        dataset: A GuardedDataset.
        loader: Arguments of StreamingDataLoader.
    """

    dataset: GuardedDataset

    def __init__(self, dataset: GuardedDataset, **loader: Any) -> None:
        workers = max(1, loader.get("num_workers", 0))
        # Workers write to it, so it is in shared memory.
        dataset.planned = torch.full((workers,), -1, dtype=torch.int64).share_memory_()
        super().__init__(dataset, **loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.dataset.planned.fill_(-1)
        try:
            yield from super().__iter__()
        except DataError as error:
            raise_plainly(error, self._iterator)
        self._check_that_all_came()

    def _check_that_all_came(self) -> None:
        """Raise DataError if the epoch ended before this rank read all of its samples."""
        planned, rows = self.dataset.planned, self.batch_size or 1
        due = int((planned // rows * rows if self.drop_last else planned).sum())
        if bool((planned < 0).any()) or self.num_samples_yielded != due:
            raise DataError(
                f"{self.dataset.where}: the epoch ended after {self.num_samples_yielded:,} samples of this "
                f"rank; its part has {due:,}. Samples were lost on the way: start again from the checkpoint."
            )


def _collator(loader: TextLoaderConfig, context: LoaderContext) -> TextCollator:
    filler = filler_id(context.tokenizer)
    if context.model.attn_config.attn_uses_sequence_id:
        return _separating_collator(loader, context, filler)
    return TextCollator(context.max_seq_len, filler)


def _separating_collator(loader: TextLoaderConfig, context: LoaderContext, filler: int) -> TextCollator:
    eos, bos = loader.dataset.eos_token_id, loader.dataset.bos_token_id
    if eos is None and bos is None:
        eos = context.tokenizer.eos_token_id
        if eos is None:
            where = f"{context.where}.dataset.eos_token_id"
            raise ConfigError(f"{where}: the tokenizer has no EOS. Give eos_token_id.")
    return TextCollator(context.max_seq_len, filler, eos, bos)


def _check_streams(dataset: TextDataset, streams: Sequence[ShardStream], tokenizer: Any) -> None:
    """Check each stream's index against the run; read a few samples if the index lacks metadata."""
    unknown = []
    for position, stream in enumerate(streams):
        index = check_shards(stream, tokenizer, dataset.max_seq_len)
        dataset.fingerprints[stream.where] = index.fingerprint
        if index.meta is None:
            unknown.append(stream)
            _check_some_samples(dataset, position, stream)
    if unknown:
        warn_of_unknown(unknown)


def _check_some_samples(dataset: TextDataset, position: int, stream: ShardStream) -> None:
    """Read the first and last samples of a stream if their shards are already on this machine."""
    first_shard = int(dataset.shard_offset_per_stream[position])
    last_shard = first_shard + int(dataset.shards_per_stream[position]) - 1
    first_sample = int(dataset.sample_offset_per_stream[position])
    last_sample = first_sample + int(dataset.samples_per_stream[position]) - 1
    for shard_id, sample_id in ((first_shard, first_sample), (last_shard, last_sample)):
        shard: Any = dataset.shards[shard_id]
        if (stream.folder / shard.raw_data.basename).is_file():
            dataset.get_item(sample_id)
