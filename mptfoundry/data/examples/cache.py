"""Convert records to an example store once; later runs find the store by a hash of its inputs.

The hash, which names the store in the cache folder, covers the content of the inputs, the tokenizer and every
setting the examples depend on. A store is verified against its checksums before use, and rebuilt if it is
damaged. Partial work is kept next to the store, so a killed preparation can resume.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.examples.store import ExampleWriter, why_damaged
from mptfoundry.data.examples.turns import Counts, ExampleMaker, ExamplePlan, Targets, UnitExamples, source_of
from mptfoundry.data.jobs import SMALLEST_PARALLEL_BYTES, Job, Make, read_state, run_job
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.records.records import UNIT_BYTES, UNIT_ROWS, Unit, plan_units
from mptfoundry.data.records.sources import content_digest, find_records
from mptfoundry.data.shards.index import narrowest_dtype
from mptfoundry.errors import CheckpointError, ConfigError, DataError
from mptfoundry.files import locked, whole_or_absent
from mptfoundry.tokenizer import AS_TEXT, backend_parts, count_ids, fingerprint, own_borders

log = logging.getLogger(__name__)

VERSION = 3


def cache_folder(given: str | None) -> Path:
    """Return the folder for stores: `given`, or a folder in the user's cache."""
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
    """Return the folder of a source's example store; build it if it is missing or damaged.

    Args:
        where: The source's key in the config.
        source: Where the records are.
        dataset: The dataset config: which tokens are in the loss, and where the cache is.
        context: What the loader needs from the run; the tokenizer and `max_seq_len` are used.
        workers: Number of processes. By default one per CPU; small data uses only this process.
        say: Called with progress messages.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: A user function creates the records, and the command line did not allow code.
        DataError: The records can't be found, or the cache can't be written.
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

    def make(parts: Path) -> None:
        def begin() -> Job:
            sink = ExampleSink(parts / "store", folder, vocab_size, where)
            return Job(parts, where, inventory.size, sink)

        units = plan_units(inventory.inputs, plan.datasets, False)
        make_cached(begin, units, partial(ExampleMaker, plan), workers=workers, progress=progress)

    return find_or_make(folder, where, partial(why_damaged, title=title), make, say)


def _identity(plan: ExamplePlan, inputs: str, say: Callable[[str], None]) -> str:
    """Hash everything the examples depend on."""
    tokenizer = plan.tokenizer
    settings = {
        "version": [VERSION, UNIT_BYTES, UNIT_ROWS, 16],
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


def find_or_make(
    folder: Path,
    where: str,
    damage: Callable[[Path], str | None],
    make: Callable[[Path], None],
    say: Callable[[str], None],
) -> Path:
    """Return a cache folder; build it if it is missing or damaged. Only one process builds it at a time.

    Args:
        folder: The cache folder, named by a hash of everything it depends on.
        where: The source's key in the config, for messages.
        damage: Returns what is wrong with a folder, or None if it is intact.
        make: Builds the folder. Its argument is the folder for the state of the job.
        say: Called with progress messages.

    Raises:
        DataError: The cache can't be written.
    """
    if damage(folder) is None:
        return folder
    parts = folder.with_name(f"{folder.name}.parts")

    def waiting(holder: str) -> None:
        say(f"{where}: {holder} is making {folder}; waiting for it")

    try:
        with locked(parts / "lock", waiting=waiting):
            problem = damage(folder)
            if problem is not None:
                if folder.exists():
                    say(f"{where}: the examples are made again: {folder} {problem}")
                make(parts)
            shutil.rmtree(parts, ignore_errors=True)
    except (OSError, CheckpointError) as error:
        raise DataError(
            f"{folder}: it can't be written ({getattr(error, 'strerror', None) or error})."
        ) from error
    return folder


def make_cached(
    begin: Callable[[], Job], units: Iterable[Unit], make: Make, *, workers: int | None, progress: bool
) -> None:
    """Run the job that `begin` returns, resuming from its saved state if that is intact."""
    job = begin()
    try:
        state = read_state(job.folder)
        if state is not None:
            job.restore(state)
    except (OSError, KeyError, TypeError, ValueError):
        log.warning("%s: what %s holds is damaged; it is made from the beginning.", job.title, job.folder)
        job = begin()
    run_job(job, units, make, workers=workers, progress=progress)


class ExampleSink:
    """Appends the examples of units to a store.

    Args:
        work: Where to write the store.
        folder: Where to move the finished store.
        vocab_size: All ids must be smaller.
        where: The source's key in the config.
    """

    def __init__(self, work: Path, folder: Path, vocab_size: int, where: str) -> None:
        self.writer = ExampleWriter(work, vocab_size)
        self.folder = folder
        self.where = where
        self.tokens = 0
        self.counts = Counts()

    def add(self, result: UnitExamples) -> None:
        """Append a unit's examples."""
        self.writer.add_many(result.ids, result.marks, result.lengths)
        self.tokens += sum(result.lengths)
        self.counts.add(result.counts)

    def state(self, units: int) -> dict[str, Any]:
        """Return the file sizes and record counts so far."""
        return {"files": self.writer.files.state(), "counts": asdict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the files and counts from a state."""
        self.counts = Counts(**state["counts"])
        self.writer.files.restore(state["files"])

    def finish(self) -> None:
        """Finish the store and move it to its folder."""
        self.writer.meta = {"counts": asdict(self.counts), "made_of": self.where, "made_at": time.time()}
        self.writer.finish()
        with whole_or_absent(self.folder, overwrite=True) as path:
            self.writer.folder.rename(path)


def _identity_of(preprocessing: Any, say: Callable[[str], None]) -> Any:
    """Identify a function by a hash of its file, which is also printed."""
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
