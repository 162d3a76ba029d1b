from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mptfoundry.data.records import records
from mptfoundry.data.records.inputs import find_inputs
from mptfoundry.data.records.records import BadInput, Document, Part, Skipped, plan_units, read_part


def read_all(*given: Path, cut_texts: bool = True) -> list[Document | Skipped | BadInput]:
    inventory = find_inputs([str(path) for path in given], text_key="text")
    units = plan_units(inventory.inputs, inventory.datasets, cut_texts)
    return [
        item for unit in units for part in unit.parts for item in read_part(part, "text", inventory.datasets)
    ]


def test_units_share_the_weight_of_the_inputs(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = find_inputs([str(corpus)], text_key="text")
    monkeypatch.setattr(records, "UNIT_BYTES", 4000)
    units = list(plan_units(inventory.inputs, [], True))
    assert sum(unit.weight for unit in units) == inventory.size
    assert max(unit.weight for unit in units) <= 4000
    assert len(units) > inventory.size / 4000


def test_a_long_text_is_cut_where_its_ids_can_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one line\n\n  indented\nWord 言葉\n" * 60
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for size in (1, 7, 100, 10_000):
        monkeypatch.setattr(records, "UNIT_BYTES", size)
        documents = [item for item in read_all(tmp_path / "a.txt") if isinstance(item, Document)]
        assert "".join(document.text for document in documents) == text
        assert sum(document.size for document in documents) == len(text.encode())
        assert [document.is_start for document in documents] == [True] + [False] * (len(documents) - 1)
        assert [document.is_end for document in documents] == [False] * (len(documents) - 1) + [True]
        assert all(document.text.endswith("\n") and document.text[0].isalpha() for document in documents)
        assert len({document.identity for document in documents}) == 1
    assert len(documents) == 1


def test_a_long_text_stays_whole_where_ids_could_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 100)
    monkeypatch.setattr(records, "UNIT_BYTES", 10)
    assert len(read_all(tmp_path / "a.txt", cut_texts=False)) == 1


def test_a_text_without_safe_cuts_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("no line ends here " * 100)
    monkeypatch.setattr(records, "UNIT_BYTES", 64)
    (document,) = read_all(tmp_path / "a.txt")
    assert isinstance(document, Document) and document.is_start and document.is_end


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 50 + b"\xfe\n" + b"fine\n" * 50)
    monkeypatch.setattr(records, "UNIT_BYTES", 40)
    problems = [str(item) for item in read_all(tmp_path / "a.txt") if isinstance(item, BadInput)]
    assert len(problems) == 1 and "a.txt: byte 250 (0xfe) is not UTF-8" in problems[0]


def test_binary_and_empty_files_are_skipped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 100)
    (tmp_path / "data").write_bytes(b"\x7fELF\0\0" * 100)
    (tmp_path / "empty").write_text("")
    skipped = [
        (item.reason, Path(item.where).name) for item in read_all(tmp_path) if isinstance(item, Skipped)
    ]
    assert skipped == [("binary file", "data"), ("empty file", "empty")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert [item.text for item in read_all(tmp_path) if isinstance(item, Document)] == ["hello", "hello"]


@pytest.mark.parametrize("size", [1, 10, 33, 1 << 20])
def test_lines_are_read_once_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", size)
    lines = [
        '{"text": "a"}',
        "",
        '{"text": "longer than a unit"}\r',
        " ",
        '{"text": "line\\nend"}',
        '{"text": ""}',
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())
    texts = [item.text for item in read_all(tmp_path / "a.jsonl") if isinstance(item, Document)]
    assert texts == ["a", "longer than a unit", "line\nend", ""]


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (problem,) = read_all(tmp_path / "a.parquet")
    assert "there is no column 'text'. Set text_key to one of body, n." in str(problem)


def test_a_null_in_a_parquet_file_is_named_by_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b", None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    *_, problem = read_all(tmp_path / "a.parquet")
    assert "a.parquet: row 2: the field 'text' is null, not a string." in str(problem)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is something else")
    (problem,) = read_all(tmp_path / name)
    assert isinstance(problem, BadInput)
    assert re.search("not a readable Parquet file|the compressed file is damaged", str(problem))


def test_what_was_read_before_the_damage_is_kept(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{number} " * 50}) + "\n" for number in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-20])
    *documents, problem = read_all(tmp_path / "a.jsonl.gz")
    assert isinstance(problem, BadInput) and all(isinstance(item, Document) for item in documents)


@pytest.mark.parametrize("pack", [None, "gzip", "zstd"])
def test_an_array_of_records_is_read_entry_by_entry_also_compressed(tmp_path: Path, pack: str | None) -> None:
    import pyarrow

    content = json.dumps([{"text": "one"}, {"text": 2}, {"text": "three"}], indent=1).encode()
    path = tmp_path / {None: "a.json", "gzip": "a.json.gz", "zstd": "a.json.zst"}[pack]
    with pyarrow.CompressedOutputStream(str(path), pack) if pack else path.open("wb") as file:
        file.write(content)
    first, bad, last = read_all(path)
    assert isinstance(first, Document) and first.text == "one"
    assert str(bad) == f"{path}:2: the field 'text' is a number, not a string."
    assert isinstance(last, Document) and last.text == "three"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"text": "one"}, indent=2),
        json.dumps({"version": 1, "data": [{"text": "one"}]}),
        json.dumps({"version": 1, "data": [{"text": "one"}]}, indent=2),
    ],
)
def test_advice_for_a_json_file_that_is_one_object_works(tmp_path: Path, content: str) -> None:
    """Each error's command is run, until there is none."""
    path = tmp_path / "it's.json"
    path.write_text(content)
    for _ in range(3):
        item = read_all(path)[0]
        if isinstance(item, Document):
            break
        command = str(item).split("`")[1].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, check=True)
        path = max(tmp_path.iterdir(), key=lambda each: len(each.name))
    assert item.text == "one"


def test_a_file_that_vanishes_is_one_clear_error(tmp_path: Path) -> None:
    (item,) = read_part(Part("text", str(tmp_path / "gone.txt"), 0, 5), "text", [])
    assert "gone.txt: it can't be read (No such file or directory)." in str(item)
