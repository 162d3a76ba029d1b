"""The report: from a whole record, from one of a crashed run, and from nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mptfoundry.errors import ConfigError, DataError
from mptfoundry.run.report import eval_losses, task_scores, write_report

pytestmark = pytest.mark.pictures


def record(folder: Path, batches: int) -> None:
    rows = []
    for batch in range(1, batches + 1):
        rows.append(
            {
                "batch": batch,
                "tokens": 1000 * batch,
                "seconds": 0.5 * batch,
                "loss": 8.0 / batch if batch != 2 else None,
                "lr": 1e-4,
                "grad_norm": 1.0 / batch,
                "tokens_per_second": 2000.0,
                "mfu": None,
                "peak_memory_bytes": 2**30,
            }
        )
    score = {"LanguageCrossEntropy": 2.5, "LanguagePerplexity": math.exp(2.5), "tokens": 12345.0}
    rows.append({"batch": batches, "tokens": 1000 * batches, "eval": {"held_out": score}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"batch": 99, "lo')


def test_a_run_becomes_a_page_and_a_picture(tmp_path: Path) -> None:
    record(tmp_path, batches=4)
    (tmp_path / "config.yaml").write_text("")
    for batch in (2, 4):
        (tmp_path / f"ep0-ba{batch}-rank0.pt").write_text("")
    page = write_report(tmp_path, facts={"parameters": "125,311,488"}).read_text()
    for line in (
        "| parameters | 125,311,488 |",
        "| steps | 4 |",
        "| tokens | 4,000 |",
        "| loss | 8 at first, 2 at the end (the mean of the last 5 % of the steps) |",
        "| training time | 0:00:02, evaluations not included |",
        "| tokens per second | 2,000 |",
        "| peak memory | 1.00 GiB |",
        "| batch | LanguageCrossEntropy | LanguagePerplexity | tokens |",
        "| 4 | 2.5 | 12.18 | 12,345 |",
        f"| the last checkpoint | `{tmp_path}/ep0-ba4-rank0.pt` |",
        f"| the resolved configuration | `{tmp_path}/config.yaml` |",
    ):
        assert line in page.splitlines()
    assert "MFU" not in page
    assert "## Evaluation: held_out" in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_one_batch_is_enough(tmp_path: Path) -> None:
    record(tmp_path, batches=1)
    assert "| steps | 1 |" in write_report(tmp_path).read_text()


def test_without_a_batch_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no batch has been recorded"):
        write_report(tmp_path)


def test_evaluations_are_all_shown_or_it_is_said_how_many(tmp_path: Path) -> None:
    record(tmp_path, batches=4)
    for count, shown in ((7, 7), (200, 50)):
        rows = [
            {"batch": batch, "tokens": batch, "seconds": 1.0, "eval": {"val": {"loss": 1 / batch}}}
            for batch in range(1, count + 1)
        ]
        (tmp_path / "metrics.jsonl").write_text(
            "".join(
                json.dumps(row) + "\n" for row in [{"batch": 1, "tokens": 1, "seconds": 1, "loss": 2}, *rows]
            )
        )
        lines = write_report(tmp_path).read_text().splitlines()
        table = lines[lines.index("## Evaluation: val") + 4 :][:shown]
        assert table[0].startswith("| 1 |") and table[-1].startswith(f"| {count} |")
        said = "50 of 200 evaluations; all of them are in `metrics.jsonl`."
        assert (said in lines) == (count == 200)


def test_a_row_that_lacks_what_is_drawn_is_passed_over(tmp_path: Path) -> None:
    record(tmp_path, batches=3)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"batch": 1, "loss": 5}\n' + text)
    assert "| steps | 3 |" in write_report(tmp_path).read_text()


def test_the_picture_has_the_losses_of_evaluations_whatever_the_model() -> None:
    language = {"tokens": 10, "eval": {"held_out": {"LanguageCrossEntropy": 2.5, "tokens": 99.0}}}
    head = {"tokens": 20, "eval": {"held_out": {"accuracy": 0.9, "loss": 0.5}, "other": {"loss": None}}}
    assert eval_losses([language, head]) == {"held_out": [(10, 2.5), (20, 0.5)]}


def test_a_report_for_which_there_is_no_room_is_one_error(
    tmp_path: Path, small_files: Callable[[int], AbstractContextManager[None]]
) -> None:
    record(tmp_path, batches=4)
    with small_files(100), pytest.raises(ConfigError, match=f"save_folder: {tmp_path} can't be written to"):
        write_report(tmp_path)


def test_the_scores_of_tasks_have_a_plot_and_a_table(tmp_path: Path) -> None:
    record(tmp_path, batches=4)
    accuracy = "InContextLearningMultipleChoiceAccuracy"
    rows = []
    for batch in (2, 4):
        results = {"copa/0-shot": {accuracy: batch / 8, "stderr": 0.05}}
        results["copa/0-shot/a category"] = {accuracy: 1.0, "stderr": 0.1}
        if batch == 4:
            results["eval_gauntlet"] = {"core": 0.25}
        rows.append({"batch": batch, "tokens": 1000 * batch, "eval": results})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert list(task_scores(rows)) == ["copa/0-shot", "eval_gauntlet: core"]
    page = write_report(tmp_path).read_text().splitlines()
    assert "| copa/0-shot | 0.2500 ± 0.0500 | 0.5000 ± 0.0500 |" in page
    assert "| eval_gauntlet: core |  | 0.2500 |" in page
    assert "## Evaluation: held_out" in page and "## Evaluation: copa/0-shot" not in page
