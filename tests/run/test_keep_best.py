"""Runs that keep their best checkpoint beyond the newest ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.checkpoints.checkpoint import find_checkpoint
from mptfoundry.config.load import load_train_config
from mptfoundry.config.rules import TOKEN_METRICS
from mptfoundry.errors import ConfigError, RunStopped
from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.run.atomic_checkpoints import KeepBest
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.ranks import run_on_ranks

LOSS = "metrics/held_out/LanguageCrossEntropy"
WORDS = [
    "log_to_console=false",
    "optimizer.lr=1e-2",
    "eval_interval=2ba",
    "save_interval=2ba",
    "max_duration=6ba",
    "save_num_checkpoints_to_keep=1",
]

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def words(shards: Path) -> list[str]:
    return [
        *WORDS,
        f"eval_loader={{name: text, label: held_out, dataset: {{local: {shards}/a, split: val}}}}",
    ]


@pytest.fixture(scope="module")
def run(tiny_runs: Path, words: list[str]) -> Run:
    def start(name: str, mode: str, *more: str) -> Path:
        best = f"keep_best={{metric: {LOSS}, mode: {mode}}}"
        train(load_train_config(tiny_runs, [f"run_name={name}", *words, best, *more])[0])
        return tiny_runs.parent / name

    return start


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    return run("whole", "max")


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("ep0-*"))


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "best.json").read_text()))


def values(folder: Path) -> dict[int, float]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval" in row]
    return {row["batch"]: row["eval"]["held_out"]["LanguageCrossEntropy"] for row in rows}


def test_the_best_checkpoint_stays_next_to_the_newest(whole: Path) -> None:
    best = max(values(whole), key=values(whole).__getitem__)
    assert best == 2, "the loss falls"
    assert kept(whole) == ["ep0-ba2-rank0.pt", "ep0-ba6-rank0.pt"]
    expected = {"checkpoint": "ep0-ba2-rank0.pt", "batch": 2, "metric": LOSS, "mode": "max"}
    assert record(whole) == {**expected, "value": pytest.approx(values(whole)[2])}
    assert find_checkpoint(whole / "best-rank0.pt").path == whole / "ep0-ba2-rank0.pt"
    assert find_checkpoint(whole).batch == 6
    assert (
        f"| best checkpoint | ep0-ba2-rank0.pt: {LOSS} {values(whole)[2]:.6g} |"
        in (whole / "report.md").read_text()
    )


def test_a_better_one_replaces_it_also_in_the_last_evaluation(run: Run) -> None:
    folder = run("least", "min", "eval_interval=4ba")
    assert list(values(folder)) == [4, 6]
    assert record(folder)["batch"] == 6 and kept(folder) == ["ep0-ba6-rank0.pt"]


def test_a_resumed_run_keeps_the_best_one_of_all_its_starts(run: Run, whole: Path) -> None:
    run("resumed", "max", "max_duration=4ba", "scheduler.t_max=6ba")
    folder = run("resumed", "max", "scheduler.t_max=6ba")
    assert kept(folder) == kept(whole) and record(folder)["batch"] == 2


@pytest.mark.parametrize(
    "content", ["", '{"metric": 1}', '{"batch": 9, "checkpoint": "ep0-ba9-rank0.pt"}', "[]"]
)
def test_a_record_that_is_damaged_or_of_another_run_counts_for_nothing(
    run: Run, whole: Path, content: str
) -> None:
    folder = whole.parent / f"damaged{len(content)}"
    shutil.copytree(whole, folder, symlinks=True)
    (folder / "best.json").write_text(content)
    run(folder.name, "max", "max_duration=8ba")
    assert record(folder)["batch"] == 8


def test_an_evaluation_that_was_left_judges_its_checkpoint_when_it_is_repeated(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.run.step_guard import EvaluationLeft, StepGuard

    eval_batch_end = StepGuard.eval_batch_end

    def leave(guard: StepGuard, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 2:
            guard._stop(state)
            guard.owes_evaluation = True
            raise EvaluationLeft
        eval_batch_end(guard, state, logger)

    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(StepGuard, "eval_batch_end", leave)
        run("left", "max")
    folder = run("left", "max")
    assert record(folder)["batch"] == 2 and kept(folder) == ["ep0-ba2-rank0.pt", "ep0-ba6-rank0.pt"]


def test_sharded_checkpoints_are_kept_too(tiny_runs: Path, words: list[str]) -> None:
    given = [*words, "run_name=sharded", "fsdp_config={state_dict_type: sharded}", "max_duration=4ba"]
    done = run_on_ranks("scripts/train.py", tiny_runs, *given, f"keep_best={{metric: {LOSS}, mode: max}}")
    folder = tiny_runs.parent / "sharded"
    assert done.returncode == 0, done.stdout
    assert kept(folder) == ["ep0-ba2", "ep0-ba4"] and record(folder)["checkpoint"] == "ep0-ba2"
    assert find_checkpoint(folder / "best-sharded-rank0").batch == 2


def test_a_misspelt_metric_is_an_error_before_training(run: Run, tiny_runs: Path) -> None:
    with pytest.raises(ConfigError) as error:
        run("misspelt", "max", "keep_best.metric=icl/metrics/eval_gauntlet/default_average")
    assert "is not measured by this run. Use one such as metrics/held_out/" in str(error.value)
    assert not (tiny_runs.parent / "misspelt").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["eval_loader=null"], "needs an evaluation. Set eval_loader or icl_tasks"),
        (["save_folder=null"], "needs save_folder"),
        (["save_interval=4ba", "eval_interval=3ba"], "meet only at the end of the run"),
        (["save_interval=1ep", "eval_interval=2ep", "max_duration=2ep"], "meet only at the end of the run"),
        (["keep_best.mode=most"], "'most' is not allowed"),
        (
            ["keep_best.metric=metrics/held_out/LanguageCrosEntropy"],
            f"measured by this run. Use one such as {LOSS}",
        ),
        (["keep_best.metric=metrics/eval/tokens"], "Use one such as metrics/held_out/..."),
    ],
)
def test_what_can_have_no_best_checkpoint_is_refused(run: Run, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("refused", "max", *more)
    assert said in str(error.value)


def test_the_checker_knows_the_metrics_of_a_language_model() -> None:
    assert set(token_loss_metrics(np.ones(1))) == set(TOKEN_METRICS)


def test_equal_values_leave_the_older_one_and_nan_counts_for_nothing(tmp_path: Path) -> None:
    best = KeepBest(tmp_path, "x", "max", link="best-rank{rank}.pt", keep=1, upload=None)
    judged = []
    for batch, value in enumerate([float("nan"), 0.5, 0.5, 0.4, 0.6]):
        best.log_metrics({"x": value, "y": 1.0}, step=batch)
        judged.append(best.consider(tmp_path / f"ep0-ba{batch}-rank0.pt", batch))
    assert judged == [False, True, False, False, True]
    assert not best.consider(tmp_path / "ep0-ba9-rank0.pt", 9), "it was not evaluated"
    assert best.in_words() == "ep0-ba4-rank0.pt: x 0.6"
