"""Records become an example store once; afterwards the store is found by what it was made of.

A store lies in the cache folder under a hash of the inputs' content, the tokenizer and all settings that the
examples depend on. It is compared with its checksums before it is used, and made again where it is damaged.
While it is made, its finished parts lie next to it, so that a preparation that is killed continues there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.examples.store import ExampleStore, ExampleWriter, why_damaged, write_examples
from mptfoundry.data.examples.turns import Counts, ExampleMaker, ExamplePlan, Targets, UnitExamples, source_of
from mptfoundry.data.jobs import in_processes
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.records.inputs import Inventory
from mptfoundry.data.records.records import UNIT_BYTES, UNIT_ROWS, plan_units
from mptfoundry.data.records.sources import content_digest, find_records
from mptfoundry.data.shards.index import narrowest_dtype
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.tokenizer import AS_TEXT, backend_parts, count_ids, fingerprint, own_borders

VERSION = 3
UNITS_OF_A_PART = 16
SMALLEST_PARALLEL_BYTES = 1 << 23


def cache_folder(given: str | None) -> Path:
    """Where stores lie: what the user says, or a folder of the user's own cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{home}/mptfoundry/examples").expanduser()


def prepare_examples(
    where: str,
    source: RecordsConfig,
    dataset: FinetuningDatasetConfig,
    context: LoaderContext,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """The folder of a source's example store, which is made if it is not there or damaged.

    Args:
        where: The source's key in the config.
        source: Where the records are.
        dataset: Its data set: which tokens are in the loss, and where the cache is.
        context: Of the run; its tokenizer and `max_seq_len` are used.
        workers: Processes. Default: one for each processor, or none for little data.
        say: Is told what happens.
        progress: Show a progress bar.

    Raises:
        ConfigError: A function of the user's makes the records, and the command line did not allow code.
        DataError: The records can't be found, or the cache can't be written to.
    """
    if isinstance(source.preprocessing_fn, str) and not context.allow_code:
        raise ConfigError(
            f"{where}.preprocessing_fn: {source.preprocessing_fn} is code. Run it with allow_code=true on "
            "the command line."
        )
    cache, tokenizer = cache_folder(dataset.cache_folder), context.tokenizer
    inventory = find_records(source, where, cache)
    vocab_size = count_ids(tokenizer)
    plan = ExamplePlan(
        tokenizer,
        context.max_seq_len,
        Targets(dataset.target_prompts, dataset.target_responses),
        source.preprocessing_fn,
        narrowest_dtype(vocab_size),
        inventory.datasets,
        dataset.token_encoding_type,
        as_text=dataset.special_tokens == AS_TEXT,
    )
    folder = cache / _identity(plan, content_digest(inventory, cache), say)
    title = f"{where}: checking examples" if progress and inventory.size >= SMALLEST_PARALLEL_BYTES else ""
    if why_damaged(folder, title=title) is None:
        return folder
    try:
        with _held(folder, say) as parts:
            problem = why_damaged(folder)
            if problem is not None:
                if folder.exists():
                    say(f"{where}: the examples are made again: {folder} {problem}")
                _make(folder, parts, inventory, plan, vocab_size, workers, progress, where)
    except OSError as error:
        raise DataError(f"{folder}: it can't be written ({error.strerror or error}).") from error
    return folder


def _identity(plan: ExamplePlan, inputs: str, say: Callable[[str], None]) -> str:
    """A hash of everything that the examples depend on."""
    tokenizer = plan.tokenizer
    settings = {
        "version": [VERSION, UNIT_BYTES, UNIT_ROWS, UNITS_OF_A_PART],
        "inputs": inputs,
        "tokenizer": [fingerprint(tokenizer), backend_parts(tokenizer)["post_processor"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, *own_borders(tokenizer).after],
        "chat_template": tokenizer.chat_template,
        "max_seq_len": plan.max_seq_len,
        "targets": asdict(plan.targets),
        "preprocessing": _identity_of(plan.preprocessing, say),
        "token_encoding_type": plan.token_encoding_type,
    }
    if plan.as_text:
        settings["special_tokens"] = AS_TEXT
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _held(folder: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Hold the folder of a store's parts; another process that makes the same store is waited for."""
    parts = folder.with_name(f"{folder.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"examples: another process is making {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield parts
        shutil.rmtree(parts, ignore_errors=True)


def _make(
    folder: Path,
    parts: Path,
    inventory: Inventory,
    plan: ExamplePlan,
    vocab_size: int,
    workers: int | None,
    progress: bool,
    where: str,
) -> None:
    """Tokenize what no part holds yet, then join the parts."""
    done: list[Path] = []
    while why_damaged(parts / f"{len(done):05}") is None:
        done.append(parts / f"{len(done):05}")
    units = islice(plan_units(inventory.inputs, plan.datasets, False), len(done) * UNITS_OF_A_PART, None)
    if inventory.size < SMALLEST_PARALLEL_BYTES:
        workers = 1
    workers = workers or len(os.sched_getaffinity(0))
    work: Iterator[UnitExamples] = (
        map(ExampleMaker(plan), units)
        if workers == 1
        else in_processes(units, partial(ExampleMaker, plan), workers)
    )
    with tqdm(
        total=inventory.size,
        initial=sum(ExampleStore(path).meta["weight"] for path in done),
        desc=where,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        some: list[UnitExamples] = []
        for result in work:
            if len(some) == UNITS_OF_A_PART:
                done.append(parts / f"{len(done):05}")
                _write(done[-1], some, plan.dtype, vocab_size)
                some = []
            some.append(result)
            bar.update(result.weight)
        with write_examples(folder, vocab_size=vocab_size) as writer:
            counts = Counts()
            for path in done:
                part = ExampleStore(path)
                writer.add_store(part)
                counts.add(Counts(**part.meta["counts"]))
            counts.add(_append(writer, some, plan.dtype))
            writer.meta = {"counts": asdict(counts), "made_of": where, "made_at": time.time()}


def _write(folder: Path, results: list[UnitExamples], dtype: str, vocab_size: int) -> None:
    with write_examples(folder, vocab_size=vocab_size) as writer:
        counts = _append(writer, results, dtype)
        writer.meta = {"counts": asdict(counts), "weight": sum(result.weight for result in results)}


def _append(writer: ExampleWriter, results: list[UnitExamples], dtype: str) -> Counts:
    counts = Counts()
    for result in results:
        for ids, learned in result.examples(dtype):
            writer.add(ids, learned)
        counts.add(result.counts)
    return counts


def _identity_of(preprocessing: Any, say: Callable[[str], None]) -> Any:
    """What a function does is told by its file, which is printed with its hash."""
    if not isinstance(preprocessing, str):
        return preprocessing
    path = source_of(preprocessing)
    if path is None or not Path(path).is_file():
        raise DataError(
            f"preprocessing_fn: {preprocessing}: there is no such module. Give module:function, from the "
            "folder that the command is started in or from PYTHONPATH."
        )
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    say(f"preprocessing_fn: {preprocessing} of {path} (sha256 {digest})")
    return [preprocessing, digest]
