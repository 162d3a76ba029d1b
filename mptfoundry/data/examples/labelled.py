"""Batches of labelled examples: texts with labels, words with labels, questions with answers.

Every record (see labelled_records.py) is checked and tokenized once, when the loader is built. It becomes an
*example*: `input_ids` (tokens,) int64, and its part of the batch that `LabelledCollator` describes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mptfoundry.data.collate import NOT_LEARNED, count_samples, filler_id
from mptfoundry.data.examples.labelled_records import (
    Checked,
    Record,
    Task,
    check_answer,
    check_text,
    check_words,
    read_records,
)
from mptfoundry.data.records.records import counted
from mptfoundry.data.records.sources import Source
from mptfoundry.errors import DataError

ROWS_AT_ONCE = 1000
# A place that no row has: an answer there isn't learned.
OUTSIDE = 2**31

log = logging.getLogger(__name__)


def build_labelled_loader(
    *,
    source: Source,
    fields: Mapping[str, str] | None = None,
    task: Task,
    labels: Mapping[str, int] | None = None,
    problem: str = "single_label_classification",
    tokenizer: Any,
    max_seq_len: int,
    device_batch_size: int,
    shuffle: bool = False,
    seed: int = 9176,
    drop_last: bool = True,
    num_workers: int = 0,
    is_training: bool = True,
    where: str = "train_loader",
) -> DataSpec:
    """Build the loader of a data set.

    Args:
        source: Files, a folder or a data set.
        fields: Names of a record's fields -> their names in the data, where they differ.
        task: What a record holds.
        labels: The labels' numbers by name; for spans none.
        problem: For `sequence`: transformers' `problem_type`.
        tokenizer: transformers' fast tokenizer; two texts are joined as it joins pairs.
        max_seq_len: Tokens of an example; longer ones are cut at their end, which is said once.
        device_batch_size: Rows in a batch of one device.
        shuffle: Shuffle anew in each epoch, from `seed`: the same order whatever the number of devices.
        drop_last: Leave out a last batch that is not full.
        num_workers: Processes that collate; 0 does it in the training process.
        is_training: Epochs differ, and examples in which nothing to learn is left are left out. An evaluation
            keeps them, and always reads the samples of the first epoch, in their order.
        where: What the user calls this loader, for errors.

    Returns:
        Composer's DataSpec.

    Raises:
        DataError: Files are missing or damaged, a record doesn't hold what it should, or there are too few.
    """
    records = read_records(source, fields or {})
    encoded = [
        *encode(records, tokenizer, max_seq_len, task=task, labels=labels or {}, problem=problem),
    ]
    examples = [example for example, _ in encoded if not is_training or _is_learned(example)]
    _say_what_was_cut(sum(is_cut for _, is_cut in encoded), len(encoded) - len(examples), max_seq_len, where)
    sampler = PlacedSampler(
        range(len(examples)),  # type: ignore[arg-type]
        varies=is_training,
        num_replicas=dist.get_world_size(),
        rank=dist.get_global_rank(),
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )
    if not examples or (drop_last and len(sampler) < device_batch_size):
        raise DataError(
            f"{where}: {counted(len(examples), 'example')} can't fill one batch of {device_batch_size} on "
            "each device. "
            f"Use a smaller batch, more examples, or drop_last: false."
        )
    loader: DataLoader[Any] = DataLoader(
        LabelledDataset(examples, sampler, source.where),
        batch_size=device_batch_size,
        sampler=sampler,
        collate_fn=LabelledCollator(filler_id(tokenizer)),
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: making an iterator must not advance the random state that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count_tokens)


class PlacedSampler(DistributedSampler):
    """Torch's DistributedSampler, which a checkpoint can place inside of an epoch.

    Args:
        varies: Epochs differ; otherwise each is as the first.
        sampler: Arguments of DistributedSampler.
    """

    def __init__(self, *dataset: Any, varies: bool, **sampler: Any) -> None:
        super().__init__(*dataset, **sampler)
        self._varies = varies
        self._resumed = (-1, 0)

    def resume(self, epoch: int, samples: int) -> None:
        """Begin `epoch` behind so many of its samples, of all ranks together."""
        self._resumed = (epoch, samples)

    def set_epoch(self, epoch: int) -> None:
        """Composer says which epoch is read; in an evaluation it gives the batch."""
        super().set_epoch(epoch if self._varies else 0)

    def __iter__(self) -> Iterator[Any]:
        epoch, samples = self._resumed
        yield from islice(
            super().__iter__(), samples // self.num_replicas if self.epoch == epoch else 0, None
        )


class LabelledDataset(Dataset):
    """Examples in memory.

    Args:
        examples: All of them.
        sampler: Says which come next.
        where: Their key in the config.

    Attributes:
        fingerprints: The examples' content, by their key in the config.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], sampler: PlacedSampler, where: str) -> None:
        self.examples = examples
        self._sampler = sampler
        digest = hashlib.sha256()
        for example in examples:
            for name, value in example.items():
                content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
                digest.update(f"{name} {len(content)}\n".encode() + content)
        self.fingerprints = {where: digest.hexdigest()}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.examples[number]

    def resume(self, epoch: int, samples: int) -> None:
        """Begin `epoch` behind so many of its samples, of all ranks together."""
        self._sampler.resume(epoch, samples)


@dataclass(frozen=True)
class LabelledCollator:
    """Stack examples; pad short ones at the end, to the longest.

    A batch has `input_ids` (batch, seq) int64; `attention_mask` (batch, seq) bool and `max_documents`, 1, if
    something is padded; and by task `labels`, (batch,) int64 or float32, (batch, num_labels) float32, or
    (batch, seq) int64, -100 where not learned; or `start_positions` and `end_positions` (batch,) int64,
    `offsets` (batch, seq, 2) int64 (a token's characters in the context, 0 and 0 outside of it), `context`, a
    list of texts, and `answers`, a list of lists of texts.

    Attributes:
        pad_token_id: What fills short rows.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of examples."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        seq = int(lengths.max())
        fillers = {"input_ids": self.pad_token_id, "labels": NOT_LEARNED, "offsets": 0}
        batch: dict[str, Any] = {}
        for name, first in examples[0].items():
            values = [example[name] for example in examples]
            if isinstance(first, np.ndarray) and first.ndim and first.dtype == np.int64:
                values = [_pad(value, seq, fillers[name]) for value in values]
            is_list = isinstance(first, (str, list))
            batch[name] = values if is_list else torch.from_numpy(np.stack(values))
        if int(lengths.min()) < seq:
            batch |= {"attention_mask": torch.arange(seq) < lengths[:, None], "max_documents": 1}
        return batch


def count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Tokens in a batch, padding left out (`total`), and what its mean loss divides by (`loss_generating`):
    learned tokens, learned answers, or rows.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is None:
        learned = int((batch["start_positions"] < ids.shape[1]).sum())
    elif labels.ndim == 2 and not labels.is_floating_point():
        learned = int((labels != NOT_LEARNED).sum())
    else:
        learned = len(ids)
    return {"total": int(batch.get("attention_mask", torch.ones_like(ids)).sum()), "loss_generating": learned}


def encode(
    records: Iterator[Record],
    tokenizer: Any,
    max_seq_len: int,
    *,
    task: Task,
    labels: Mapping[str, int],
    problem: str,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Check and tokenize records; arguments are those of `build_labelled_loader`.

    Yields:
        An example, and whether it was cut.

    Raises:
        DataError: A record does not hold what it should.
    """
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        if task == "sequence":
            checked = [check_text(record, labels, problem) for record in chunk]
        elif task == "token":
            checked = [check_words(record, labels) for record in chunk]
        else:
            checked = [check_answer(record) for record in chunk]
        encodings = _tokenize(chunk, checked, tokenizer, max_seq_len, task)
        for record, (_, context, wanted), encoding in zip(chunk, checked, encodings, strict=True):
            if not encoding.ids:
                raise DataError(f"{record.where()}: the tokenizer makes no token of its text.")
            example: dict[str, Any] = {"input_ids": np.asarray(encoding.ids, np.int64)}
            if task == "sequence":
                kind = np.int64 if problem == "single_label_classification" else np.float32
                example["labels"] = np.asarray(wanted, kind)
            elif task == "token":
                example["labels"] = _labels_of_tokens(encoding, wanted, record)
            else:
                example |= _span_of_tokens(encoding, *wanted) | {"context": context, "answers": wanted[1]}
            yield example, bool(encoding.overflowing)


def _tokenize(
    records: Sequence[Record], checked: Sequence[Checked], tokenizer: Any, max_seq_len: int, task: Task
) -> list[Any]:
    """An Encoding of the tokenizers library for each record."""
    firsts, seconds = [entry.first for entry in checked], [entry.second for entry in checked]
    for record, second in zip(records, seconds, strict=True):
        if (second is None) != (seconds[0] is None):
            raise record.error("text_pair", "some records have it and others don't. Give it to all or none")
    if task == "span":
        for record, ids in zip(records, tokenizer(firsts)["input_ids"], strict=True):
            if len(ids) >= max_seq_len:
                raise record.error("question", f"has {len(ids)} tokens of {max_seq_len}: no room for more")
    return tokenizer(
        firsts,
        None if seconds[0] is None else seconds,
        truncation="only_second" if task == "span" else True,
        max_length=max_seq_len,
        return_offsets_mapping=True,
    ).encodings


def _labels_of_tokens(
    encoding: Any, words: tuple[Sequence[int], Sequence[int]], record: Record
) -> np.ndarray:
    """Each word's label at its first token, -100 at all others: (tokens,) int64."""
    begins, numbers = words
    labels = np.full(len(encoding.ids), NOT_LEARNED, np.int64)
    last = -1
    for token, (begin, end) in enumerate(encoding.offsets):
        # By its last character, since a token may begin with the space before its word.
        word = bisect_right(begins, end - 1) - 1
        if begin < end and word > last:
            if word > last + 1:
                raise record.error("words", f"word {last + 1} has no token of its own")
            labels[token], last = numbers[word], word
    return labels


def _span_of_tokens(encoding: Any, begin: int, answers: Sequence[str]) -> dict[str, Any]:
    """The first answer's first and last token, or OUTSIDE where it was cut off; and where tokens stand."""
    end = begin + len(answers[0].rstrip())
    offsets = np.asarray(encoding.offsets, np.int64)
    offsets[[part != 1 for part in encoding.sequence_ids]] = 0
    tokens = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end) & (offsets[:, 0] < offsets[:, 1]))
    is_whole = len(tokens) > 0 and offsets[tokens[-1], 1] >= end
    first, last = (tokens[0], tokens[-1]) if is_whole else (OUTSIDE, OUTSIDE)
    return {"start_positions": np.int64(first), "end_positions": np.int64(last), "offsets": offsets}


def _is_learned(example: Mapping[str, Any]) -> bool:
    if "start_positions" in example:
        return example["start_positions"] != OUTSIDE
    labels = example["labels"]
    return labels.dtype != np.int64 or bool((labels != NOT_LEARNED).any())


def _say_what_was_cut(cut: int, left_out: int, max_seq_len: int, where: str) -> None:
    """One line, on the first rank."""
    if not (cut or left_out) or os.environ.get("RANK", "0") != "0":
        return
    lost = f"; {left_out} of which nothing to learn was left were left out" * bool(left_out)
    text = "%s: %s examples are longer than max_seq_len: %s and were cut at their end%s."
    log.warning(text, where, cut, max_seq_len, lost)


def _pad(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    rest = [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, rest, constant_values=filler)
