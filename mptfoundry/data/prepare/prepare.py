"""Tokenize text into shards for training: parallel, resumable, same bytes for any number of workers.

Documents, each followed by EOS unless `add_eos` is false, are concatenated into one stream of ids, which is
cut into samples of `max_seq_len` ids. The incomplete last sample is dropped and counted. The published MPT
models were prepared this way, and llm-foundry's `--concat_tokens` does the same. The split into units depends
only on the inputs, and on whether the tokenizer can encode a long text in pieces.
Workers encode units; this process joins the results in order, writes shards and saves its progress.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mptfoundry.config.verbs import PrepareConfig
from mptfoundry.data.jobs import Job, run_job
from mptfoundry.data.prepare.preparation import Preparation, find_finished, open_job, plan_preparation
from mptfoundry.data.prepare.sink import TooLittle, lock_folders
from mptfoundry.data.prepare.spark import encode_on_spark
from mptfoundry.data.prepare.summary import PrepareSummary, SplitSummary
from mptfoundry.data.prepare.work import work_of
from mptfoundry.data.records.records import BadInput, plan_units
from mptfoundry.data.shards.index import PREPARING, ShardMeta, read_index
from mptfoundry.errors import ConfigError, DataError

WORTH_KEEPING_SECONDS = 60


def prepare(inputs: Sequence[str], out: str | Path, **options: Any) -> PrepareSummary:
    """Tokenize text and write it as MDS shards to `out/split`.

    The same call resumes after a kill. If everything is finished, it does nothing and reports that.

    Args:
        inputs: Files, folders, folders saved by `datasets`, or `hf:NAME` (see `data.records.inputs`).
        out: Folder of the dataset; each split is a folder in it.
        options: Fields of `PrepareConfig`, such as `tokenizer`, `max_seq_len` and `held_out`.

    Raises:
        ConfigError: The tokenizer can't be loaded.
        DataError: An option, an input or the output folder is invalid. The call removes what it wrote,
            unless it keeps the finished work to resume from.
    """
    if options.get("workers", 1) is None:
        options["workers"] = "auto"
    try:
        config = PrepareConfig(inputs=tuple(inputs), out=str(out), **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return prepare_shards(config)


def prepare_shards(config: PrepareConfig) -> PrepareSummary:
    """Tokenize text and write it as MDS shards, like `prepare`."""
    started_at = time.perf_counter()
    plan = plan_preparation(config)
    is_marked = any((folder / PREPARING).exists() for folder in plan.folders.values())
    metas = [] if is_marked else find_finished(plan)
    if not metas:
        with _held(plan):
            # Another process may have finished between the first check and the lock.
            metas = find_finished(plan)
            if not metas:
                return _make(plan, started_at)
    seconds, texts = time.perf_counter() - started_at, plan.inventory.plain_text
    return PrepareSummary(
        _summarize(plan, metas), seconds, 0, plain_text=texts, borders=plan.in_words, was_finished=True
    )


@contextmanager
def _held(plan: Preparation) -> Iterator[None]:
    """Lock the output folders."""
    try:
        with lock_folders(*plan.folders.values()):
            yield
    except OSError as error:
        raise DataError(f"{plan.folder}: it can't be written ({error.strerror or error}).") from error


def _make(plan: Preparation, started_at: float) -> PrepareSummary:
    """Run the preparation. If it fails before any work is worth keeping, remove everything it wrote."""
    job, sink = open_job(plan)
    config = plan.config
    try:
        metas = run_job(
            job,
            plan_units(plan.inventory.inputs, plan.inventory.datasets, plan.can_cut),
            partial(work_of, plan.encoding),
            workers=None if config.workers == "auto" else config.workers,
            engine=partial(encode_on_spark, plan=plan.encoding) if config.engine == "spark" else None,
            progress=config.progress,
        )
    except BaseException as error:
        is_kept = _is_worth_keeping(job, error)
        if not is_kept:
            sink.remove()
            job.close()
        if isinstance(error, BadInput):
            raise DataError(f"{error} {_advice(plan, is_kept)}") from error
        raise
    skipped = dict(plan.inventory.skipped + sink.skipped)
    seconds, texts = time.perf_counter() - started_at, plan.inventory.plain_text
    return PrepareSummary(
        _summarize(plan, metas), seconds, sink.tokens, skipped, sink.problems, texts, plan.in_words
    )


def _advice(plan: Preparation, is_kept: bool) -> str:
    advice = "Or use bad_input=skip, which leaves out and counts all such input."
    if is_kept:
        advice += (
            f" {plan.folder} keeps the finished work: the same command with bad_input=skip continues from "
            "it. If you change the input instead, remove that folder first."
        )
    return advice


def _is_worth_keeping(job: Job, error: BaseException) -> bool:
    """Whether to keep saved work: not if the text is too short, and only long work after bad input."""
    return (
        job.saved_units > 0
        and not isinstance(error, TooLittle)
        and (not isinstance(error, BadInput) or job.seconds > WORTH_KEEPING_SECONDS)
    )


def _summarize(plan: Preparation, metas: Sequence[ShardMeta]) -> tuple[SplitSummary, ...]:
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
        for folder, meta in zip(plan.folders.values(), metas, strict=True)
    )
