"""`compare` of evaluations: paired differences, what flipped, what is refused, and the exit code for CI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.cli import main
from mptfoundry.mpt.network import MPT
from mptfoundry.tasks.answers import settings_hash
from tests.conftest import TINY

Capture = pytest.CaptureFixture[str]
DOCUMENTS = [{"query": f"What follows {n}?", "choices": ["this", "that"], "gold": 0} for n in range(60)]


class Written:
    """An evaluation as `eval` writes it, of two numbers of examples of one task."""

    def __init__(self, folder: Path, right: Sequence[bool], data: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {
            "model": str(folder),
            "tasks": [{"label": "next", "dataset_uri": str(data), "icl_task_type": "multiple_choice"}],
            "data": {"next": hashlib.sha256(data.read_bytes()).hexdigest()},
            "tokenizer": "a",
            "max_seq_len": 64,
            "limit": -1,
            "precision": "fp32",
            "versions": {"torch": "2"},
        }
        self.options: dict[str, Any] = {"eval_subset_num_batches": -1}
        self.results: dict[str, dict[str, float]] = {"next/0-shot": {"documents": 60.0}}
        self.lines = [
            {
                "task": "next",
                "shots": shots,
                "doc_id": doc_id,
                "prompt_hash": f"{doc_id}-{shots}",
                "choices": ["this", "that"],
                "loglikelihoods": [-2.0, -4.0] if is_right else [-6.0, -4.0],
                "tokens": [2, 2],
                "chosen": 0 if is_right else 1,
                "gold": 0,
                "correct": is_right,
            }
            for shots in (0, 2)
            for doc_id, is_right in enumerate(right)
        ]

    def write(self) -> Path:
        self.folder.mkdir(exist_ok=True)
        content = {
            "model": str(self.folder),
            "results": self.results,
            "options": self.options,
            "settings": self.settings,
        }
        (self.folder / "eval.json").write_text(json.dumps(content))
        rows = [{"settings": settings_hash(self.settings)}, *self.lines]
        (self.folder / "eval.samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.folder


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, Sequence[bool]], Written]:
    data = tmp_path / "next.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in DOCUMENTS))
    return lambda name, right: Written(tmp_path / name, right, data)


def compared(capsys: Capture, *words: str | Path, code: int = 0) -> str:
    assert main(["compare", *map(str, words)]) == code
    printed = capsys.readouterr()
    return printed.out + printed.err


BASE = [n % 2 == 0 for n in range(60)]
BETTER = [right or n % 10 == 1 for n, right in enumerate(BASE)]
MUCH_WORSE = [right and n % 6 == 0 for n, right in enumerate(BASE)]


def test_answers_are_paired_document_by_document(written: Callable[..., Written], capsys: Capture) -> None:
    base, new = written("base", BASE), written("new", BETTER)
    new.settings["precision"] = "amp_bf16"
    text = compared(capsys, base.write(), new.write())
    lines = [line.split() for line in text.splitlines()]
    assert ["precision", "fp32", "amp_bf16"] in lines
    row = next(line for line in lines if line[:1] == ["next/0-shot"])
    assert row[1:5] == ["60", "0.5000", "0.6000", "+0.1000"] and row[7:] == ["6", "0", "54", "0.0312"]
    gold = [line for line in lines if line[:1] == ["next/0-shot"]][1]
    assert gold[2:5] == ["-2.0000", "-1.8000", "+0.2000"]  # nats per token of the right answer
    assert "mean of tasks" not in text and "limited" not in text


def test_documents_that_flipped_are_shown_with_their_text(
    written: Callable[..., Written], capsys: Capture, tmp_path: Path
) -> None:
    words = [written("base", BASE).write(), written("new", BETTER).write(), "examples=2"]
    text = compared(capsys, *words)
    assert "next/0-shot: 2 of 6 documents that flipped" in text and "document 11: What follows 11?" in text
    assert "base: wrong, that" in text and "new: right, this" in text and "document 21" not in text
    (tmp_path / "next.jsonl").write_text("{}\n")  # another file by now
    text = compared(capsys, *words)
    assert "document 11\n" in text and "What follows" not in text


def test_worse_by_the_interval_ends_with_3(written: Callable[..., Written], capsys: Capture) -> None:
    base, worse, better = (
        written("base", BASE).write(),
        written("worse", MUCH_WORSE).write(),
        written("b", BETTER).write(),
    )
    text = compared(capsys, base, worse, "fail_if=worse", code=3)
    assert "error: significantly worse than" in text and "worse: next/0-shot" in text
    compared(capsys, base, worse)
    compared(capsys, base, better, "fail_if=worse")
    compared(capsys, base, base, "fail_if=worse")
    compared(capsys, base, better, worse, "fail_if=worse", code=3)


def test_a_task_with_several_numbers_of_examples_counts_once_in_the_mean(
    written: Callable[..., Written], capsys: Capture
) -> None:
    pair = [written("base", BASE), written("new", BETTER)]
    for each in pair:
        each.settings["tasks"].append({**each.settings["tasks"][0], "label": "other"})
        each.settings["data"]["other"] = each.settings["data"]["next"]
        each.lines += [
            {**line, "task": "other", "correct": True} for line in each.lines if line["shots"] == 0
        ]
    text = compared(capsys, *(each.write() for each in pair))
    row = next(line for line in text.splitlines() if line.startswith("mean of tasks"))
    assert row.split()[3:7] == ["120", "0.7500", "0.8000", "+0.0500"]


def test_a_limited_evaluation_says_so(written: Callable[..., Written], capsys: Capture) -> None:
    pair = [written("base", BASE), written("new", BETTER)]
    for each in pair:
        each.settings["limit"] = 60
    assert "limited: only the first 60 documents" in compared(capsys, *(each.write() for each in pair))


def change_lines(written: Written, **values: Any) -> None:
    written.lines[3].update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda new: new.settings.update(limit=10), "limit: -1 and 10"),
        (lambda new: new.settings.update(max_seq_len=32), "max_seq_len: 64 and 32"),
        (lambda new: new.settings["data"].update(next="0"), "next: other documents"),
        (lambda new: new.settings["tasks"][0].update(prelimiter="Q: "), 'next: prelimiter: null and "Q: "'),
        (lambda new: change_lines(new, prompt_hash="x"), "document 3 has another prompt in new"),
        (lambda new: change_lines(new, gold=1), "document 3 has another gold in new"),
        (lambda new: new.lines.pop(), "next/2-shot: 60 documents and 59, with 59 in common"),
        (
            lambda new: (new.settings.update(tokenizer="b"), change_lines(new, prompt_hash="x")),
            "the tokenizers differ",
        ),
        (lambda new: [line.update(shots=5) for line in new.lines], "have other numbers of examples"),
    ],
)
def test_what_asked_other_questions_is_refused(
    written: Callable[..., Written], capsys: Capture, change: Callable[[Written], Any], said: str
) -> None:
    base, new = written("base", BASE), written("new", BETTER)
    change(new)
    text = compared(capsys, base.write(), new.write(), code=1)
    assert said in text and "can't be compared" in text and "Traceback" not in text


def test_public_tasks_are_paired_too(written: Callable[..., Written], capsys: Capture) -> None:
    """Their lines may have no gold, and no answer to judge."""
    pair = [written("base", BASE), written("new", BETTER)]
    public = {"lm_eval": "0.4.13", "groups": {}, "tasks": {"arc": {"num_fewshot": 0, "documents": "1"}}}
    for each in pair:
        each.settings |= {"tasks": [], "data": {}, "public": deepcopy(public)}
        kept = [line for line in each.lines if line["shots"] == 0]
        more = {"task": "arc", "shots": None, "gold": None, "chosen": None, "choices": []}
        each.lines = [{**line, **more} for line in kept]
        each.lines += [{**line, "request": "rolling", "correct": None} for line in each.lines]
    text = compared(capsys, *(each.write() for each in pair), "examples=1")
    row = next(line for line in text.splitlines() if line.startswith("arc/0-shot"))
    assert row.split()[1:5] == ["60", "0.5000", "0.6000", "+0.1000"] and "document 1\n" in text
    assert "log-likelihood" not in text
    pair[1].settings["public"]["tasks"]["arc"]["documents"] = "2"
    assert 'arc: documents: "1" and "2"' in compared(capsys, *(each.write() for each in pair), code=1)


def test_missing_tasks_are_named_and_fail_a_gate(written: Callable[..., Written], capsys: Capture) -> None:
    base, new = written("base", BASE), written("new", BETTER)
    new.lines = [line for line in new.lines if line["shots"] == 0]
    words = [base.write(), new.write()]
    assert "note: only base has next/2-shot; left out." in compared(capsys, *words)
    assert "fail_if: new lacks next/2-shot" in compared(capsys, *words, "fail_if=worse", code=1)


def test_losses_of_evaluations_are_compared_over_the_same_tokens(
    written: Callable[..., Written], capsys: Capture
) -> None:
    base, new = written("base", BASE), written("new", BETTER)
    for each, loss in ((base, 3.0), (new, 2.5)):
        each.results = {"val": {"LanguageCrossEntropy": loss, "tokens": 100.0}}
        each.settings, each.lines = {}, []
    words = [base.write(), new.write()]
    assert ["val", "LanguageCrossEntropy", "3.0000", "2.5000"] in [
        line.split() for line in compared(capsys, *words).splitlines()
    ]
    assert "fail_if" in compared(capsys, *words, "fail_if=worse", code=1)
    new.results = deepcopy(new.results)
    new.results["val"]["tokens"] = 90.0
    assert "val: losses over 100 and 90 tokens" in compared(capsys, base.write(), new.write(), code=1)


def test_damaged_or_unfinished_evaluations_are_refused(
    written: Callable[..., Written], capsys: Capture, tmp_path: Path
) -> None:
    base, new = written("base", BASE).write(), written("new", BETTER).write()
    samples = new / "eval.samples.jsonl"
    content = samples.read_bytes()
    samples.write_bytes(content[:-20])
    assert "is damaged, or is of an evaluation that has not ended" in compared(capsys, base, new, code=1)
    samples.write_bytes(content.replace(b'{"settings": "', b'{"settings": "0'))
    assert "has the answers of another evaluation" in compared(capsys, base, new, code=1)
    samples.unlink()
    assert "is missing. The answers of" in compared(capsys, base, new, code=1)
    samples.write_bytes(content)
    results = (new / "eval.json").read_bytes()
    (new / "eval.json").write_bytes(results[:50])
    assert "is not the results of an evaluation" in compared(capsys, base, new, code=1)
    (new / "eval.json").unlink()
    assert "its evaluation has not ended" in compared(capsys, base, new, code=1)
    (new / "eval.json").write_bytes(results)
    run = tmp_path / "run"
    for number in range(2):
        (run / "evals" / str(number)).mkdir(parents=True)
        (run / "evals" / str(number) / "eval.json").write_bytes(results)
    assert "has several evaluations. Name one of them" in compared(capsys, base, run, code=1)


def test_what_eval_writes_can_be_compared(
    write_run: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "next.jsonl").write_text("".join(json.dumps(line) + "\n" for line in DOCUMENTS[:8]))
    (tmp_path / "tasks.yaml").write_text(
        f"icl_tasks:\n- {{label: next, dataset_uri: {tmp_path}/next.jsonl, icl_task_type: multiple_choice, "
        "num_fewshot: [0, 1]}\n"
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, seed in zip(folders, (1, 2), strict=True):
        model = write_run(network=MPT(TINY, seed=seed), name=f"run-{seed}")
        words = [str(model), f"icl_tasks={tmp_path}/tasks.yaml", f"out={folder}", "max_seq_len=64"]
        assert main(["eval", *words]) == 0
    capsys.readouterr()
    text = compared(capsys, *folders, "examples=1")
    assert "next/0-shot" in text and "next/1-shot" in text and "mean of tasks" not in text
