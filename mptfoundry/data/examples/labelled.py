"""Batches of labelled examples: texts with labels, words with labels, questions with answers.

Every record (see labelled_records.py) is checked and tokenized once, when the loader is built. It becomes an
*example*: `input_ids` (tokens,) int64, and its part of the batch that `LabelledCollator` describes.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mptfoundry.config.data import LabelledLoaderConfig, sources_by_key
from mptfoundry.data.collate import NOT_LEARNED, count_samples, filler_id
from mptfoundry.data.examples.cache import cache_folder
from mptfoundry.data.examples.labelled_records import (
    Checked,
    Record,
    check_answer,
    check_text,
    check_words,
    read_records,
)
from mptfoundry.data.loading import LoaderContext, loader_options
from mptfoundry.data.records.records import counted
from mptfoundry.data.records.sources import find_records
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.mpt.head_config import (
    HeadConfig,
    SequenceClassifierConfig,
    SpanFinderConfig,
    TokenClassifierConfig,
)
from mptfoundry.ranks import rank, world_size

ROWS_AT_ONCE = 1000
# A place that no row has: an answer there isn't learned.
OUTSIDE = 2**31

log = logging.getLogger(__name__)


def build_labelled_loader(loader: LabelledLoaderConfig, context: LoaderContext) -> DataSpec:
    """Build the loader of a data set of labelled examples, for the model's head.

    Two texts are joined as the tokenizer joins pairs. Examples longer than `max_seq_len` are cut at their
    end. In training, examples that lost all they were to teach are left out; an evaluation keeps them.

    Raises:
        ConfigError: The model has no head.
        DataError: Files are missing or damaged, a record doesn't hold what it should, or there are too few.
    """
    head, dataset, where = context.model, loader.dataset, context.where
    if not isinstance(head, HeadConfig):
        raise ConfigError(f"{where}.name: labelled: the model has no head for labels. Use text.")
    ((key, source),) = sources_by_key(loader, where).items()
    records = read_records(find_records(source, key, cache_folder(None)), dataset.fields)
    encoded = [*encode(records, context.tokenizer, context.max_seq_len, head)]
    examples = [example for example, _ in encoded if not context.is_training or _is_trained(example)]
    left_out = len(encoded) - len(examples)
    _say_what_was_cut(sum(is_cut for _, is_cut in encoded), left_out, context.max_seq_len, where)
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
    records: Iterator[Record], tokenizer: Any, max_seq_len: int, head: HeadConfig
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Check and tokenize records for a model's head.

    Args:
        records: As the head needs them.
        tokenizer: transformers' fast tokenizer.
        max_seq_len: The most tokens of an example.
        head: Its config.

    Yields:
        An example, and whether it was cut.

    Raises:
        DataError: A record does not hold what it should.
    """
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        checked = [_checked(record, head) for record in chunk]
        encodings = _tokenize(
            chunk, checked, tokenizer, max_seq_len, is_span=isinstance(head, SpanFinderConfig)
        )
        for record, (_, context, answer), encoding in zip(chunk, checked, encodings, strict=True):
            if not encoding.ids:
                raise DataError(f"{record.where()}: the tokenizer makes no token of its text.")
            example: dict[str, Any] = {"input_ids": np.asarray(encoding.ids, np.int64)}
            if isinstance(head, SequenceClassifierConfig):
                kind = np.int64 if head.problem == "single_label_classification" else np.float32
                example["labels"] = np.asarray(answer, kind)
            elif isinstance(head, TokenClassifierConfig):
                example["labels"] = _labels_of_tokens(encoding, answer, record)
            else:
                example |= _span_of_tokens(encoding, *answer) | {"context": context, "answers": answer[1]}
            yield example, bool(encoding.overflowing)


def _checked(record: Record, head: HeadConfig) -> Checked:
    if isinstance(head, SequenceClassifierConfig):
        return check_text(record, head.label2id, head.problem)
    if isinstance(head, TokenClassifierConfig):
        return check_words(record, head.label2id)
    return check_answer(record)


def _tokenize(
    records: Sequence[Record], checked: Sequence[Checked], tokenizer: Any, max_seq_len: int, *, is_span: bool
) -> list[Any]:
    """An Encoding of the tokenizers library for each record."""
    firsts, seconds = [entry.first for entry in checked], [entry.second for entry in checked]
    for record, second in zip(records, seconds, strict=True):
        if (second is None) != (seconds[0] is None):
            raise record.error("text_pair", "some records have it and others don't. Give it to all or none")
    if is_span:
        for record, ids in zip(records, tokenizer(firsts)["input_ids"], strict=True):
            if len(ids) >= max_seq_len:
                raise record.error("question", f"has {len(ids)} tokens of {max_seq_len}: no room for more")
    return tokenizer(
        firsts,
        None if seconds[0] is None else seconds,
        truncation="only_second" if is_span else True,
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


def _is_trained(example: Mapping[str, Any]) -> bool:
    if "start_positions" in example:
        return example["start_positions"] != OUTSIDE
    labels = example["labels"]
    return labels.dtype != np.int64 or bool((labels != NOT_LEARNED).any())


def _say_what_was_cut(cut: int, left_out: int, max_seq_len: int, where: str) -> None:
    """One line, on the first rank."""
    if not (cut or left_out) or rank() != 0:
        return
    lost = f"; {left_out} of which nothing to learn was left were left out" * bool(left_out)
    text = "%s: %s examples are longer than max_seq_len: %s and were cut at their end%s."
    log.warning(text, where, cut, max_seq_len, lost)


def _pad(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    rest = [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, rest, constant_values=filler)
