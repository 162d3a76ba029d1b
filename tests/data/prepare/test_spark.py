"""Preparation on Spark, with two executors of this machine; without pyspark or Java nothing can be run."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.data.prepare.prepare import prepare
from mptfoundry.errors import DataError

ROOT = Path(__file__).parents[3]
has_spark = pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="pyspark or Java is not installed",
)


@pytest.fixture
def on_spark(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        options = "--master local[2] --conf spark.ui.enabled=false pyspark-shell"
        return subprocess.run(
            [sys.executable, "scripts/prepare_data.py", *words, f"tokenizer={tokenizer_folder}"],
            env={**os.environ, "PYSPARK_SUBMIT_ARGS": options, "PYSPARK_PYTHON": sys.executable},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def inputs(corpus: Path, corpus_texts: list[str], tmp_path: Path) -> list[str]:
    """A folder of files, lines, compressed lines and a table: some units of each."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus_texts * 30)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"text": corpus_texts * 3}), tmp_path / "c.parquet", row_group_size=4)
    return [str(corpus), *(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"))]


@has_spark
def test_the_bytes_on_spark_are_those_of_this_machine(
    on_spark: Callable[..., Any],
    inputs: list[str],
    tokenizer_folder: Path,
    tmp_path: Path,
    files_of: Callable[[Path], dict[str, bytes]],
) -> None:
    options: dict[str, Any] = {"max_seq_len": 64, "held_out": 0.2, "shard_bytes": 30_000}
    prepare(inputs, tmp_path / "here", tokenizer=str(tokenizer_folder), progress=False, **options)
    words = [f"{key}={value}" for key, value in options.items()]
    done = on_spark(*inputs, f"out={tmp_path / 'there'}", "engine=spark", *words)
    assert done.returncode == 0, done.stderr
    here, there = files_of(tmp_path / "here"), files_of(tmp_path / "there")
    assert len(here) > 20 and here == there


@has_spark
def test_a_bad_record_on_spark_is_named_without_a_traceback(
    on_spark: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    done = on_spark(str(tmp_path / "a.jsonl"), f"out={tmp_path / 'out'}", "engine=spark", "max_seq_len=8")
    assert done.returncode == 1
    assert f"error: {tmp_path}/a.jsonl:2: the field 'text' is a number, not a string." in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_without_spark_the_engine_is_refused(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(DataError, match=r"engine: spark needs the package pyspark\. Install it"):
        prepare(
            [str(corpus)], tmp_path / "out", tokenizer=str(tokenizer_folder), max_seq_len=64, engine="spark"
        )
    assert not (tmp_path / "out").exists()
