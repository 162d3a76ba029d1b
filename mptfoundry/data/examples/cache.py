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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.examples.store import ExampleWriter, why_damaged
from mptfoundry.data.examples.turns import Counts, ExampleMaker, ExamplePlan, Targets, UnitExamples, source_of
from mptfoundry.data.jobs import SMALLEST_PARALLEL_BYTES, Job, Make, Sink, read_state, run_job
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.records.records import UNIT_BYTES, UNIT_ROWS, plan_units
from mptfoundry.data.records.sources import content_digest, find_records
from mptfoundry.data.shards.index import narrowest_dtype
from mptfoundry.errors import CheckpointError, ConfigError, DataError
from mptfoundry.files import locked, whole_or_absent
from mptfoundry.tokenizer import AS_TEXT, backend_parts, count_ids, fingerprint, own_borders

log = logging.getLogger(__name__)

VERSION = 4


def cache_folder(given: str | None) -> Path:
    """Return the folder for stores: `given`, or a folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{home}/mptfoundry/examples").expanduser()


@dataclass(frozen=True)
class Recipe:
    """How records become a store.

    Attributes:
        settings: All that the examples depend on except the records; a hash of both names the store.
        make: Returns the function that converts a unit of records; see `jobs.run_job`.
        sink: Returns the sink of the results; called with the folder to write in and the finished store's.
    """

    settings: Mapping[str, Any]
    make: Make
    sink: Callable[[Path, Path], Sink]


def prepare_store(
    where: str,
    source: RecordsConfig,
    cache: Path,
    recipe_for: Callable[[Sequence[Any]], Recipe],
    *,
    workers: int | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Return the folder of a source's store; build it if it is missing or damaged.

    Only one process builds it at a time, and a killed one is resumed.

    Args:
        where: The source's key in the config.
        source: Where the records are.
        cache: The folder of all stores.
        recipe_for: Returns the recipe; called with the Hugging Face datasets that hold the records.
        workers: Number of processes. By default one per CPU; small data uses only this process.
        say: Called with progress messages.
        progress: Whether to show a progress bar.

    Raises:
        DataError: The records can't be found, a record is invalid, or the cache can't be written.
    """
    inventory = find_records(source, where, cache)
    recipe = recipe_for(inventory.datasets)
    settings = {**recipe.settings, "inputs": content_digest(inventory, cache)}
    folder = cache / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    title = f"{where}: checking examples" if progress and inventory.size >= SMALLEST_PARALLEL_BYTES else ""
    if why_damaged(folder, title=title) is None:
        return folder
    parts = folder.with_name(f"{folder.name}.parts")

    def begin() -> Job:
        return Job(parts, where, inventory.size, recipe.sink(parts / "store", folder))

    def waiting(holder: str) -> None:
        say(f"{where}: {holder} is making {folder}; waiting for it")

    try:
        with locked(parts / "lock", waiting=waiting):
            problem = why_damaged(folder, title=title)
            if problem is not None:
                if folder.exists():
                    say(f"{where}: the examples are made again: {folder} {problem}")
                units = plan_units(inventory.inputs, inventory.datasets, cut_texts=False)
                run_job(_resumed(begin), units, recipe.make, workers=workers, progress=progress)
            shutil.rmtree(parts, ignore_errors=True)
    except (OSError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: it can't be written ({reason}).") from error
    return folder


def _resumed(begin: Callable[[], Job]) -> Job:
    """Return the job that `begin` makes, resumed from its saved state if that is intact."""
    job = begin()
    try:
        state = read_state(job.folder)
        if state is not None:
            job.restore(state)
    except (OSError, KeyError, TypeError, ValueError):
        log.warning("%s: what %s holds is damaged; it is made from the beginning.", job.title, job.folder)
        return begin()
    return job


def prepare_examples(
    where: str,
    source: RecordsConfig,
    dataset: FinetuningDatasetConfig,
    context: LoaderContext,
    *,
    say: Callable[[str], None] = print,
    **running: Any,
) -> Path:
    """Return the folder of a source's finetuning examples, as `prepare_store` does.

    Args:
        where: The source's key in the config.
        source: Where the records are.
        dataset: The dataset config: which tokens are in the loss, and where the cache is.
        context: What the loader needs from the run; the tokenizer and `max_seq_len` are used.
        say: Called with progress messages.
        running: How to run, `workers` and `progress` of `prepare_store`.

    Raises:
        ConfigError: A user function creates the records, and the command line did not allow code.
        DataError: The records can't be found, or the cache can't be written.
    """
    if isinstance(source.preprocessing_fn, str) and not context.allow_code:
        raise ConfigError(
            f"{where}.preprocessing_fn: {source.preprocessing_fn} is code. Run it with allow_code=true on "
            "the command line."
        )
    tokenizer, vocab_size = context.tokenizer, count_ids(context.tokenizer)

    def recipe_for(datasets: Sequence[Any]) -> Recipe:
        plan = ExamplePlan(
            tokenizer,
            context.max_seq_len,
            Targets(dataset.target_prompts, dataset.target_responses),
            source.preprocessing_fn,
            narrowest_dtype(vocab_size),
            datasets,
            dataset.token_encoding_type,
            as_text=dataset.special_tokens == AS_TEXT,
        )
        sink = partial(ExampleSink, vocab_size=vocab_size, where=where)
        return Recipe(_settings(plan, say), partial(ExampleMaker, plan), sink)

    return prepare_store(where, source, cache_folder(dataset.cache_folder), recipe_for, say=say, **running)


def _settings(plan: ExamplePlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all that the examples depend on, without the records."""
    tokenizer = plan.tokenizer
    settings = {
        "version": [VERSION, UNIT_BYTES, UNIT_ROWS, 16],
        "tokenizer": [fingerprint(tokenizer), backend_parts(tokenizer)["post_processor"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, *own_borders(tokenizer).after],
        "chat_template": tokenizer.chat_template,
        "max_seq_len": plan.max_seq_len,
        "targets": asdict(plan.targets),
        "preprocessing": _identity_of(plan.preprocessing, say),
        "token_encoding_type": plan.token_encoding_type,
    }
    return settings | ({"special_tokens": AS_TEXT} if plan.as_text else {})


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
