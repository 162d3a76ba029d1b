"""Runs that answer in-context tasks at their evaluations."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger

from mptfoundry import build
from mptfoundry.check import check
from mptfoundry.config.load import load_train_config, parse_words
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError, DataError, RunStopped
from mptfoundry.evaluate import evaluate
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.conftest import losses
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

TASKS = """
icl_tasks:
- label: sums
  dataset_uri: {folder}/sums.jsonl
  num_fewshot: [0, 1]
  icl_task_type: multiple_choice
- label: ends
  dataset_uri: {folder}/ends.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
  has_categories: true
- label: answers
  dataset_uri: {folder}/answers.jsonl
  num_fewshot: 0
  icl_task_type: generation_task_with_answers
  generation_kwargs: {{do_sample: true, temperature: 0.7, max_new_tokens: 3}}
eval_gauntlet:
  categories:
  - name: counting
    benchmarks: [{{name: sums, num_fewshot: 1, random_baseline: 0.5}}, {{name: ends, num_fewshot: 1}}]
"""
DATA: dict[str, list[dict[str, Any]]] = {
    "sums": [
        {"query": f"{n} and 1 is", "choices": ["a", "bc", "d"][: 2 + n % 2], "gold": n % 2} for n in range(7)
    ],
    "ends": [{"context": f"item {n} is", "continuation": "x", "category": "ab"[n % 2]} for n in range(6)],
    "answers": [{"context": f"say {n}", "answer": "e", "aliases": ["t", " "]} for n in range(3)],
}
LABELS = ["sums/0-shot", "sums/1-shot", "ends/1-shot", "answers/0-shot"]
ACCURACY = "InContextLearningMultipleChoiceAccuracy"
PLAIN = ["eval_interval=2ba", "max_duration=4ba", "save_interval=100ba"]

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def tasks(tiny_runs: Path) -> Path:
    folder = tiny_runs.parent
    for name, lines in DATA.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks.yaml").write_text(TASKS.format(folder=folder))
    return folder / "tasks.yaml"


@pytest.fixture(scope="module")
def run(tiny_runs: Path, tasks: Path) -> Run:
    """Trains under a name with tasks, with further words; returns the run's folder."""

    def start(name: str, *words: str) -> Path:
        given = [f"run_name={name}", *PLAIN, f"icl_tasks={tasks}", "icl_seq_len=64", *words]
        train(load_train_config(tiny_runs, given)[0])
        return tiny_runs.parent / name

    return start


LOGGED = InMemoryLogger()


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_loggers", lambda *_: [LOGGED])
        return run("whole", "eval_first=true", "loggers.in_memory_logger={}")


def results(folder: Path, batch: int) -> dict[str, dict[str, float]]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval" in row and row["batch"] == batch]
    return {label: metrics for row in rows for label, metrics in row["eval"].items()}


def test_every_evaluation_has_the_results_of_every_task(whole: Path) -> None:
    for batch in (0, 2, 4):
        found = results(whole, batch)
        assert list(found) == [*LABELS[:3], "ends/1-shot/a", "ends/1-shot/b", LABELS[3], "eval_gauntlet"]
        sums, ends = found["sums/1-shot"][ACCURACY], found["ends/1-shot"]["InContextLearningLMAccuracy"]
        assert found["eval_gauntlet"]["counting"] == pytest.approx(((sums - 0.5) / 0.5 + ends) / 2)


def test_the_loggers_get_the_metrics_by_llm_foundrys_names(whole: Path) -> None:
    counting = [float(value) for _, value in LOGGED.data["icl/metrics/eval_gauntlet/counting"]]
    assert counting == [results(whole, batch)["eval_gauntlet"]["counting"] for batch in (0, 2, 4)]
    for name in (
        f"metrics/sums/0-shot/{ACCURACY}",
        "metrics/sums/1-shot/InContextLearningMCExpectedCalibrationError",
        "metrics/ends/1-shot/InContextLearningLMAccuracy",
        "metrics/ends/1-shot/b/InContextLearningLMAccuracy",
        "metrics/answers/0-shot/InContextLearningGenerationExactMatchAccuracy",
    ):
        assert len(LOGGED.data[name]) == 3


def test_the_report_has_a_table_of_the_tasks(whole: Path) -> None:
    lines = (whole / "report.md").read_text().splitlines()
    assert "| accuracy after batch | 0 | 2 | 4 |" in lines
    [row] = [line for line in lines if line.startswith("| sums/0-shot |")]
    assert row.count("±") == 3
    assert any(line.startswith("| eval_gauntlet: counting |") for line in lines)
    assert not any("ends/1-shot/a" in line for line in lines)


def test_the_results_are_those_of_the_eval_verb(whole: Path, tasks: Path, tmp_path: Path) -> None:
    words = [f"model={whole}", f"icl_tasks={tasks}", "max_seq_len=64", f"out={tmp_path}"]
    expected = evaluate(parse_words(words, EvalConfig))
    for label, metrics in results(whole, 4).items():
        assert metrics.items() <= {name: pytest.approx(v) for name, v in expected[label].items()}.items()


def test_losses_are_bitwise_those_without_tasks(whole: Path, tiny_runs: Path) -> None:
    train(load_train_config(tiny_runs, ["run_name=plain", *PLAIN])[0])
    assert losses(whole) == losses(tiny_runs.parent / "plain")


class SignalAt(Callback):
    """Sends this process SIGTERM in an evaluator of the evaluation after a batch, once."""

    label, batch = "", -1

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        if (state.dataloader_label, state.timestamp.batch) == (self.label, self.batch):
            type(self).batch = -1
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while not signal.getsignal(signal.SIGTERM).__self__.requested:  # type: ignore[union-attr]
                assert time.monotonic() < deadline, "the signal was not heard"


@pytest.mark.parametrize("batch", [2, 4])
def test_stopped_within_a_task_a_run_goes_on_to_the_same_losses_and_results(
    whole: Path, run: Run, batch: int
) -> None:
    name = f"stopped-{batch}"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunStopped, match=f"after batch {batch}"):
        signals = type("SignalAt", (SignalAt,), {"label": "ends/1-shot", "batch": batch})
        patch.setitem(build.CALLBACKS, "lr_monitor", signals)
        run(name, "callbacks.lr_monitor={}")
    folder = run(name)
    assert losses(folder) == losses(whole)
    assert [results(folder, each) for each in (2, 4)] == [results(whole, each) for each in (2, 4)]


def test_two_sharded_ranks_train_and_evaluate_as_one(tiny_runs: Path, tasks: Path, tmp_path: Path) -> None:
    words = [*PLAIN, "model.resid_pdrop=0", "max_duration=2ba", f"save_folder={tmp_path}/{{run_name}}"]
    train(load_train_config(tiny_runs, ["run_name=plain", *words])[0])
    words += ["run_name=tasks", "fsdp_config={}", f"icl_tasks={tasks}", "icl_seq_len=64", "eval_first=true"]
    done = run_on_ranks("scripts/train.py", tiny_runs, *words)
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "tasks") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5), done.stdout
    found = results(tmp_path / "tasks", 0)
    alone = evaluate(
        parse_words(
            [f"model={tmp_path}/tasks", f"icl_tasks={tasks}", "max_seq_len=64", f"out={tmp_path}"], EvalConfig
        )
    )
    assert found.keys() == alone.keys()
    for label, metrics in results(tmp_path / "tasks", 2).items():
        assert metrics == {name: pytest.approx(alone[label][name]) for name in metrics}


def checked(tiny_runs: Path, *words: str) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        check(load_train_config(tiny_runs, words)[0])
    return str(error.value)


def test_check_names_the_tasks(tiny_runs: Path, tasks: Path) -> None:
    said = check(load_train_config(tiny_runs, [f"icl_tasks={tasks}", "eval_interval=5ba"])[0])
    [line] = [line for line in said.splitlines() if line.startswith("  tasks")]
    assert "every 5ba, with these numbers of examples: sums [0, 1], ends [1], answers [0], averaged" in line


def test_check_names_every_mistake_with_its_file_and_line(
    tiny_runs: Path, tasks: Path, tmp_path: Path
) -> None:
    text = tasks.read_text().replace(str(tiny_runs.parent), str(tmp_path))
    for name, lines in DATA.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "sums.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\nno\n')
    (tmp_path / "ends.jsonl").write_text('{"context": "a"}\n')
    file = tmp_path / "tasks.yaml"
    file.write_text(text)
    said = checked(tiny_runs, f"icl_tasks={file}")
    assert "sums.jsonl:1: gold: 2 is not the index" in said and "sums.jsonl:2: is not JSON" in said
    assert "ends.jsonl:1: continuation: is missing" in said
    file.write_text(text.replace("name: sums, num_fewshot: 1", "name: sum, num_fewshot: 1"))
    said = checked(tiny_runs, f"icl_tasks={file}")
    assert "tasks.yaml:20: eval_gauntlet.categories[0].benchmarks[0].name: sum/1-shot is not among" in said
    assert "Similar ones: sums/1-shot" in said
    file.write_text(text.replace("icl_task_type: language_modeling", "type: language_modeling"))
    said = checked(tiny_runs, f"icl_tasks={file}")
    assert "tasks.yaml:10: icl_tasks[1].type: unknown key" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["icl_tasks=nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["eval_gauntlet=a.yaml"], "has no effect without icl_tasks."),
        (["icl_tasks=a.yaml", "icl_seq_len=1"], "icl_seq_len=1: 1 is too small."),
        (["icl_tasks=a.yaml", "icl_subset_num_batches=0"], "icl_subset_num_batches=0: 0 is too small."),
        (
            ["icl_tasks=a.yaml", "icl_seq_len=33", "model.attn_config.alibi=false"],
            "icl_seq_len=33: 33 exceeds the 32 learned positions",
        ),
        (
            [
                "icl_tasks=[{label: a, dataset_uri: b, icl_task_type: schema, num_fewshot: 0}]",
                "eval_gauntlet={categories: [{name: c, benchmarks: [{name: a, num_fewshot: 2}]}]}",
            ],
            "eval_gauntlet.categories[0].benchmarks[0].name: a/2-shot is not among the tasks",
        ),
    ],
)
def test_what_a_run_can_not_do_with_tasks_is_one_error(tiny_runs: Path, words: list[str], said: str) -> None:
    error = checked(tiny_runs, *words)
    assert said in error and "\n" not in error


def test_keys_that_need_tasks_are_noted_without_them(tiny_runs: Path) -> None:
    _, notes = load_train_config(tiny_runs, ["icl_seq_len=8", "icl_subset_num_batches=2", "eval_first=true"])
    assert notes == [
        "eval_first: has no effect without eval_loader or icl_tasks.",
        "icl_seq_len: has no effect without icl_tasks.",
        "icl_subset_num_batches: has no effect without icl_tasks.",
    ]
