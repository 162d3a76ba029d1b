"""Load batches of labelled examples: texts with labels, words with labels, questions with answers.

Each record (see `labelled_records.py`) is checked, tokenized once and stored on disk (see
`labelled_store.py`). The resulting *example* has `input_ids` (tokens,) int64 and the task's fields, which
`LabelledCollator` describes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mptfoundry.config.data import LabelledLoaderConfig, sources_by_key
from mptfoundry.data.collate import count_samples, count_tokens, filler_id
from mptfoundry.data.examples.labelled_store import LabelledStore, prepare_labelled
from mptfoundry.data.loading import LoaderContext, loader_options
from mptfoundry.data.records.records import counted
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.ranks import once_per_node, rank, world_size

log = logging.getLogger(__name__)


def build_labelled_loader(loader: LabelledLoaderConfig, context: LoaderContext) -> DataSpec:
    """Build the loader of a labelled dataset for the model's head.

    Two texts are joined the way the tokenizer joins pairs. Examples longer than `max_seq_len` are truncated
    (see `LabelledPlan`). Training skips examples without a label left; an evaluation keeps them.

    Raises:
        ConfigError: The model has no head.
        DataError: Files are missing or damaged, a record is invalid, or there are too few records.
    """
    where = context.where
    if not isinstance(context.model, HeadConfig):
        raise ConfigError(f"{where}.name: labelled: the model has no head for labels. Use text.")
    (key,) = sources_by_key(loader, where)
    examples = load_labelled(key, loader, context)
    options = loader_options(loader, context)
    sampler = PlacedSampler(
        range(len(examples)),  # type: ignore[arg-type]
        varies=context.is_training,
        num_replicas=world_size(),
        rank=rank(),
        shuffle=context.shuffles(loader),
        seed=context.seed,
        drop_last=options["drop_last"],
    )
    if not examples or (options["drop_last"] and len(sampler) < context.device_batch_size):
        raise DataError(
            f"{where}: {counted(len(examples), 'example')} can't fill one batch of "
            f"{context.device_batch_size} on each device. Use a smaller batch, more examples, or "
            "drop_last: false."
        )
    return DataSpec(
        DataLoader(
            LabelledDataset(examples, sampler, key),
            sampler=sampler,
            collate_fn=LabelledCollator(filler_id(context.tokenizer)),
            **options,
        ),
        get_num_samples_in_batch=count_samples,
        get_num_tokens_in_batch=count_tokens,
    )


def load_labelled(key: str, loader: LabelledLoaderConfig, context: LoaderContext) -> LabelledStore:
    """Load the examples of the dataset at `key`; one process per node prepares them if needed.

    Raises:
        DataError: Records are missing, damaged or invalid.
    """
    speaks = rank() == 0

    def say(text: str) -> None:
        if speaks:
            print(text, flush=True)

    def prepare() -> str:
        return str(prepare_labelled(key, loader.dataset, context, say=say, progress=speaks))

    folder = once_per_node(prepare, what=f"{context.where}: preparing examples", say=say)
    examples = LabelledStore(folder, trained_only=context.is_training)
    if speaks:
        _say_what_was_cut(examples.cut, examples.left_out, context.max_seq_len, context.where)
    return examples


class PlacedSampler(DistributedSampler):
    """A DistributedSampler that can resume inside an epoch.

    Args:
        varies: Whether epochs differ. If False, every epoch is the same as the first.
        sampler: Arguments of DistributedSampler.
    """

    def __init__(self, *dataset: Any, varies: bool, **sampler: Any) -> None:
        super().__init__(*dataset, **sampler)
        self._varies = varies
        self._resumed = (-1, 0)

    def resume(self, epoch: int, samples: int) -> None:
        """Skip the first `samples` samples of `epoch`, counted over all ranks."""
        self._resumed = (epoch, samples)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Composer calls this, but in an evaluation it passes the batch."""
        super().set_epoch(epoch if self._varies else 0)

    def __iter__(self) -> Iterator[Any]:
        epoch, samples = self._resumed
        yield from islice(
            super().__iter__(), samples // self.num_replicas if self.epoch == epoch else 0, None
        )


class LabelledDataset(Dataset):
    """Labelled examples, by index.

    Args:
        examples: The examples.
        sampler: The sampler that `resume` repositions.
        where: The dataset's key in the config.

    Attributes:
        fingerprints: The content fingerprint of the examples, by their key in the config.
    """

    def __init__(self, examples: LabelledStore, sampler: PlacedSampler, where: str) -> None:
        self.examples = examples
        self._sampler = sampler
        self.fingerprints = {where: examples.fingerprint}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.examples[number]

    def resume(self, epoch: int, samples: int) -> None:
        """Skip the first `samples` samples of `epoch`, counted over all ranks."""
        self._sampler.resume(epoch, samples)


@dataclass(frozen=True)
class LabelledCollator:
    """Stack examples and pad them at the end to the longest.

    A batch has `input_ids` (batch, seq) int64, and if there is padding, `attention_mask` (batch, seq) bool
    and `max_documents`, 1. Two lists are for counting: `row_tokens`, the tokens in each row, and
    `row_trained`, what each row adds to the loss's divisor: its tokens, its spans, or 1. The other fields
    depend on the task:

    - classification of sequences: `labels` (batch,) int64 or float32, or (batch, num_labels) float32
    - classification of tokens: `labels` (batch, seq) int64, -100 if not in the loss
    - spans: `start_positions` and `end_positions` (batch,) int64; `offsets` (batch, seq, 2) int64, each
      token's characters in the context, or (0, 0) outside it; `context`, a list of texts; `answers`, a list
      of lists of texts

    Attributes:
        pad_token_id: Pads short rows.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        seq = int(lengths.max())
        fillers = {"input_ids": self.pad_token_id, "labels": NOT_IN_LOSS, "offsets": 0}
        batch: dict[str, Any] = {}
        for name, first in examples[0].items():
            values = [example[name] for example in examples]
            if isinstance(first, np.ndarray) and first.ndim and first.dtype == np.int64:
                values = [_pad(value, seq, fillers[name]) for value in values]
            is_list = isinstance(first, (str, list))
            batch[name] = values if is_list else torch.from_numpy(np.stack(values))
        if int(lengths.min()) < seq:
            batch |= {"attention_mask": torch.arange(seq) < lengths[:, None], "max_documents": 1}
        return batch | {"row_tokens": lengths.tolist(), "row_trained": _trained_in_rows(batch)}


def _trained_in_rows(batch: Mapping[str, Any]) -> list[int]:
    """Count what each row adds to the loss's divisor: its tokens or spans in the loss, or 1."""
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is None:
        return (batch["start_positions"] < ids.shape[1]).int().tolist()
    if labels.ndim == 2 and not labels.is_floating_point():
        return (labels != NOT_IN_LOSS).sum(1).tolist()
    return [1] * len(ids)


def _say_what_was_cut(cut: int, left_out: int, max_seq_len: int, where: str) -> None:
    if not (cut or left_out):
        return
    lost = f"; training skips {counted(left_out, 'example')} without a label left" * bool(left_out)
    text = "%s: max_seq_len: %s truncates %s%s."
    log.warning(text, where, max_seq_len, counted(cut, "example"), lost)


def _pad(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    rest = [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, rest, constant_values=filler)
