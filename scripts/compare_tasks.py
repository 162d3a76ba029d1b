"""Compare in-context tasks with llm-foundry's own classes: token ids, decisions and calibration errors.

    python scripts/compare_tasks.py llmfoundry=CLONE tokenizer=FOLDER [documents=60] [scored=20]

CLONE is a clone of llm-foundry's repository: two of its files are run (the classes of the data sets and of
the metrics, with the rest of the package left out), on the data in its scripts/eval/local_data. The rows of
token ids of eight tasks have to be equal, with 0 to 3 examples, with and without a prompt, in two context
lengths. Of the six that are scored, a small random network has to decide each document alike, with 0 and 2
examples. The exit code is 3 if something differs.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from mptfoundry.config.tasks import TaskConfig
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.tasks.outcomes import judge_scores, task_metrics
from mptfoundry.tasks.questions import build_task, read_lines
from mptfoundry.tasks.scoring import plan_batches, score_batch
from mptfoundry.tokenizer import count_ids, load_tokenizer

CLASSES = {
    "multiple_choice": ("MultipleChoiceTaskDataset", "MultipleChoiceAccuracy", "MCExpectedCalibrationError"),
    "schema": ("SchemaTaskDataset", "MultipleChoiceAccuracy", "MCExpectedCalibrationError"),
    "language_modeling": ("LMTaskDataset", "LMAccuracy", "LMExpectedCalibrationError"),
    "generation_task_with_answers": ("GenerationTaskWithAnswersDataset", "", ""),
}
TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("commonsense_reasoning/copa", "multiple_choice", {}),
    ("commonsense_reasoning/openbook_qa", "multiple_choice", {"continuation_delimiter": "\nAnswer: "}),
    ("language_understanding/winograd_wsc", "schema", {}),
    ("language_understanding/lambada_openai_small", "language_modeling", {}),
    ("symbolic_problem_solving/bigbench_operators", "language_modeling", {"prelimiter": "Q: "}),
    ("symbolic_problem_solving/simple_arithmetic_nospaces", "language_modeling", {}),
    (
        "symbolic_problem_solving/svamp",
        "generation_task_with_answers",
        {"prelimiter": "Question: ", "continuation_delimiter": "\nA: ", "cot_delimiter": " The answer is "},
    ),
    ("world_knowledge/triviaqa_sm_sub", "generation_task_with_answers", {"continuation_delimiter": "\nA: "}),
]
PROMPTS, LENGTHS, SCORED_LENGTH = ("", "Answer the questions.\n"), (1024, 160), 700


def main(words: list[str]) -> int:
    options = {"llmfoundry": "", "tokenizer": "", "documents": "60", "scored": "20"}
    options |= dict(word.partition("=")[::2] for word in words)
    if not options["llmfoundry"] or not options["tokenizer"] or len(options) > 4:
        print("error: give llmfoundry=CLONE tokenizer=FOLDER, as --help says.", file=sys.stderr)
        return 2
    clone = Path(options["llmfoundry"])
    theirs = load_theirs(clone)
    tokenizer: Any = load_tokenizer(options["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows, differences = [], 0
    for name, kind, texts in TASKS:
        lines = (clone / "scripts/eval/local_data" / f"{name}.jsonl").read_text().splitlines()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "task.jsonl")
            file.write_text("\n".join(lines[: int(options["documents"])]) + "\n")
            count, unequal = compare_ids(theirs, file, kind, texts, tokenizer)
            decisions = ""
            if CLASSES[kind][1]:
                file.write_text("\n".join(lines[: int(options["scored"])]) + "\n")
                equal, scored = compare_decisions(theirs, file, kind, texts, tokenizer)
                decisions, unequal = f"{equal} of {scored}", unequal + scored - equal
        differences += unequal
        rows.append([name, f"{count}", f"{unequal}", decisions])
    print(tabulate(rows, headers=["task", "rows of ids", "differences", "equal decisions"]))
    return 3 if differences else 0


def load_theirs(clone: Path) -> types.SimpleNamespace:
    """Their classes of data sets and metrics, without importing the rest of their package."""
    for name in ("llmfoundry", "llmfoundry.eval", "llmfoundry.eval.datasets", "llmfoundry.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(clone / name.replace(".", "/"))]
        sys.modules[name] = module
    sys.modules["llmfoundry"].registry = None  # type: ignore[attr-defined]
    helpers = types.ModuleType("llmfoundry.utils.registry_utils")
    helpers.construct_from_registry = None  # type: ignore[attr-defined]
    sys.modules[helpers.__name__] = helpers
    data = importlib.import_module("llmfoundry.eval.datasets.in_context_learning_evaluation")
    sys.path.insert(0, str(clone / "llmfoundry/eval/metrics"))
    both = {**vars(data), **vars(importlib.import_module("nlp"))}
    return types.SimpleNamespace(
        **{name: each for name, each in both.items() if name.startswith("InContext")}
    )


def their_data(theirs: Any, file: Path, kind: str, texts: dict[str, Any], **options: Any) -> Any:
    tokenizer = options["tokenizer"]
    made = getattr(theirs, f"InContextLearning{CLASSES[kind][0]}")
    copy = str(file.with_name(f"{len(list(file.parent.iterdir()))}.jsonl"))
    return made(
        dataset_uri=str(file), destination_path=copy, pad_tok_id=tokenizer.pad_token_id, **options, **texts
    )


def our_task(file: Path, kind: Any, shots: int, texts: dict[str, Any], prompt: str = "") -> TaskConfig:
    return TaskConfig(
        label="task",
        dataset_uri=str(file),
        icl_task_type=kind,
        num_fewshot=shots,
        prompt_string=prompt,
        **texts,
    )


def compare_ids(theirs: Any, file: Path, kind: str, texts: dict[str, Any], tokenizer: Any) -> tuple[int, int]:
    """How many rows of ids were compared, and how many differ."""
    count = unequal = 0
    cases = [(shots, prompt, length) for shots in range(4) for prompt in PROMPTS for length in LENGTHS]
    for shots, prompt, length in cases:
        options = {"max_seq_len": length, "num_fewshot": shots, "prompt_string": prompt}
        data = their_data(theirs, file, kind, texts, tokenizer=tokenizer, **options)
        task = our_task(file, kind, shots, texts, prompt)
        ours = build_task(task, shots, read_lines(file, task), tokenizer, length)
        for number, question in enumerate(ours.questions):
            padded = data[number][data.context_key]
            padded = padded if kind in ("multiple_choice", "schema") else [padded]
            for row, expected in zip(question.rows, padded, strict=True):
                count += 1
                kept = [token for token in expected if token != tokenizer.pad_token_id]
                unequal += [token for token in row.ids if token != tokenizer.pad_token_id] != kept
    return count, unequal


def compare_decisions(
    theirs: Any, file: Path, kind: str, texts: dict[str, Any], tokenizer: Any
) -> tuple[int, int]:
    """How many documents a random network decides alike, with equal calibration errors, and of how many."""
    torch.manual_seed(0)
    attention = AttnConfig(alibi=True)
    size: dict[str, Any] = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 1024,
        "vocab_size": count_ids(tokenizer),
    }
    network = MPT(MPTConfig(**size, no_bias=True, attn_config=attention)).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    equal = count = 0
    for shots in (0, 2):
        options = {"max_seq_len": SCORED_LENGTH, "num_fewshot": shots, "prompt_string": ""}
        data = their_data(theirs, file, kind, texts, tokenizer=tokenizer, **options)
        accuracy, calibration = (getattr(theirs, f"InContextLearning{name}")() for name in CLASSES[kind][1:])
        decided = []
        for number in range(len(data)):
            batch = data.collate_fn([data[number]])
            width = int(batch["attention_mask"].sum(1).max())
            with torch.no_grad():
                logits = network(batch["input_ids"][:, :width]).logits
            labels = torch.roll(batch["labels"], -1, 1)[:, :width]
            decided += accuracy.update(batch, logits, labels)["result"]
            calibration.update(batch, logits, labels)
        task = our_task(file, kind, shots, texts)
        ours = build_task(task, shots, read_lines(file, task), tokenizer, SCORED_LENGTH)
        scores: dict[int, Any] = {}
        for some in plan_batches(ours.questions, 8192):
            scores |= score_batch(network, some)
        outcomes = [judge_scores(task, each, scores[each.doc_id]) for each in ours.questions]
        is_calibrated = (
            abs(task_metrics(task, outcomes)[task.metrics[1]] - float(calibration.compute())) < 1e-6
        )
        alike = [one.is_correct == bool(other) for one, other in zip(outcomes, decided, strict=True)]
        equal, count = equal + sum(alike) * is_calibrated, count + len(alike)
    return equal, count


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
