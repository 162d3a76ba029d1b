from __future__ import annotations

import fcntl
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.data import jobs
from mptfoundry.data.prepare import prepare as module
from mptfoundry.data.prepare import sink
from mptfoundry.data.prepare.prepare import prepare
from mptfoundry.data.records import records
from mptfoundry.data.shards.index import read_index
from mptfoundry.errors import DataError, MPTFoundryError

pytestmark = pytest.mark.long

Reader = Callable[[Path], np.ndarray]
Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even a small corpus into many units, and share them among processes."""
    monkeypatch.setattr(records, "UNIT_BYTES", 5_000)
    monkeypatch.setattr(jobs, "SMALLEST_PARALLEL_BYTES", 0)


@pytest.fixture
def run(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Prepare with a small tokenizer and samples of 16 tokens."""

    def call(*inputs: Path | str, out: str = "out", **options: Any) -> Any:
        settings = {"tokenizer": str(tokenizer_folder), "max_seq_len": 16, "workers": 1, "progress": False}
        return prepare([str(word) for word in inputs], tmp_path / out, **{**settings, **options})

    return call


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def cut(stream: list[int], max_seq_len: int) -> np.ndarray:
    whole = len(stream) // max_seq_len * max_seq_len
    return np.array(stream[:whole]).reshape(-1, max_seq_len)


def test_documents_are_joined_with_eos_and_cut(
    run: Any, corpus: Path, corpus_texts: list[str], token_stream: Any, read_tokens: Reader, tmp_path: Path
) -> None:
    summary = run(corpus)
    stream = token_stream(corpus_texts)
    assert (read_tokens(tmp_path / "out" / "train") == cut(stream, 16)).all()
    (split,) = summary.splits
    assert split.documents == len(corpus_texts)
    assert split.bytes == sum(len(text.encode()) for text in corpus_texts)
    assert split.tokens + split.dropped_tokens == len(stream) == summary.encoded_tokens
    assert split.dropped_tokens == len(stream) % 16
    assert summary.skipped == {"empty file": 1}
    meta = read_index(tmp_path / "out" / "train", "x").meta
    assert meta is not None
    assert (meta.documents, meta.samples, meta.tokens) == (split.documents, split.samples, split.tokens)


def test_every_kind_of_input_gives_the_same_tokens(
    run: Any, corpus_texts: list[str], token_stream: Any, read_tokens: Reader, tmp_path: Path
) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    lines = write_lines(tmp_path / "a.jsonl", corpus_texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(lines.read_bytes().rstrip(b"\n"))
    table = pyarrow.table({"text": corpus_texts, "other": list(range(len(corpus_texts)))})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "e"))
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(str(tmp_path / "f"))
    expected = cut(token_stream(corpus_texts), 16)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e", "f"):
        run(tmp_path / name, out=f"out-{name}")
        assert (read_tokens(tmp_path / f"out-{name}" / "train") == expected).all(), name
        assert run(tmp_path / name, out=f"out-{name}").was_finished


@pytest.mark.usefixtures("small_units")
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    run: Any, corpus: Path, corpus_texts: list[str], tmp_path: Path, files_of: Files
) -> None:
    import datasets

    inputs = [corpus, write_lines(tmp_path / "a.jsonl", corpus_texts)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(inputs[1].read_bytes(), mtime=0))
    datasets.Dataset.from_dict({"text": corpus_texts}).save_to_disk(str(tmp_path / "c"))
    inputs += [tmp_path / "b.jsonl.gz", tmp_path / "c"]
    options = {"held_out": 0.2, "shard_bytes": 30_000}
    for workers in (1, 3):
        run(*inputs, out=f"out-{workers}", workers=workers, **options)
    files = files_of(tmp_path / "out-1")
    assert len(files) > 6 and {"train/index.json", "val/index.json"} <= files.keys()
    assert files_of(tmp_path / "out-3") == files


def test_units_of_any_size_give_the_same_tokens(
    run: Any,
    corpus: Path,
    corpus_texts: list[str],
    tmp_path: Path,
    files_of: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [corpus, write_lines(tmp_path / "a.jsonl", corpus_texts)]
    run(*inputs, out="whole")
    for size in (100, 7_777):
        monkeypatch.setattr(records, "UNIT_BYTES", size)
        run(*inputs, out=f"out-{size}")
        assert files_of(tmp_path / f"out-{size}") == files_of(tmp_path / "whole")


def test_held_out_documents_stay_held_out(
    run: Any, corpus_texts: list[str], token_stream: Any, read_tokens: Reader, tmp_path: Path
) -> None:
    run(write_lines(tmp_path / "a.jsonl", corpus_texts), out="first", held_out=0.5)
    run(write_lines(tmp_path / "b.jsonl", corpus_texts[::-1]), out="second", held_out=0.5)
    held_out = {}
    for name in ("first", "second"):
        metas = [read_index(tmp_path / name / split, "x").meta for split in ("train", "val")]
        assert sum(meta.documents for meta in metas if meta) == len(corpus_texts)
        held_out[name] = read_tokens(tmp_path / name / "val").ravel().tolist()
    chosen = [text for text in corpus_texts if token_stream([text])[:30] == held_out["first"][:30]]
    assert len(chosen) == 1
    assert sorted(held_out["first"])[:50] == sorted(held_out["second"])[:50]
    everything = token_stream(corpus_texts)
    assert 0.1 < len(held_out["first"]) / len(everything) < 0.9


def _kill_at_write(number: int, arguments: dict[str, Any]) -> None:
    """In a process of its own: prepare, and end by SIGKILL at the given write to disk."""
    writes = 0
    fsync = os.fsync

    def count(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = count
    jobs.SHORTEST_PERIOD_SECONDS = jobs.MOST_TIME_SAVING = 1e-9
    prepare(**arguments)


@pytest.mark.usefixtures("small_units")
def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(
    run: Any, corpus: Path, tokenizer_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    options = {"held_out": 0.2, "shard_bytes": 30_000, "max_seq_len": 16, "workers": 1, "progress": False}
    run(corpus, out="whole", **options)
    arguments = {
        "inputs": [str(corpus)],
        "out": tmp_path / "killed",
        "tokenizer": str(tokenizer_folder),
        **options,
    }
    context = multiprocessing.get_context("fork")
    kills = 0
    for number in itertools.cycle((6, 7, 8, 9, 10)):
        process = context.Process(target=_kill_at_write, args=(number, arguments))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        with pytest.raises(DataError, match=r"half prepared|missing|no index"):
            read_index(tmp_path / "killed" / "train", "loader")
    assert kills > 8
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    status = ((path, path.read_text().split()) for path in Path("/proc").glob("[0-9]*/stat"))
    return [int(path.parent.name) for path, fields in status if int(fields[3]) == pid]


def test_workers_end_with_a_killed_parent(
    corpus_texts: list[str], tokenizer_folder: Path, tmp_path: Path, run: Any, files_of: Files
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", corpus_texts * 80)
    arguments = {"inputs": [str(lines)], "out": tmp_path / "killed", "tokenizer": str(tokenizer_folder)}
    arguments |= {"max_seq_len": 16, "workers": 2, "progress": False}
    process = multiprocessing.get_context("fork").Process(target=prepare, kwargs=arguments)
    process.start()
    deadline = time.monotonic() + 60
    while len(children := _children(process.pid or 0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    run(lines, out="killed", workers=2)
    run(lines, out="whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_finished_folder_says_so_and_is_left_alone(
    run: Any, corpus: Path, tmp_path: Path, files_of: Files
) -> None:
    first = run(corpus, held_out=0.2)
    before = files_of(tmp_path / "out")
    again = run(corpus, held_out=0.2, workers=2)
    assert again.was_finished and again.encoded_tokens == 0 and again.splits == first.splits
    assert "It was finished already" in str(again)
    assert files_of(tmp_path / "out") == before
    (tmp_path / "out" / "train" / "shard.00099.mds").write_bytes(b"another's")
    assert run(corpus, held_out=0.2).splits == first.splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_seq_len": 32},
            r"out/train was prepared with max_seq_len=16 \(now 32\)\. Use the same options",
        ),
        ({"add_eos": False}, r"add_eos=True \(now False\)"),
        ({"held_out": 0.1}, r"held_out=0.0 \(now 0.1\)"),
        ({"exclude": ["*.txt"]}, r"inputs of 9 files, .* \(now of 8 files"),
    ],
)
def test_other_options_on_a_finished_folder_are_refused(
    run: Any, corpus: Path, options: dict[str, Any], message: str
) -> None:
    run(corpus)
    with pytest.raises(DataError, match=message):
        run(corpus, **options)


def test_a_changed_input_or_tokenizer_is_refused(
    run: Any, corpus_texts: list[str], tmp_path: Path, other_tokenizer: str
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", corpus_texts)
    run(lines)
    with pytest.raises(DataError, match="was prepared with another tokenizer"):
        run(lines, tokenizer=other_tokenizer)
    write_lines(lines, corpus_texts[1:])
    with pytest.raises(DataError, match="was prepared with inputs of 1 files"):
        run(lines)


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from mptfoundry.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    train_bpe(["quite other text " * 20], 280, folder)
    return str(folder)


def test_a_half_prepared_folder_refuses_other_options(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, run: Any
) -> None:
    arguments = {"inputs": [str(corpus)], "out": tmp_path / "out", "tokenizer": str(tokenizer_folder)}
    arguments |= {"max_seq_len": 16, "workers": 1, "progress": False}
    process = multiprocessing.get_context("fork").Process(target=_kill_at_write, args=(3, arguments))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match=r"out/train is half prepared with max_seq_len=16 \(now 8\)"):
        run(corpus, max_seq_len=8)
    run(corpus)


def test_two_processes_do_not_prepare_one_folder(run: Any, corpus: Path, tmp_path: Path) -> None:
    with (
        sink.lock_folders(tmp_path / "out" / "train"),
        pytest.raises(DataError, match="another process is preparing it"),
    ):
        run(corpus)


def test_a_missing_shard_of_a_finished_folder_is_named(run: Any, corpus: Path, tmp_path: Path) -> None:
    run(corpus)
    (tmp_path / "out" / "train" / "shard.00000.mds").write_bytes(b"short")
    with pytest.raises(DataError, match=r"shard\.00000\.mds: the shard is missing or cut short"):
        run(corpus)


def test_a_folder_with_other_things_is_left_alone(run: Any, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out/train: the folder is not empty \(notes\.txt\)"):
        run(corpus)
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"bad\.jsonl:3: this is not a line of JSON"),
        (b'{"txt": "x"}', r"bad\.jsonl:3: there is no field 'text'; the fields are: txt\. Set text_key\."),
        (b'{"text": 5}', r"bad\.jsonl:3: the field 'text' is a number, not a string\."),
        (b'{"text": null}', r"bad\.jsonl:3: the field 'text' is null, not a string\."),
        (b'["x"]', r"bad\.jsonl:3: this is a JSON array, not an object"),
        (b'{"text": "\xff"}', r"bad\.jsonl:3: byte 10 of the line is not UTF-8\."),
        (b'{"text": "\\ud800"}', r"bad\.jsonl:3: .*half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named_and_nothing_is_left(
    run: Any, tmp_path: Path, line: bytes, message: str, packed: bool
) -> None:
    content = b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n'
    path = tmp_path / ("bad.jsonl.gz" if packed else "bad.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message.replace(r"bad\.jsonl", r"bad\.jsonl(\.gz)?")):
        run(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_units")
def test_a_bad_line_far_into_a_file_is_counted_right_by_workers(run: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "word " * (number % 50)}) for number in range(900)]
    lines[777] = "oops"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:778: this is not a line of JSON"):
        run(tmp_path / "a.jsonl", workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "x"\n'),
        ("a.jsonl", b'{"t": "x"}\n'),
        ("a.jsonl", b'"x"\n'),
        ("a.jsonl", b'{"text": "\xff"}\n'),
        ("a.jsonl", b'{"text": 1}\n'),
        ("a.txt", b"caf\xe9"),
        ("a.json", b'[{"text": "x"},'),
        ("a.json", b'{\n"text": "x"\n}\n'),
        ("a.jsonl.gz", b"not packed"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9]),
        ("a.json.gz", b"[not packed"),
        ("a.jsonl.zst", b"not packed"),
        ("a.parquet", b"PAR1"),
    ],
)
def test_every_kind_of_bad_input_names_what_leaves_it_out_and_that_does(
    run: Any, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("fine " * 100)
    inputs = tmp_path / name, tmp_path / "good.txt"
    with pytest.raises(
        DataError, match=rf"{name}.* Or use bad_input=skip, which leaves out and counts all such input\.$"
    ) as bad:
        run(*inputs)
    assert str(bad.value).count("bad_input=skip") == 1 and not (tmp_path / "out").exists()
    summary = run(*inputs, bad_input="skip")
    assert summary.skipped["bad input"] >= 1 and summary.problems[0].startswith(f"{tmp_path}/{name}")


def test_what_is_taken_as_plain_text_is_counted_and_said(run: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.py", "b.py", "README", "c.csv", "d.json"):
        (tmp_path / "in" / name).write_text("some text " * 40)
    write_lines(tmp_path / "in" / "e.jsonl", ["x"])
    for summary in (run(tmp_path / "in"), run(tmp_path / "in")):
        assert "read as plain text: 2 x .py, 1 x .csv, 1 x .json, 1 x without ending" in str(summary)
        assert "one .csv or .json file is one document here, with all its commas and braces" in str(summary)
    assert "plain text" not in str(
        run(tmp_path / "in" / "e.jsonl", tmp_path / "in" / "e.jsonl", max_seq_len=2, out="o")
    )


def test_bad_input_can_be_left_out_and_is_counted(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one two three four five six seven eight"}\nx\n{"t": 1}\n' * 3
    )
    summary = run(tmp_path / "a.jsonl", bad_input="skip")
    assert summary.skipped == {"bad input": 6} and summary.splits[0].documents == 3
    assert "left out: 6 x bad input" in str(summary) and "a.jsonl:2: this is not a line of JSON" in str(
        summary
    )


def test_a_file_that_is_not_utf8_is_named_with_the_byte(run: Any, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"fine\n" * 100 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt: byte 503 \(0xe9\) is not UTF-8\. Convert the file"):
        run(tmp_path / "text")
    (tmp_path / "text" / "b.txt").write_text("fine " * 100)
    assert run(tmp_path / "text", bad_input="skip").splits[0].documents == 1


def test_too_little_text_is_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"the text gives 2 tokens, less than one sample of 16\. Give more text\."
    ):
        run(tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 1}, "max_seq_len: 1 leaves nothing to predict"),
        ({"held_out": 1.0}, "held_out: 1.0 is not a share from 0 to 1"),
        ({"held_out": 0.1, "held_out_split": "train"}, "held_out_split: it has the same name as split"),
        ({"split": "../x"}, r"split: '\.\./x' is not the name of a folder"),
        ({"bad_input": "ignore"}, "bad_input: 'ignore' is not allowed"),
        ({"compression": "gz"}, "compression: 'gz' is not allowed. Use one of br, bz2, snappy, zstd"),
        ({"tokenizer": "./none"}, r"tokenizer.name: \./none is not a folder"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    run: Any, corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MPTFoundryError, match=message):
        run(corpus, **options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_eos_is_refused_unless_none_is_wanted(
    run: Any, corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    bare: Any = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="has no EOS token for the borders of documents"):
        run(corpus, tokenizer=str(tmp_path / "bare"))
    run(corpus, tokenizer=str(tmp_path / "bare"), add_eos=False)
    meta = read_index(tmp_path / "out" / "train", "x").meta
    assert meta is not None and meta.eos_token_id is None


def test_an_output_that_can_not_be_written_is_one_clear_error(run: Any, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"out/train: it can't be written \(Not a directory\)"):
        run(corpus)


def test_bos_goes_before_each_document(
    run: Any, corpus_texts: list[str], tiny_tokenizer: Any, read_tokens: Reader, tmp_path: Path
) -> None:
    run(write_lines(tmp_path / "a.jsonl", corpus_texts[:2]), add_bos=True, add_eos=False)
    stream: list[int] = []
    for text in corpus_texts[:2]:
        stream += [tiny_tokenizer.bos_token_id, *tiny_tokenizer(text, truncation=False)["input_ids"]]
    assert (read_tokens(tmp_path / "out" / "train") == cut(stream, 16)).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_of_others_stay_where_they_are(
    run: Any, corpus: Path, tmp_path: Path, files_of: Files, split: str
) -> None:
    """Without an index, as a killed converter or a copy that is under way leaves them."""
    folder = tmp_path / "out" / split
    folder.mkdir(parents=True)
    for name in ("shard.00000.mds", "shard.00001.mds.zstd"):
        (folder / name).write_bytes(b"not ours")
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=rf"out/{split}: the folder is not empty \(shard\.00000\.mds\)"):
        run(corpus, held_out=0.2)
    assert files_of(tmp_path / "out") == before


def test_shards_of_another_preparation_that_was_killed_stay(
    run: Any, corpus: Path, tokenizer_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    """Its journal lies with the main split; the held-out split alone looks as if nobody had made it."""
    arguments: dict[str, Any] = {"inputs": [str(corpus)], "out": tmp_path / "out", "held_out": 0.3}
    arguments |= {"tokenizer": str(tokenizer_folder), "max_seq_len": 16, "workers": 1, "progress": False}
    killed_in_finish(arguments)
    (tmp_path / "out" / "val" / ".preparing" / "lock").unlink()
    before = files_of(tmp_path / "out")
    assert "val/shard.00000.mds" in before and "train/.preparing/state.json" in before
    with pytest.raises(DataError, match="out/val: the folder is not empty"):
        run(corpus, split="val")
    assert files_of(tmp_path / "out") == before
    run(corpus, held_out=0.3)
    run(corpus, held_out=0.3, out="whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def killed_in_finish(arguments: dict[str, Any]) -> None:
    """Prepare in a process that is killed when all shards are written, before the first index; its only state
    is that of the beginning."""

    def run() -> None:
        jobs.SHORTEST_PERIOD_SECONDS = 1e9
        sink.ShardWriter.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        prepare(**arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_file_that_somebody_put_into_a_half_prepared_folder_is_neither_replaced_nor_removed(
    run: Any, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"inputs": [str(corpus)], "out": tmp_path / "out", "shard_bytes": 30_000}
    arguments |= {"tokenizer": str(tokenizer_folder), "max_seq_len": 16, "workers": 1, "progress": False}
    killed_in_finish(arguments)
    theirs = tmp_path / "out" / "train" / "shard.00099.mds"
    theirs.write_bytes(b"not ours")
    with pytest.raises(DataError, match=r"shard\.00099\.mds: this preparation did not write it\. Move it"):
        run(corpus, shard_bytes=30_000)
    assert theirs.read_bytes() == b"not ours"


def test_what_a_refused_preparation_has_written_is_removed_after_a_kill_too(
    run: Any, tokenizer_folder: Path, corpus_texts: list[str], tmp_path: Path, small_units: None
) -> None:
    """The killed one wrote shards that no state names; the next one ends before it comes so far."""
    lines = write_lines(tmp_path / "a.jsonl", corpus_texts * 3)
    arguments: dict[str, Any] = {"inputs": [str(lines)], "out": tmp_path / "out", "shard_bytes": 30_000}
    arguments |= {"tokenizer": str(tokenizer_folder), "max_seq_len": 16, "workers": 1, "progress": False}
    killed_in_finish(arguments)
    assert len(list((tmp_path / "out" / "train").glob("shard.*.mds"))) > 3
    times = lines.stat()
    lines.write_bytes(b"x" + lines.read_bytes()[1:])
    os.utime(lines, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"a\.jsonl:1: this is not a line of JSON"):
        run(lines, shard_bytes=30_000)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_finishes_meanwhile_is_left_alone(
    run: Any, corpus: Path, tmp_path: Path, files_of: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock another process prepares the same, or something else."""
    locked, finished = sink.lock_folders, []

    @contextmanager
    def late(*folders: Path) -> Iterator[None]:
        if not finished:
            finished.append(True)
            run(corpus)
            finished.append(files_of(tmp_path / "out"))
        with locked(*folders):
            yield

    monkeypatch.setattr(module, "lock_folders", late)
    assert run(corpus).was_finished
    assert files_of(tmp_path / "out") == finished[1]
    finished.clear()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(DataError, match=r"was prepared with max_seq_len=16 \(now 8\)"):
        run(corpus, max_seq_len=8)
    assert files_of(tmp_path / "out") == finished[1]


def test_a_lock_whose_file_was_removed_while_it_was_waited_for_is_taken_again(tmp_path: Path) -> None:
    """Whoever finishes removes the lock's file; a lock on a file without a name keeps nobody out."""
    flock = fcntl.flock

    def removed_first(file: Any, operation: int) -> None:
        flock(file, operation)
        if (tmp_path / "out" / ".preparing").exists() and not removed:
            removed.append(True)
            shutil.rmtree(tmp_path / "out" / ".preparing")

    removed: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_first)
        with (
            sink.lock_folders(tmp_path / "out"),
            pytest.raises(DataError, match="another process is preparing it"),
            sink.lock_folders(tmp_path / "out"),
        ):
            pass


def test_a_held_out_split_that_another_process_prepares_is_held_too(
    run: Any, corpus: Path, tmp_path: Path
) -> None:
    with (
        sink.lock_folders(tmp_path / "out" / "val"),
        pytest.raises(DataError, match="out/val: another process is preparing it"),
    ):
        run(corpus, held_out=0.2)
    assert not (tmp_path / "out" / "train").exists()


TEXTS = ["def one(two):", "a second text", "and a third one"]
BORDERS: dict[tuple[str, str], tuple[list[int], list[int]]] = {
    # What the tokenizer adds by itself, the options -> the ids around each document.
    ("nothing", ""): ([], [2]),
    ("nothing", "add_bos=True"): ([1], [2]),
    ("bos", ""): ([1], [2]),
    ("bos", "add_bos=True"): ([1], [2]),
    ("bos", "add_bos=False"): ([], [2]),
    ("bos", "add_eos=False"): ([1], []),
    ("eos", ""): ([], [2]),
    ("eos", "add_eos=False"): ([], []),
    ("both", ""): ([1], [2]),
    ("both", "add_bos=True"): ([1], [2]),
    ("both", "add_bos=False add_eos=False"): ([], []),
    ("pairs", ""): ([1, 0], [0, 2]),
    ("pairs", "add_bos=False"): ([], [0, 2]),
}


@pytest.mark.parametrize(("adds", "words"), BORDERS)
def test_documents_have_what_the_tokenizer_adds_by_itself_and_nothing_twice(
    run: Any, tmp_path: Path, adding_tokenizers: dict[str, str], read_tokens: Reader, adds: str, words: str
) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    options: dict[str, Any] = {
        key: value == "True" for key, value in (word.split("=") for word in words.split())
    }
    options |= {"tokenizer": adding_tokenizers[adds], "max_seq_len": 4}
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    run(lines, **options)
    tokenizer: Any = load_tokenizer(adding_tokenizers[adds])
    before, after = BORDERS[adds, words]
    stream: list[int] = []
    for text in TEXTS:
        stream += [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], *after]
    assert (read_tokens(tmp_path / "out" / "train") == cut(stream, 4)).all()
    assert run(lines, **options).was_finished


def test_the_summary_says_whose_tokens_they_are(
    run: Any, tmp_path: Path, adding_tokenizers: dict[str, str]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    options = {"tokenizer": adding_tokenizers["bos"], "max_seq_len": 4}
    text = str(run(lines, **options)).splitlines()
    adds = "the tokenizer adds <s> before each text by itself"
    assert f"each document begins with <s> and ends with </s>; {adds}" in text
    text = str(run(lines, out="without", add_bos=False, **options))
    assert (
        "ends with </s>; the tokenizer adds <s> before each text by itself, but these documents are without"
        in text
    )


def test_shards_that_were_made_without_what_the_tokenizer_adds_are_neither_replaced_nor_called_the_same(
    run: Any, tmp_path: Path, adding_tokenizers: dict[str, str], files_of: Files
) -> None:
    """As all were before `add_bos` followed the tokenizer; their index says add_bos: false."""
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    options = {"tokenizer": adding_tokenizers["bos"], "max_seq_len": 4}
    run(lines, add_bos=False, **options)
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"add_bos=False \(now True; the default is what the tokenizer does"):
        run(lines, **options)
    assert run(lines, add_bos=False, **options).was_finished
    assert files_of(tmp_path / "out") == before


def test_text_that_spells_a_special_token_becomes_it_or_stays_text(
    run: Any,
    tmp_path: Path,
    adding_tokenizers: dict[str, str],
    tokenizer_folder: Path,
    read_tokens: Reader,
) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    for folder, spelled in ((adding_tokenizers["bos"], "</s>"), (str(tokenizer_folder), "<|endoftext|>")):
        tokenizer: Any = load_tokenizer(folder)
        text = f"one {spelled} two {spelled}"
        lines = write_lines(tmp_path / "a.jsonl", [text])
        found = {}
        for kind in ("as_tokens", "as_text"):
            out = f"{kind}{len(folder)}"
            run(lines, tokenizer=folder, out=out, special_tokens=kind, max_seq_len=2, workers=1)
            found[kind] = read_tokens(tmp_path / out / "train").ravel().tolist()
        assert found["as_tokens"].count(tokenizer.eos_token_id) in (2, 3)
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        start = found["as_text"].index(plain[0])
        assert found["as_text"][start : start + len(plain)] == plain[: len(found["as_text"]) - start]
        assert tokenizer.eos_token_id not in plain
        with pytest.raises(DataError, match=r"special_tokens=as_text \(now None\)"):
            run(lines, tokenizer=folder, out=f"as_text{len(folder)}", max_seq_len=2)


@pytest.mark.usefixtures("small_units")
def test_the_bytes_with_own_tokens_do_not_depend_on_workers_or_kills(
    run: Any, corpus: Path, tmp_path: Path, files_of: Files, adding_tokenizers: dict[str, str]
) -> None:
    options: dict[str, Any] = {"tokenizer": adding_tokenizers["both"], "special_tokens": "as_text"}
    options |= {"shard_bytes": 30_000, "max_seq_len": 16, "progress": False}
    run(corpus, out="one", **options)
    run(corpus, out="two", **options, workers=2)
    killed_in_finish({"inputs": [str(corpus)], "out": tmp_path / "killed", "workers": 1, **options})
    run(corpus, out="killed", **options)
    whole = files_of(tmp_path / "one")
    assert len(whole) > 3 and files_of(tmp_path / "two") == whole == files_of(tmp_path / "killed")


OLDER = Path(__file__).parent / "older"


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an older version made of four texts, one a unit: `finished`, and `half` when it was killed."""
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "text").iterdir():
        os.utime(path, (1.6e9, 1.6e9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "UNIT_BYTES", 900)
    options = {"tokenizer": "tokenizer", "max_seq_len": 16, "held_out": 0.3, "shard_bytes": 2000}
    return {**options, "workers": 1, "progress": False}


def test_what_an_older_version_prepared_is_finished(older: dict[str, Any], files_of: Files) -> None:
    before = files_of(Path("finished"))
    assert prepare(["text"], "finished", **older).was_finished
    assert files_of(Path("finished")) == before


def test_what_an_older_version_began_continues_to_the_same_bytes(
    older: dict[str, Any], files_of: Files
) -> None:
    half = files_of(Path("half"))
    assert {"train/.preparing/state.json", "val/shard.00000.mds"} <= half.keys()
    tokens = prepare(["text"], "half", **older).encoded_tokens
    assert files_of(Path("half")) == files_of(Path("finished"))
    assert 0 < tokens < 3000
