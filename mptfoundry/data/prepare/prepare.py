"""From text to shards that training reads: parallel, resumable, the same bytes for any number of workers.

Documents are joined, each followed by EOS, into one stream of ids, and the stream is cut into samples of
`max_seq_len` ids; what remains after the last whole sample is dropped and counted. (As for the published MPT
models, and as llm-foundry's `--concat_tokens` does.) The inputs alone decide how the work is cut into units;
workers encode units, and this process joins the results in order, writes shards, and keeps a journal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mptfoundry.data.prepare.job import Job, find_finished, open_journal, plan_job
from mptfoundry.data.prepare.journal import Journal, locked
from mptfoundry.data.prepare.spark import encode_on_spark
from mptfoundry.data.prepare.summary import PrepareSummary, SplitSummary
from mptfoundry.data.prepare.work import EncodingPlan, encode_units
from mptfoundry.data.records.records import BadInput, plan_units
from mptfoundry.data.shards.index import PREPARING, ShardMeta, read_index
from mptfoundry.errors import DataError


class TooLittle(DataError):
    """The whole text does not give one sample."""


SMALLEST_PARALLEL_BYTES = 1 << 22
WORTH_KEEPING_SECONDS = 60


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str,
    max_seq_len: int,
    split: str = "train",
    engine: Literal["local", "spark"] = "local",
    workers: int | None = None,
    text_key: str = "text",
    add_eos: bool = True,
    add_bos: bool | Literal["auto"] = "auto",
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens",
    held_out: float = 0.0,
    held_out_split: str = "val",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hf_subset: str | None = None,
    hf_split: str = "train",
    bad_input: str = "error",
    compression: str | None = None,
    shard_bytes: int = 1 << 26,
    progress: bool = True,
) -> PrepareSummary:
    """Tokenize text and write it as MDS shards to `out/split`.

    The same call continues where a killed one stopped; called once more it says that it is finished.

    Args:
        inputs: Files, folders, folders saved by `datasets`, or `hf:NAME` (see `data.records.inputs`).
        out: Folder of the data set; splits are folders below it.
        tokenizer: Folder or hub name.
        max_seq_len: Tokens in a sample.
        split: Name of the main split.
        engine: Who encodes: processes of this machine, or a Spark cluster, which has workers of its own.
        workers: Processes that encode. Default: one for each core.
        text_key: The field of a record that holds its text.
        add_eos: Put the tokenizer's EOS after each document, once.
        add_bos: Put the tokenizer's BOS before each document, once; `auto`: if the tokenizer does by itself.
        special_tokens: What a text that spells one of them, such as `<|endoftext|>`, becomes: that token, or
            the text's own ids.
        held_out: Share of the documents, chosen by a hash of their text, that goes to another split.
        held_out_split: Name of that split.
        include: Patterns such as `*.py`: read only these files of a folder.
        exclude: Patterns of files and folders to leave out.
        hf_subset: Configuration of a data set of the hub.
        hf_split: Split of a Hugging Face data set.
        bad_input: `error`, or `skip` to leave out and count what is no UTF-8, no JSON or no record.
        compression: `zstd`, `br`, `bz2` or `snappy`, with `:LEVEL` if wanted. Default: none.
        shard_bytes: The most bytes in a shard before compression.
        progress: Show a progress bar on stderr.

    Raises:
        ConfigError: The tokenizer can't be loaded.
        DataError: An argument, an input or the output folder won't do. Nothing is left behind, except where
            so much was done that the folder is kept, marked, to continue from.
    """
    started_at = time.perf_counter()
    job = plan_job(
        inputs,
        Path(out).expanduser(),
        tokenizer,
        {
            "max_seq_len": max_seq_len,
            "split": split,
            "text_key": text_key,
            "add_eos": add_eos,
            "add_bos": add_bos,
            **({"special_tokens": special_tokens} if special_tokens != "as_tokens" else {}),
            "held_out": held_out,
            "held_out_split": held_out_split if held_out else None,
            "include": list(include),
            "exclude": list(exclude),
            "hf_subset": hf_subset,
            "hf_split": hf_split,
            "compression": compression,
            "shard_bytes": shard_bytes,
        },
        bad_input,
    )
    is_marked = any((folder / PREPARING).exists() for folder in job.folders.values())
    metas = [] if is_marked else find_finished(job)
    if not metas:
        with _held(job):
            # Between that look and the lock another process may have prepared it.
            metas = find_finished(job)
            if not metas:
                workers = workers or len(os.sched_getaffinity(0))
                return _make(job, engine, workers, progress, started_at)
    seconds, texts = time.perf_counter() - started_at, job.inventory.plain_text
    return PrepareSummary(
        _summarize(job, metas), seconds, 0, plain_text=texts, borders=job.in_words, was_finished=True
    )


@contextmanager
def _held(job: Job) -> Iterator[None]:
    """Hold the output folders."""
    try:
        with locked(*job.folders.values()):
            yield
    except OSError as error:
        raise DataError(f"{job.folder}: it can't be written ({error.strerror or error}).") from error


def _make(job: Job, engine: str, workers: int, progress: bool, started_at: float) -> PrepareSummary:
    """Prepare; if an error ends the work before much was done, leave no trace of it."""
    journal = open_journal(job)
    try:
        encoded_tokens = _encode(job, journal, engine, workers, progress)
        metas = _finish(job, journal)
    except BaseException as error:
        is_kept = _is_worth_keeping(journal, error)
        if not is_kept:
            journal.remove()
        if isinstance(error, BadInput):
            raise DataError(f"{error} {_advice(job, is_kept)}") from error
        raise
    skipped = dict(job.inventory.skipped + journal.skipped)
    seconds, texts = time.perf_counter() - started_at, job.inventory.plain_text
    return PrepareSummary(
        _summarize(job, metas), seconds, encoded_tokens, skipped, journal.problems, texts, job.in_words
    )


def _advice(job: Job, is_kept: bool) -> str:
    advice = "Or use bad_input=skip, which leaves out and counts all such input."
    if is_kept:
        advice += (
            f" What was done is kept in {job.folder}: with bad_input=skip the same command continues; after "
            "a change of the input, remove that folder first."
        )
    return advice


def _is_worth_keeping(journal: Journal, error: BaseException) -> bool:
    """An input that must be changed makes a short beginning worthless; after an interruption it is not."""
    return (
        journal.saved_units > 0
        and not isinstance(error, TooLittle)
        and (not isinstance(error, BadInput) or journal.seconds > WORTH_KEEPING_SECONDS)
    )


def _encode(job: Job, journal: Journal, engine: str, workers: int, progress: bool) -> int:
    """Encode the units that the journal does not hold yet; returns how many tokens that gave."""
    plan = EncodingPlan(
        job.tokenizer_json,
        job.dtype,
        job.options["text_key"],
        job.borders,
        "special_tokens" in job.options,
        job.options["held_out"],
        job.skip_bad_input,
        job.inventory.datasets,
    )
    units = islice(plan_units(job.inventory.inputs, plan.datasets, job.encoder.can_cut), journal.units, None)
    if job.inventory.size - journal.weight < SMALLEST_PARALLEL_BYTES:
        workers = 1
    is_spark = engine == "spark"
    results = encode_on_spark(units, plan) if is_spark else encode_units(units, plan, workers, job.encoder)
    tokens = 0
    seconds_before, started_at = journal.seconds, time.monotonic()
    with tqdm(
        total=job.inventory.size,
        initial=journal.weight,
        desc=f"prepare {job.options['split']}",
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for result in results:
            journal.add(result)
            tokens += (len(result.kept.ids) + len(result.held_out.ids)) // job.id_bytes
            seconds = max(time.monotonic() - started_at, 1e-9)
            journal.seconds = seconds_before + seconds
            bar.set_postfix_str(f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(result.weight)
    return tokens


def _finish(job: Job, journal: Journal) -> list[ShardMeta]:
    """Write the last shards, then the indexes, the main split's last; from then on the data set is complete.

    Raises:
        DataError: A split does not have one whole sample.
    """
    metas = []
    for name, progress in journal.splits.items():
        dropped = progress.writer.finish() // job.id_bytes
        samples = sum(int(shard["samples"]) for shard in progress.writer.shards)
        if not samples:
            raise TooLittle(
                f"{progress.writer.folder}: the text gives {dropped:,} tokens, less than one sample of "
                f"{job.options['max_seq_len']:,}. Give more text{', or more held_out' * (name != job.split)}."
            )
        metas.append(job.meta(samples, dropped, progress.documents, progress.text_bytes))
    for progress, meta in reversed(list(zip(journal.splits.values(), metas, strict=True))):
        progress.writer.write_index(meta)
    journal.close()
    return metas


def _summarize(job: Job, metas: Sequence[ShardMeta]) -> tuple[SplitSummary, ...]:
    return tuple(
        SplitSummary(
            split=folder.name,
            folder=folder,
            documents=meta.documents,
            samples=meta.samples,
            tokens=meta.tokens,
            bytes=meta.bytes,
            dropped_tokens=meta.dropped_tokens,
            shards=len(read_index(folder, str(folder)).shards),
        )
        for folder, meta in zip(job.folders.values(), metas, strict=True)
    )
