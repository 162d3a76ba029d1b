from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from mptfoundry.data.records.inputs import Inventory, find_inputs
from mptfoundry.errors import DataError


def find(*given: Path | str, **options: object) -> Inventory:
    return find_inputs([str(word) for word in given], **{"text_key": "text", **options})  # type: ignore[arg-type]


def kinds(inventory: Inventory) -> dict[str, str]:
    return {source.name: source.kind for source in inventory.inputs}


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_folder_is_read_by_name_whatever_lies_below(tmp_path: Path) -> None:
    write(tmp_path, b_dot_py="x", a__z_dot_txt="x", a__c_dot_md="x", README="x", _dot_git__config="x")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "b.txt").write_text("x")
    (tmp_path / "c.png").write_bytes(b"x")
    inventory = find(tmp_path)
    assert list(kinds(inventory)) == ["README", "a/c.md", "a/z.txt", "b.py"]
    assert inventory.skipped == {"binary file": 1}
    assert inventory.size == 4


def test_a_json_file_is_lines_if_it_is_named_or_its_first_line_is_a_record(tmp_path: Path) -> None:
    record = json.dumps({"text": "x"}) + "\n"
    write(
        tmp_path,
        a_dot_json=record,
        b_dot_json='{\n "name": 1\n}\n',
        c_dot_json='{"name": 1}',
        d_dot_jsonl="x",
    )
    assert kinds(find(tmp_path)) == {
        "a.json": "lines",
        "b.json": "text",
        "c.json": "text",
        "d.jsonl": "lines",
    }
    assert kinds(find(tmp_path / "c.json")) == {"c.json": "lines"}
    assert kinds(find(tmp_path, text_key="name"))["c.json"] == "text"
    write(tmp_path, c_dot_json='{"name": "y"}')
    assert kinds(find(tmp_path, text_key="name"))["c.json"] == "lines"


def test_patterns_choose_files_and_leave_out_folders(tmp_path: Path) -> None:
    write(
        tmp_path, a_dot_py="x", test__b_dot_py="x", lib__test__c_dot_py="x", lib__d_dot_py="x", e_dot_txt="x"
    )
    assert list(kinds(find(tmp_path, include=["*.py"], exclude=["test"]))) == ["a.py", "lib/d.py"]
    assert list(kinds(find(tmp_path, include=["lib/*"]))) == ["lib/d.py", "lib/test/c.py"]
    assert "e.txt" not in kinds(find(tmp_path, exclude=["e.*"]))


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    write(tmp_path, b_dot_txt="x", a_dot_txt="x")
    assert [source.name for source in find(tmp_path / "b.txt", tmp_path / "a.txt").inputs] == [
        "b.txt",
        "a.txt",
    ]


def test_the_digest_sees_names_sizes_and_times(tmp_path: Path) -> None:
    write(tmp_path, a_dot_txt="one")
    first = find(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    os.utime(tmp_path / "a.txt", (1, 1))
    second = find(tmp_path)
    assert first.digest() == second.digest()
    assert first.digest(with_times=True) != second.digest(with_times=True)
    write(tmp_path, b_dot_txt="")
    assert find(tmp_path).digest() != first.digest()


def test_a_saved_data_set_is_one_input(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": ["x"], "n": [1]}).save_to_disk(str(tmp_path / "set"))
    inventory = find(tmp_path / "set", text_key="body")
    assert [source.kind for source in inventory.inputs] == ["dataset"]
    assert inventory.datasets[0].column_names == ["body"]
    with pytest.raises(DataError, match=r"there is no column 'text'. Set text_key to one of body, n."):
        find(tmp_path / "set")
    with pytest.raises(DataError, match=r"the column 'n' holds Value\(.*\), not strings. Set text_key."):
        find(tmp_path / "set", text_key="n")


def test_a_missing_split_of_a_saved_data_set_is_named(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(str(tmp_path / "sets"))
    with pytest.raises(DataError, match=r"there is no split 'train'. Set hf_split to one of a, b."):
        find(tmp_path / "sets")
    assert len(find(tmp_path / "sets", hf_split="b").inputs) == 1
    rows.save_to_disk(str(tmp_path / "one"))
    for name in ("one", "sets"):
        with pytest.raises(DataError, match=rf"{name}: hf_split: a\[:50%\]: only data sets .* Use a, "):
            find(tmp_path / name, hf_split="a[:50%]")


def test_nothing_to_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No input is given"):
        find()
    with pytest.raises(DataError, match=r"there is no such file or folder. A hub's data set is written hf:"):
        find(tmp_path / "none")
    with pytest.raises(DataError, match=r"there is no text to read. Give files of text, JSONL or Parquet."):
        find(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"there is no text to read \(left out: 1 binary file\)"):
        find(tmp_path)
    with pytest.raises(DataError, match=r"a .png file holds no text"):
        find(tmp_path / "x.png")


def test_a_data_set_that_can_not_be_fetched_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^hf:no-one/nothing: the data set can't be loaded: "):
        find("hf:no-one/nothing")


def test_an_array_of_records_in_a_folder_is_records(tmp_path: Path) -> None:
    records, long = json.dumps([{"text": "x"}], indent=1), json.dumps([{"text": "x" * (1 << 21)}])
    numbers, other = "[1, 2]", json.dumps([{"name": "x"}])
    write(
        tmp_path,
        a_dot_json=records,
        b_dot_json=long,
        c_dot_json=numbers,
        d_dot_json=other,
        e_dot_json=" [ ]",
        f_dot_json="[",
        g_dot_JSON="\ufeff" + records,
    )
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(records.encode()))
    texts = {"c.json", "d.json", "f.json"}
    assert {name for name, kind in kinds(find(tmp_path)).items() if kind == "text"} == texts
    assert len(kinds(find(tmp_path))) == 8
    assert kinds(find(tmp_path, text_key="name"))["d.json"] == "lines"
    assert set(kinds(find(tmp_path, text_key=None)).values()) == {"lines"}


def test_plain_text_is_counted_by_ending(tmp_path: Path) -> None:
    write(tmp_path, a_dot_py="x", b_dot_PY="x", c_dot_csv="a,b", README="x", d_dot_jsonl="x", e_dot_json="{")
    assert find(tmp_path).plain_text == {".py": 2, ".csv": 1, "": 1, ".json": 1}


def test_compressed_text_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path, a_dot_txt="x")
    for name in ("a.md.gz", "b.tar.zst"):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        with pytest.raises(
            DataError, match=f"{name}: only .jsonl, .ndjson and .json files are read compressed"
        ):
            find(tmp_path / name)
    assert find(tmp_path).skipped == {
        "compressed file (only .jsonl, .ndjson and .json are read compressed)": 2
    }
