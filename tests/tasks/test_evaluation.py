"""`eval MODEL icl_tasks=FILE` on a small run, to its end, killed, and on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.cli import main
from mptfoundry.config.load import parse_words
from mptfoundry.config.tasks import TaskFileConfig
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.evaluate import evaluate, results_table
from mptfoundry.export.adapter import export_adapter
from mptfoundry.export.folder import export
from mptfoundry.mpt.network import MPT
from mptfoundry.tasks.gauntlet import gauntlet_scores, refuse_missing
from tests.conftest import TINY
from tests.export.test_adapter import adapted
from tests.ranks import run_on_ranks

TASKS = """
icl_tasks:
- label: sums
  dataset_uri: {folder}/sums.jsonl
  num_fewshot: [0, 2]
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
eval_gauntlet:
  categories:
  - name: counting
    benchmarks: [{{name: sums, num_fewshot: 2, random_baseline: 0.5}}, {{name: ends, num_fewshot: 1}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    def write(name: str, lines: list[dict[str, Any]]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(
        "sums",
        [
            {"query": f"{n} and 1 is", "choices": ["a", "bc", "d e"][: 2 + n % 2], "gold": n % 2}
            for n in range(9)
        ],
    )
    write(
        "ends", [{"context": f"item {n} is", "continuation": "x", "category": "ab"[n % 2]} for n in range(8)]
    )
    write("answers", [{"context": f"say {n}", "answer": "e", "aliases": ["t", " "]} for n in range(5)])
    (tmp_path / "tasks.yaml").write_text(TASKS.format(folder=tmp_path))
    return tmp_path / "tasks.yaml"


def run(model: Path, tasks: Path, out: Path, *words: str) -> dict[str, dict[str, float]]:
    options = [f"model={model}", f"icl_tasks={tasks}", f"out={out}", "max_seq_len=64", *words]
    return evaluate(parse_words(options, EvalConfig))


def without_seconds(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        label: {name: value for name, value in metrics.items() if name != "seconds"}
        for label, metrics in results.items()
    }


def test_every_task_is_in_the_table_and_every_answer_in_the_file(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    results = run(write_run(), tasks, tmp_path / "out")
    assert list(results) == [
        "sums/0-shot", "sums/2-shot", "ends/1-shot", "ends/1-shot/a", "ends/1-shot/b", "answers/0-shot",
        "eval_gauntlet",
    ]  # fmt: skip
    assert [results[label]["documents"] for label in list(results)[:-1]] == [9, 9, 8, 4, 4, 5]
    accuracy = results["sums/2-shot"]["InContextLearningMultipleChoiceAccuracy"]
    exact = results["ends/1-shot"]["InContextLearningLMAccuracy"]
    assert results["eval_gauntlet"]["counting"] == pytest.approx(((accuracy - 0.5) / 0.5 + exact) / 2)
    table = results_table(results)
    assert "sums/2-shot" in table and "stderr" in table and "default_average" in table
    stored = json.loads((tmp_path / "out/eval.json").read_text())
    assert stored["results"] == results and stored["settings"]["limit"] == -1
    lines = [json.loads(line) for line in (tmp_path / "out/eval.samples.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 9 + 9 + 8 + 5
    sums = [line for line in lines if line["task"] == "sums" and line["shots"] == 2]
    assert sum(line["correct"] for line in sums) / 9 == pytest.approx(accuracy)
    assert all(len(line["loglikelihoods"]) == len(line["choices"]) == len(line["tokens"]) for line in sums)


def test_a_torn_evaluation_continues_to_the_same_numbers(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_run(), tmp_path / "out"
    whole = run(model, tasks, out, "device_eval_batch_size=1")
    file = out / "eval.samples.jsonl"
    content = file.read_bytes()
    for kept in (len(content) // 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:kept])
        again = run(model, tasks, out, "device_eval_batch_size=1")
        assert without_seconds(again) == without_seconds(whole)
        assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())
    assert "of 9 documents were evaluated before" in capsys.readouterr().out
    run(model, tasks, out, "limit=3")
    assert len(file.read_text().splitlines()) == 1 + 4 * 3  # other settings begin again


def test_two_ranks_give_the_numbers_of_one(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    model = write_run()
    alone = run(model, tasks, tmp_path / "one")
    done = run_on_ranks(
        "scripts/eval.py", model, f"icl_tasks={tasks}", f"out={tmp_path}/two", "max_seq_len=64"
    )
    assert done.returncode == 0, done.stdout
    together = json.loads((tmp_path / "two/eval.json").read_text())["results"]
    assert without_seconds(together) == without_seconds(alone)


def test_results_lie_with_the_model_in_a_folder_named_by_the_settings(
    write_run: Callable[..., Path], tasks: Path
) -> None:
    model = write_run()
    options = [f"model={model}", f"icl_tasks={tasks}", "max_seq_len=64"]
    evaluate(parse_words(options, EvalConfig))
    evaluate(parse_words([*options, "limit=2"], EvalConfig))
    assert len(list(model.rglob("eval.samples.jsonl"))) == 2


def test_results_inside_an_exported_folder_do_not_make_it_another_model(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    export(write_run(), folder, dtype="fp32", progress=False)
    options = [f"model={folder}", f"icl_tasks={tasks}", "max_seq_len=64"]
    first = evaluate(parse_words(options, EvalConfig))
    again = evaluate(parse_words(options, EvalConfig))
    assert without_seconds(again) == without_seconds(first)
    assert "sums/0-shot: 9 of 9 documents were evaluated before" in capsys.readouterr().out
    assert len(list(folder.rglob("eval.samples.jsonl"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["num_fewshot=1"], "sums/2-shot"),
        (["icl_tasks=[]"], "names no task"),
        (["icl_tasks=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_can_not_be_evaluated_is_said_before_the_model_computes(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(write_run(), tasks, tmp_path / "out", *words)
    assert said in str(error.value)


LLMFOUNDRY = """
variables: {{length: 64}}
max_seq_len: ${{variables.length}}
seed: 1
precision: fp32
models:
- model_name: first
  model: {{name: mpt_causal_lm, d_model: 32, attn_config: {{attn_impl: flash}}}}
  tokenizer: {{name: {model}/tokenizer, kwargs: {{model_max_length: 64}}}}
  load_path: {model}
- model_name: second
  model: {{name: hf_causal_lm, pretrained_model_name_or_path: {model}, pretrained: true}}
device_eval_batch_size: 2
fsdp_config: {{sharding_strategy: FULL_SHARD}}
icl_subset_num_batches: 2
icl_tasks: {tasks}
"""


@pytest.fixture
def evaluation(write_run: Callable[..., Path], tasks: Path, tmp_path: Path) -> Path:
    file = tmp_path / "evaluation.yaml"
    file.write_text(LLMFOUNDRY.format(model=write_run(), tasks=tasks))
    return file


def test_an_evaluation_file_evaluates_each_of_its_models(
    evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(evaluation)]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("3 tasks with their numbers of examples: sums [0, 2], ends [1], answers [0]") == 2
    assert "fsdp_config is left out" in shown.err and "is now limit: 4 documents" in shown.err
    assert main(["check", str(evaluation), "tasks=one,two"]) == 0
    assert capsys.readouterr().out.count("; one, two of lm-eval\n") == 2
    assert main(["eval", str(evaluation)]) == 0
    printed = capsys.readouterr().out
    assert "first\nlabel" in printed and "second\nlabel" in printed
    assert "sums/2-shot: 4 of 4 documents were evaluated before" in printed  # it is the same model


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: hf_causal_lm", "name: openai_chat", "models[1].model.name: openai_chat is not an MPT model."),
        ("precision: fp32", "precison: fp32", "precison"),
        ("precision: fp32", "allow_code: true", "allow_code: is only taken from the command line."),
        ("num_batches: 2", "num_batches: 0", "0 documents leave nothing to do."),
        ("tasks.yaml", "nowhere.yaml", "nowhere.yaml: there is no such file"),
    ],
)
def test_mistakes_in_an_evaluation_file_are_one_error_each(
    evaluation: Path, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation.write_text(evaluation.read_text().replace(old, new))
    for verb in ("check", "eval"):
        assert main([verb, str(evaluation)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1 and said in errors[0]


def test_a_blank_load_path_is_said_once_and_refused_by_eval_alone(
    evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in llm-foundry's mpt_eval.yaml, whose reader fills it in."""
    evaluation.write_text(evaluation.read_text().replace("  load_path: ", "  load_path:  # "))
    said = "models[0].load_path: is blank. Name a run,"
    assert main(["check", str(evaluation)]) == 0
    here = [line for line in capsys.readouterr().out.splitlines() if line.startswith("here:")]
    assert len(here) == 1 and said.removesuffix(",") in here[0]
    assert main(["eval", str(evaluation)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and said in errors[0]


def test_a_file_of_tasks_can_be_checked(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tasks)]) == 0
    assert capsys.readouterr().out.startswith("3 tasks")
    tasks.write_text(
        tasks.read_text().replace("icl_task_type: language_modeling", "icl_task_type: modelling")
    )
    assert main(["check", str(tasks)]) == 2
    assert "tasks.yaml:10" in capsys.readouterr().err


def test_an_adapter_continues_its_answers_while_its_base_is_the_same(
    write_run: Callable[..., Path],
    tasks: Path,
    tmp_path: Path,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = write_run(name="base"), tmp_path / "out"
    export_adapter(
        adapted(open_model(base)), tmp_path / "adapter", torch.float32, tiny_tokenizer, overwrite=True
    )
    words = (f"base={base}", "device_eval_batch_size=1")
    whole = run(tmp_path / "adapter", tasks, out, *words)
    file = out / "eval.samples.jsonl"
    file.write_bytes(file.read_bytes()[:-200])
    assert without_seconds(run(tmp_path / "adapter", tasks, out, *words)) == without_seconds(whole)
    assert "of 9 documents were evaluated before" in capsys.readouterr().out
    write_run(network=MPT(TINY, seed=2), name="base")
    run(tmp_path / "adapter", tasks, out, *words)
    assert "evaluated before" not in capsys.readouterr().out


def test_loggers_get_the_scores_by_their_names_in_llm_foundry(
    write_run: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    run(write_run(), tasks, tmp_path / "out", f"loggers.file_logger.filename={log}")
    written = log.read_text()
    assert "metrics/sums/2-shot/InContextLearningMultipleChoiceAccuracy" in written
    assert "icl/metrics/eval_gauntlet/counting" in written
    assert json.loads((tmp_path / "out/eval.json").read_text())["options"]["loggers"] == ["file_logger"]


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder that the `datasets` library reads, with columns of its own."""
    import datasets

    rows = [
        {"premise": f"{n} and 1", "verb": "is", "number": n, "options": ["a", "bc"], "label": n % 2}
        for n in range(6)
    ]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/test.parquet")
    return tmp_path / "set"


def of_data_set(folder: Path, **options: Any) -> str:
    task = {
        "label": "sums",
        "dataset_uri": f"hf://{folder}",
        "num_fewshot": [1],
        "icl_task_type": "multiple_choice",
        "hf_loading_vars": {"split": "test"},
        "hf_parsing_map": {"query": ["premise", "verb"], "choices": ["options"], "gold": ["label"]},
    }
    return f"icl_tasks={json.dumps([{**task, **options}])}"


def test_a_data_set_is_read_by_the_columns_that_the_task_names(
    write_run: Callable[..., Path], data_set: Path, tmp_path: Path
) -> None:
    model = write_run()
    lines = [{"query": f"{n} and 1 is", "choices": ["a", "bc"], "gold": n % 2} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = of_data_set(data_set, dataset_uri=f"{tmp_path}/sums.jsonl", hf_loading_vars={}, hf_parsing_map={})
    options = [f"model={model}", "max_seq_len=64"]
    by_file = evaluate(parse_words([*options, file, f"out={tmp_path}/file"], EvalConfig))
    by_hub = evaluate(parse_words([*options, of_data_set(data_set), f"out={tmp_path}/hub"], EvalConfig))
    assert without_seconds(by_hub) == without_seconds(by_file)
    written = [
        (tmp_path / name / "eval.samples.jsonl").read_text().splitlines()[1:] for name in ("file", "hub")
    ]
    assert written[0] == written[1] and len(written[0]) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hf_loading_vars": {}}, r"has the splits test. Say which one .* hf_loading_vars: \{split: NAME\}"),
        ({"hf_loading_vars": {"split": "train"}}, r"can't be read \(.*train.* It is the data of sums"),
        ({"hf_parsing_map": {"query": ["question"]}}, r"no column question, .* It has premise, verb, number"),
        ({"hf_parsing_map": {"query": ["premise"]}}, r":1: choices: is missing"),
        ({"dataset_uri": "hf:///nowhere/at/all"}, r"hf:///nowhere/at/all: can't be read"),
    ],
)
def test_what_a_data_set_lacks_is_said(
    write_run: Callable[..., Path], data_set: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    words = [f"model={write_run()}", of_data_set(data_set, **options), f"out={tmp_path}/out"]
    with pytest.raises(DataError, match=said):
        evaluate(parse_words(words, EvalConfig))


def test_the_core_gauntlet_can_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """DCLM's CORE, with the number of its tasks and every benchmark among them."""
    file = Path(__file__).parents[2] / "configs/tasks/core.yaml"
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.startswith("22 tasks")
    tasks = parse_words([], TaskFileConfig, file)
    assert tasks.eval_gauntlet is not None
    labels = [f"{task.label}/{shots}-shot" for task in tasks.icl_tasks for shots in task.shots]
    refuse_missing(tasks.eval_gauntlet, labels)
    scores = dict.fromkeys(labels, 1.0)
    assert gauntlet_scores(tasks.eval_gauntlet, scores, dict.fromkeys(labels, 1))["CORE"] == 1
