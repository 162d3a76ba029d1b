"""The quickstart's tasks are made from text that its training never reads, the same each time."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.load import parse_words
from mptfoundry.config.tasks import TaskFileConfig
from mptfoundry.data.shards.index import read_index

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import quickstart_tasks

    yield quickstart_tasks
    sys.modules.pop("quickstart_tasks", None)


def source(number: int) -> str:
    return (
        f"def function_{number}(value_{number}, other=None):\n"
        f'    """Describe the value {number} in a sentence that is long enough to be drawn as a docstring\n\n'
        '    More."""\n'
        f"    result = value_{number} * {number} + len(str(other))\n    return result\n"
    )


def test_tasks_hold_what_is_held_out(made: Any, tmp_path: Path) -> None:
    functions = made.Functions()
    for number in range(200):
        made.add_file(functions, source(number), 0.3, is_file_held_out=number % 3 == 0)
    held_out = range(0, 200, 3)
    assert [signature.split("(")[0] for signature, _ in functions.bodies] == [
        f"def function_{number}" for number in held_out
    ]
    assert 30 < len(functions.described) < 90
    names = made.write_tasks(functions, tmp_path / "tasks")
    first = {path.name: path.read_bytes() for path in (tmp_path / "tasks").iterdir()}
    made.write_tasks(functions, tmp_path / "tasks")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "tasks").iterdir()}
    tasks = parse_words([], TaskFileConfig, str(tmp_path / "tasks" / "tasks.yaml")).icl_tasks
    assert [task.label for task in tasks] == names == list(made.TASKS)
    for line in map(json.loads, (tmp_path / "tasks" / "signature-docstring.jsonl").read_text().splitlines()):
        number = line["query"].split("_")[1].split("(")[0]
        assert f"value {number} in" in line["choices"][line["gold"]] and len(set(line["choices"])) == 4
    for line in map(json.loads, (tmp_path / "tasks" / "body-signature.jsonl").read_text().splitlines()):
        number = line["continuation"].split("value_")[1].split(" ")[0]
        assert f"function_{number}(" in line["context_options"][line["gold"]]


def test_too_little_text_makes_no_tasks(made: Any, tmp_path: Path) -> None:
    assert made.write_tasks(made.Functions(), tmp_path) == []


def test_held_out_is_what_prepare_holds_out(made: Any, tmp_path: Path, tokenizer_folder: Path) -> None:
    from mptfoundry.data.prepare.prepare import prepare

    texts = [f"a text with the number {number}\n" * 20 for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "max_seq_len": 32, "workers": 1}
    prepare([str(tmp_path / "texts.jsonl")], tmp_path / "out", held_out=0.3, progress=False, **options)
    meta = read_index(tmp_path / "out" / "val", "val").meta
    assert meta is not None and meta.documents == sum(made.is_held_out(text, 0.3) for text in texts)


def test_the_table_names_random_baselines(made: Any, tmp_path: Path) -> None:
    results = {"results": {f"last-word/{shots}-shot": {"accuracy": 0.125, "stderr": 0.1} for shots in (0, 2)}}
    (tmp_path / "eval.json").write_text(json.dumps(results))
    assert made.accuracies(tmp_path / "eval.json") == {
        "last-word": "0.125 with 0 examples, 0.125 with 2 examples (random: 0.000)"
    }
    assert runpy.run_path(str(SCRIPTS / "quickstart.py"))["HELD_OUT"] == 0.05
