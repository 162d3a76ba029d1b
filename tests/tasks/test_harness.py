"""Public tasks through lm-evaluation-harness: the numbers of its `hf` model, on any ranks, and continued."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mptfoundry.cli import main
from mptfoundry.config.load import parse_words
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.evaluate import evaluate, results_table
from mptfoundry.export.folder import export
from tests.ranks import run_on_ranks

lm_eval = pytest.importorskip("lm_eval")

DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl, train: {folder}/examples.jsonl}}}}
test_split: test
training_split: train
fewshot_split: train
"""
TASKS = {
    "ends": """
task: ends
tag: small
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "letters": """
task: letters
tag: small
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: ["A", "B"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "blanks": """
task: blanks
output_type: multiple_choice
doc_to_text: gold
doc_to_target: "is the end"
doc_to_choice: "{{[question + choices[0], question + choices[1]]}}"
num_fewshot: 0
""",
    "words": """
task: words
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: perplexity}]
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}} {{choices[0]}} {{question}}"
""",
    "answers": """
task: answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
GROUP = """
group: both
task: [ends, letters]
aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: acc_norm}]
"""
ALL = "both,blanks,words,texts,answers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far", "away", "from", "it"]

    def documents(count: int) -> str:
        return "".join(
            json.dumps(
                {
                    "question": " ".join(draw.choices(words, k=draw.randint(2, 9))),
                    "choices": [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(2)],
                    "gold": draw.randrange(2),
                }
            )
            + "\n"
            for _ in range(count)
        )

    home = tmp_path / "tasks"
    home.mkdir()
    (home / "documents.jsonl").write_text(documents(11))
    (home / "examples.jsonl").write_text(documents(6))
    for name, text in TASKS.items():
        (home / f"{name}.yaml").write_text(text + DATA.format(folder=home))
    (home / "both.yaml").write_text(GROUP)
    return home


@pytest.fixture
def exported(write_run: Callable[..., Path], tmp_path: Path) -> Path:
    export(write_run(), tmp_path / "hf", dtype="fp32", progress=False)
    return tmp_path / "hf"


def run(model: Path, folder: Path, out: Path, *words: str) -> dict[str, dict[str, float]]:
    options = [f"model={model}", f"include_path={folder}", f"out={out}", *words]
    return evaluate(parse_words(options, EvalConfig))


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "eval.samples.jsonl").read_text().splitlines()[1:]]


def by_harness(model: Path, folder: Path, names: str, shots: int, **options: Any) -> dict[str, Any]:
    """What lm-eval's own model gives for an exported folder."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    network = HFLM(pretrained=str(model), batch_size=3, device="cpu", dtype="float32", max_length=64)
    manager = TaskManager(include_path=folder, include_defaults=False)
    # Its bootstrap would fork this process, whose threads may hold locks; the errors of means need none.
    with patch("lm_eval.api.metrics.bootstrap_stderr", return_value=0.0):
        return simple_evaluate(
            network,
            tasks=names.split(","),
            num_fewshot=shots,
            task_manager=manager,
            bootstrap_iters=10,
            **options,
        )


@pytest.mark.parametrize("shots", [0, 2])
def test_answers_and_scores_are_those_of_the_harness_own_model(
    exported: Path, folder: Path, tmp_path: Path, shots: int
) -> None:
    ours = run(exported, folder, tmp_path / "out", f"tasks={ALL}", f"num_fewshot={shots}")
    theirs = by_harness(exported, folder, ALL, shots)
    lines = {(line["task"], line["doc_id"]): line for line in lines_of(tmp_path / "out")}
    for name, samples in theirs["samples"].items():
        assert len(samples) == 11
        for sample in samples:
            line = lines[name, sample["doc_id"]]
            if name == "answers":
                assert line["chosen"] == sample["resps"][0][0]
                continue
            answers = [resps[0] for resps in sample["resps"]]
            totals = answers if name == "texts" else [total for total, _ in answers]
            assert line["loglikelihoods"] == pytest.approx(totals, abs=1e-4)
            if name != "texts":
                assert line["greedy"] == [is_greedy for _, is_greedy in answers]
    for name, metrics in theirs["results"].items():
        label = name if name == "both" else f"{name}/{0 if name == 'blanks' else shots}-shot"
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not (metric.endswith("_stderr") and metric.startswith("perplexity")):
                expected = float("nan") if value == "N/A" else value
                assert ours[label][metric] == pytest.approx(expected, abs=1e-4, rel=1e-5, nan_ok=True), key
    shown = results_table(ours)
    assert "gold_bits_per_byte" in shown and "acc_norm_stderr" in shown and "both" in shown


def test_the_bits_of_the_right_choice_are_per_byte_of_its_text(
    exported: Path, folder: Path, tmp_path: Path
) -> None:
    results = run(exported, folder, tmp_path / "out", "tasks=ends")
    lines = lines_of(tmp_path / "out")
    bits = [
        -line["loglikelihoods"][line["gold"]]
        / np.log(2)
        / len(line["choices"][line["gold"]].removeprefix(" "))
        for line in lines
    ]
    assert results["ends/0-shot"]["gold_bits_per_byte"] == pytest.approx(np.mean(bits))
    assert results["ends/0-shot"]["acc"] == pytest.approx(np.mean([line["correct"] for line in lines]))
    assert json.loads((tmp_path / "out/eval.json").read_text())["settings"]["public"]["lm_eval"]


def test_it_leaves_the_random_states_as_they_were(exported: Path, folder: Path, tmp_path: Path) -> None:
    def states() -> list[Any]:
        kind, keys, *rest = np.random.get_state()
        return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]

    from mptfoundry.checkpoints.reading import load_network, open_model, tokenizer_of
    from mptfoundry.tasks.evaluation import Model, evaluate_tasks, plan_tasks

    words = [f"model={exported}", f"include_path={folder}", f"out={tmp_path}/out", f"tasks={ALL}"]
    options, source = parse_words(words, EvalConfig), open_model(exported)
    tokenizer = tokenizer_of(source)
    network, _ = load_network(exported)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = states()
    plan = plan_tasks(options, source, tokenizer, max_seq_len=64, device="cpu", precision="fp32")
    assert states() == before
    evaluate_tasks(Model(network, tokenizer), plan, batch_size=2)
    assert states() == before


def test_a_torn_evaluation_continues_to_the_same_numbers(
    exported: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"tasks={ALL}", "num_fewshot=1", "device_eval_batch_size=1")
    whole = run(exported, folder, tmp_path / "out", *words)
    file = tmp_path / "out/eval.samples.jsonl"
    content = file.read_bytes()
    for kept in (len(content) // 3, len(content) - 1, len(content)):
        file.write_bytes(content[:kept])
        again = run(exported, folder, tmp_path / "out", *words)
        assert without_seconds(again) == without_seconds(whole)
        assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())
    assert "answers/1-shot: 11 of 11 documents were evaluated before" in capsys.readouterr().out
    run(exported, folder, tmp_path / "out", *words, "limit=2")
    assert len(lines_of(tmp_path / "out")) == 6 * 2  # other settings begin again


def test_a_damaged_line_is_named(exported: Path, folder: Path, tmp_path: Path) -> None:
    run(exported, folder, tmp_path / "out", "tasks=ends")
    file = tmp_path / "out/eval.samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[3][:20] + b"\n", *lines[4:]]))
    with pytest.raises(DataError, match=r"eval\.samples\.jsonl:4: is damaged.*Remove the line"):
        run(exported, folder, tmp_path / "out", "tasks=ends")


@pytest.mark.soak
def test_two_ranks_with_shards_of_the_model_give_the_numbers_of_one(
    write_run: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    model = write_run()
    with (model / "config.yaml").open("a") as config:
        config.write("fsdp_config: {sharding_strategy: FULL_SHARD}\n")
    words = [f"include_path={folder}", f"tasks={ALL}", "num_fewshot=1", "device_eval_batch_size=1"]
    alone = evaluate(parse_words([f"model={model}", f"out={tmp_path}/one", *words], EvalConfig))
    done = run_on_ranks("scripts/eval.py", model, f"out={tmp_path}/two", *words)
    assert done.returncode == 0, done.stdout
    together = json.loads((tmp_path / "two/eval.json").read_text())["results"]
    assert json.dumps(without_seconds(together)) == json.dumps(without_seconds(alone))
    assert sorted(map(str, lines_of(tmp_path / "two"))) == sorted(map(str, lines_of(tmp_path / "one")))


def test_a_chat_model_gets_its_questions_as_turns(exported: Path, folder: Path, tmp_path: Path) -> None:
    file = exported / "tokenizer_config.json"
    template = "{% for m in messages %}<{{m.role[0]}}>{{m.content}}{% endfor %}"
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    words = ["tasks=ends", "num_fewshot=1", "apply_chat_template=true"]
    chats = {}
    for is_multiturn in (True, False):
        out = tmp_path / str(is_multiturn)
        run(exported, folder, out, *words, f"fewshot_as_multiturn={str(is_multiturn).lower()}")
        theirs = by_harness(
            exported, folder, "ends", 1, apply_chat_template=True, fewshot_as_multiturn=is_multiturn
        )
        lines = {line["doc_id"]: line["loglikelihoods"] for line in lines_of(out)}
        for sample in theirs["samples"]["ends"]:
            expected = [resps[0][0] for resps in sample["resps"]]
            assert lines[sample["doc_id"]] == pytest.approx(expected, abs=1e-4)
        chats[is_multiturn] = lines
    assert chats[True] != chats[False]
    run(exported, folder, tmp_path / "default", *words)
    assert {line["doc_id"]: line["loglikelihoods"] for line in lines_of(tmp_path / "default")} == chats[True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=lettres"], r"tasks: lettres is not a task of lm-eval .* Near it are letters"),
        (["tasks=nothing_like_it_at_all_xyz"], "is not a task of lm-eval"),
        (["tasks=there.yaml"], "there.yaml: there is no such file"),
        (["tasks=ends", "apply_chat_template=true"], "the tokenizer has no chat template"),
        (["tasks=broken"], r"tasks: broken: .*broken\.yaml can't be read"),
        (["tasks=coded"], r"coded\.yaml:3 runs Python code. Read it, and add allow_code=true"),
        (["tasks=hidden_coded"], r"hidden:1 runs Python code"),
        (["tasks=[ends,ends]", "include_path=/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_what_can_not_be_evaluated_is_said(
    exported: Path, folder: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    (folder / "broken.yaml").write_text("task: broken\noutput_type: [\n")
    if "tasks=coded" in words[0]:
        (folder / "coded.yaml").write_text("task: coded\nx: 1\ndoc_to_text: !function code.text\n")
    if "hidden" in words[0]:
        (folder / "coded.yaml").write_text("task: hidden_coded\ninclude: hidden\n")
        (folder / "hidden").write_text("{doc_to_text: !function code.text}\n")
    with pytest.raises(ConfigError, match=said):
        run(exported, folder, tmp_path / "out", *words)


def test_public_tasks_are_found_without_the_harness_index_and_their_data_is_named(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.tasks.harness import files_of_public_names, folders_of

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert len(files_of_public_names()) > 10_000
    names = {path.name for path in folders_of(["hellaswag", "ai2_arc", "mmlu"])}
    assert names == {"hellaswag", "arc", "default"}
    for name, data in (
        ("hellaswag", "Rowan/hellaswag"),
        ("mmlu", "cais/mmlu abstract_algebra"),
        ("ai2_arc", "allenai/ai2_arc ARC-Challenge"),
    ):
        with pytest.raises(DataError, match=rf"its data set {data}.* can't be read") as error:
            evaluate(parse_words([f"model={exported}", f"tasks={name}"], EvalConfig))
        assert "Without a network" in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_another_architecture_is_for_lm_eval_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["eval", str(tmp_path), "tasks=hellaswag"]) == 1
    shown = capsys.readouterr().err
    assert "model_type is 'gpt2'" in shown and "lm_eval --model hf --model_args pretrained=" in shown


def test_without_the_package_the_command_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["eval", "nowhere", "tasks=hellaswag"]) == 2
    assert "tasks: needs the package lm-eval: pip install 'lm-eval>=0.4.13,<0.5'" in capsys.readouterr().err


def without_seconds(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        label: {name: value for name, value in metrics.items() if name != "seconds" and value == value}
        for label, metrics in results.items()
    }
