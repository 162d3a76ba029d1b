"""Labelled examples become a store once; later runs find it by a hash of its inputs (see `cache.py`).

A store is a folder:

    examples.bin   the examples one after the other, as `pack` writes them
    sizes.npy      (3, examples) int64: bytes of each; whether it was cut; whether any of its labels is left
    store.json     sizes and hashes of the files, the examples' fingerprints, and a hash of all that
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.config.data import LabelledDatasetConfig
from mptfoundry.data.appended import AppendedFiles
from mptfoundry.data.examples.cache import cache_folder, find_or_make, make_cached
from mptfoundry.data.examples.labelled_records import LabelledMaker, LabelledPlan, UnitLabelled, unpack
from mptfoundry.data.examples.store import read_content, seal, why_damaged
from mptfoundry.data.jobs import SMALLEST_PARALLEL_BYTES, Job
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.records.records import plan_units
from mptfoundry.data.records.sources import content_digest, find_records
from mptfoundry.files import whole_or_absent
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.tokenizer import backend_parts, fingerprint

DATA, SIZES, ROWS = "examples.bin", "sizes.npy", "rows.bin"
VERSION = 1


def prepare_labelled(
    where: str,
    dataset: LabelledDatasetConfig,
    context: LoaderContext,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """The folder of a data set's examples, which is made if it is not there or damaged.

    Args:
        where: The source's key in the config.
        dataset: Its section of the config.
        context: Of the run; its model has a head.
        workers: Processes. Default: one for each processor, or none for little data.
        say: Is told what happens.
        progress: Show a progress bar.

    Raises:
        DataError: The records can't be found, one of them doesn't hold what it should, or the cache can't be
            written to.
    """
    cache, head = cache_folder(dataset.cache_folder), context.model
    assert isinstance(head, HeadConfig)
    (source,) = dataset.sources.values()
    inventory = find_records(source, where, cache)
    plan = LabelledPlan(context.tokenizer, context.max_seq_len, head, dataset.fields, inventory.datasets)
    folder = cache / _identity(plan, content_digest(inventory, cache))
    title = f"{where}: checking examples" if progress and inventory.size >= SMALLEST_PARALLEL_BYTES else ""

    def make(parts: Path) -> None:
        def begin() -> Job:
            return Job(parts, where, inventory.size, LabelledSink(parts / "store", folder))

        units = plan_units(inventory.inputs, inventory.datasets, cut_texts=False)
        make_cached(begin, units, partial(LabelledMaker, plan), workers=workers, progress=progress)

    return find_or_make(folder, where, partial(why_damaged, title=title), make, say)


def _identity(plan: LabelledPlan, inputs: str) -> str:
    """A hash of everything that the examples depend on."""
    tokenizer, head = plan.tokenizer, plan.head
    settings = {
        "version": ["labelled", VERSION],
        "inputs": inputs,
        "tokenizer": [fingerprint(tokenizer), backend_parts(tokenizer)["post_processor"]],
        "truncation_side": tokenizer.truncation_side,
        "max_seq_len": plan.max_seq_len,
        "fields": dict(plan.fields),
        "head": [head.task, getattr(head, "label2id", None), getattr(head, "problem", None)],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


class LabelledSink:
    """Appends the examples of units to a store.

    Args:
        work: Where the store is written.
        folder: Where it goes when it is whole.
    """

    def __init__(self, work: Path, folder: Path) -> None:
        self.work = work
        self.folder = folder
        self.tokens = 0
        self.files = AppendedFiles(work, (DATA, ROWS))

    def add(self, result: UnitLabelled) -> None:
        """Append a unit's examples."""
        self.files.append(DATA, b"".join(result.examples))
        rows = [(len(example), *flags) for example, flags in zip(result.examples, result.flags, strict=True)]
        self.files.append(ROWS, np.array(rows, np.int64).tobytes())
        self.tokens += result.tokens

    def state(self, units: int) -> dict[str, Any]:
        """The files' sizes."""
        return {"files": self.files.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where the files were."""
        self.files.restore(state["files"])

    def finish(self) -> None:
        """Complete the store and put it in its place."""
        self.files.close()
        rows = self.work / ROWS
        np.save(self.work / SIZES, np.fromfile(rows, np.int64).reshape(-1, 3).T)
        rows.unlink()
        lengths, _, is_trained = np.load(self.work / SIZES)
        all_of_them, trained = hashlib.sha256(), hashlib.sha256()
        with (self.work / DATA).open("rb") as file:
            for length, counts in zip(lengths.tolist(), is_trained.tolist(), strict=True):
                for name, value in unpack(file.read(length)).items():
                    content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
                    for digest in (all_of_them, trained)[: 1 + counts]:
                        digest.update(f"{name} {len(content)}\n".encode() + content)
        fingerprints = {"all": all_of_them.hexdigest(), "trained": trained.hexdigest()}
        seal(self.work, (DATA, SIZES), meta=fingerprints)
        with whole_or_absent(self.folder, overwrite=True) as path:
            self.work.rename(path)


class LabelledStore:
    """The examples of a folder, read in place.

    Args:
        folder: Of a store.
        trained_only: Leave out examples without a label that is left.

    Attributes:
        cut: How many examples were cut.
        left_out: How many have no label that is left.
        fingerprint: Of the content.
    """

    def __init__(self, folder: str | Path, *, trained_only: bool) -> None:
        self._arguments = (folder, trained_only)
        lengths, is_cut, is_trained = np.load(Path(folder) / SIZES)
        self.cut = int(is_cut.sum())
        self.left_out = len(lengths) - int(is_trained.sum()) if trained_only else 0
        fingerprints = read_content(Path(folder))["meta"]
        self.fingerprint = fingerprints["trained" if trained_only else "all"]
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])
        self._numbers = np.flatnonzero(is_trained) if trained_only else np.arange(len(lengths))
        size = int(self._bounds[-1])
        self._data = np.memmap(Path(folder) / DATA, np.uint8, mode="r") if size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._numbers[index]
        return unpack(self._data[self._bounds[number] : self._bounds[number + 1]].tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned opens the files itself: a memory map would be sent as what it maps.
        folder, trained_only = self._arguments
        return partial(LabelledStore, trained_only=trained_only), (folder,)
