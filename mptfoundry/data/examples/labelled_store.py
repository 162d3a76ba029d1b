"""Convert labelled records to a store once; later runs find it by a hash of its inputs (see `cache.py`).

A store is a folder:

    examples.bin   the concatenated examples, as `pack` writes them
    sizes.npy      (3, examples) int64: size in bytes; whether it was truncated; whether it has a label left
    store.json     sizes and hashes of the files, fingerprints of the examples, and a hash of it all
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.config.data import LabelledDatasetConfig
from mptfoundry.data.appended import AppendedFiles
from mptfoundry.data.examples.cache import Recipe, cache_folder, prepare_store
from mptfoundry.data.examples.labelled_records import LabelledMaker, LabelledPlan, UnitLabelled, unpack
from mptfoundry.data.examples.store import read_content, seal
from mptfoundry.data.loading import LoaderContext
from mptfoundry.files import whole_or_absent
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.tokenizer import backend_parts, fingerprint

DATA, SIZES, ROWS = "examples.bin", "sizes.npy", "rows.bin"
VERSION = 2


def prepare_labelled(
    where: str, dataset: LabelledDatasetConfig, context: LoaderContext, **running: Any
) -> Path:
    """Return the folder of a dataset's examples; build it if it is missing or damaged.

    Args:
        where: The source's key in the config.
        dataset: The dataset's section of the config.
        context: What the loader needs from the run; its model has a head.
        running: How to run: `workers`, `say` and `progress` of `prepare_store`.

    Raises:
        DataError: The records can't be found, a record is invalid, or the cache can't be written.
    """
    head = context.model
    assert isinstance(head, HeadConfig)
    (source,) = dataset.sources.values()

    def recipe_for(datasets: Sequence[Any]) -> Recipe:
        plan = LabelledPlan(context.tokenizer, context.max_seq_len, head, dataset.fields, datasets)
        return Recipe(_settings(plan), partial(LabelledMaker, plan), LabelledSink)

    return prepare_store(where, source, cache_folder(dataset.cache_folder), recipe_for, **running)


def _settings(plan: LabelledPlan) -> dict[str, Any]:
    """Return all that the examples depend on, without the records."""
    tokenizer, head = plan.tokenizer, plan.head
    return {
        "version": ["labelled", VERSION],
        "tokenizer": [fingerprint(tokenizer), backend_parts(tokenizer)["post_processor"]],
        "truncation_side": tokenizer.truncation_side,
        "max_seq_len": plan.max_seq_len,
        "fields": dict(plan.fields),
        "head": [head.task, getattr(head, "label2id", None), getattr(head, "problem", None)],
    }


class LabelledSink:
    """Appends the examples of units to a store.

    Args:
        work: Where to write the store.
        folder: Where to move the finished store.
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
        """Return the file sizes."""
        return {"files": self.files.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the files from a state."""
        self.files.restore(state["files"])

    def finish(self) -> None:
        """Finish the store and move it to its folder."""
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
    """The memory-mapped examples of a labelled store.

    Args:
        folder: The store's folder.
        trained_only: Whether to skip examples without a label left.

    Attributes:
        cut: Number of examples that were truncated.
        left_out: Number of examples skipped because they have no label left.
        fingerprint: Hash of the content.
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
        # Spawned workers reopen the files, because pickling a memory map would copy its content.
        folder, trained_only = self._arguments
        return partial(LabelledStore, trained_only=trained_only), (folder,)
