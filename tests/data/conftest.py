"""Texts of the standard library as a corpus, and shards made of it, for the tests of this room."""

from __future__ import annotations

import multiprocessing
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MODULES = (
    "textwrap.py",
    "heapq.py",
    "bisect.py",
    "fnmatch.py",
    "json/decoder.py",
    "json/encoder.py",
    "html/parser.py",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of source files, one of them empty and one not in ASCII."""
    folder = tmp_path_factory.mktemp("corpus")
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(standard_library / name, folder / name)
    (folder / "json" / "__init__.py").write_text("")
    (folder / "wörter.txt").write_text("naïve café — 言葉 😀\r\n" * 40, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus_texts(corpus: Path) -> list[str]:
    """The corpus's documents in the order in which they are prepared."""
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    return [text for text in (path.read_bytes().decode("utf-8") for path in files) if text]


@pytest.fixture(scope="session")
def token_stream(tiny_tokenizer: Any) -> Callable[[Sequence[str]], list[int]]:
    """The plain rule: the ids of each document, then EOS."""

    def join(texts: Sequence[str]) -> list[int]:
        stream: list[int] = []
        for text in texts:
            ids = tiny_tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
            stream += [*ids, tiny_tokenizer.eos_token_id]
        return stream

    return join


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """The corpus as shards of 64 tokens in several shard files: `train` and `val`."""
    from mptfoundry.data.prepare.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(
        [str(corpus)],
        out,
        tokenizer=str(tokenizer_folder),
        max_seq_len=64,
        held_out=0.3,
        shard_bytes=20_000,
        progress=False,
    )
    return out


@pytest.fixture
def read_tokens() -> Callable[[Path], np.ndarray]:
    """Read a folder of shards with streaming's own reader: (samples, tokens)."""
    from streaming.base.format import reader_from_json

    from mptfoundry.data.shards.index import read_index

    def read(folder: Path) -> np.ndarray:
        shards = [reader_from_json(str(folder), "", dict(shard)) for shard in read_index(folder, "x").shards]
        return np.stack([sample["tokens"] for shard in shards for sample in shard])

    return read


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder, by name."""
    return lambda folder: {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    """End the workers of a test's loaders: the garbage collector waits five seconds for each."""
    yield
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.terminate()
