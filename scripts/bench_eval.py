"""Compare multiple choice by ours and by lm-evaluation-harness' `hf` model on transformers' native MPT.

    python scripts/bench_eval.py [d_model=384] [layers=6] [heads=8] [vocab=8192] [documents=16] [shots=5]
        [choices=4] [words=40] [seq=1024] [batches=1,8,32,auto] [ours=8] [repeats=3] [out=FILE.json]

A made-up task has `shots` examples before each question; both get the same requests in the harness' own way,
and read the same exported folder with random weights, in float32. Contestants alternate in each repeat, each
from its requests to its log-likelihoods, the tokenizer included. Answers must be equal to the document.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import MptConfig, MptForCausalLM

from mptfoundry.checkpoints.reading import load_network
from mptfoundry.plan.devices import detect_device
from mptfoundry.tasks.harness_model import HarnessModel
from mptfoundry.tasks.scoring import Model
from mptfoundry.tokenizer import train_bpe

NUMBERS = {
    "d_model": 384,
    "layers": 6,
    "heads": 8,
    "vocab": 8192,
    "documents": 16,
    "shots": 5,
    "choices": 4,
    "words": 40,
    "seq": 1024,
    "ours": 8,
    "repeats": 3,
}
Answers = dict[tuple[int, int], float]
Contestant = Callable[[], Answers]


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    number = {key: int(options.get(key, default)) for key, default in NUMBERS.items()}
    batches = options.get("batches", "1,8,32,auto").split(",")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    device = detect_device(world_size=1).name
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {load}")
    with tempfile.TemporaryDirectory() as folder:
        contestants = make_contestants(Path(folder), number, batches)
        seconds, answers = measure(contestants, number["repeats"])
    ours = statistics.median(seconds["mptfoundry"])
    print(f"{'':<16} {'seconds':>8} {'ratio':>6} {'equal choices':>14} {'largest difference':>19}")
    rows = []
    for name, turns in seconds.items():
        equal, difference = compare(answers["mptfoundry"], answers[name])
        pairs = zip(turns, seconds["mptfoundry"], strict=True)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        rows.append({"contestant": name, "seconds": turns, "ratio": ratio, "difference": difference})
        share = f"{equal} of {number['documents']}"
        print(f"{name:<16} {statistics.median(turns):>8.2f} {ratio:>6.2f} {share:>14} {difference:>19.1e}")
    best = min(statistics.median(turns) for name, turns in seconds.items() if name != "mptfoundry")
    print(f"against its best: {best / ours:.2f} times as fast")
    if "out" in options:
        Path(options["out"]).write_text(json.dumps({"number": number, "rows": rows}, indent=2) + "\n")
    return 0


def make_contestants(folder: Path, number: dict[str, int], batches: list[str]) -> dict[str, Contestant]:
    """Functions that score all requests of the task, by name."""
    documents = make_documents(number)
    exported = make_model(folder, [json.dumps(each) for each in documents], number)
    task = make_task(folder, documents, number)
    network, tokenizer = load_network(exported, dtype=torch.float32)
    ours = HarnessModel(
        Model(network.eval(), tokenizer),
        {task.config.task: task},
        None,
        tokens=number["ours"] * number["seq"],
        max_seq_len=number["seq"],
        seed=0,
    )
    contestants = {"mptfoundry": answering(ours, task)}
    native: Any = HFLM(pretrained=str(exported), device="cpu", dtype="float32", max_length=number["seq"])
    print(f"{type(native.model).__module__}.{type(native.model).__name__}, {len(task.instances)} requests")
    for batch in batches:
        other = HFLM(
            pretrained=native.model,
            tokenizer=native.tokenizer,
            batch_size=batch if batch == "auto" else int(batch),
            max_batch_size=min(64, len(task.instances)),
            max_length=number["seq"],
        )
        contestants[f"hf, batch {batch}"] = answering(other, task)
    return contestants


def answering(network: Any, task: Any) -> Contestant:
    """A function that scores the requests of a task with a model of the harness."""

    def answer() -> Answers:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            scores = network.loglikelihood(task.instances)
        requests = zip(task.instances, scores, strict=True)
        return {(request.doc_id, request.idx): total for request, (total, _) in requests}

    return answer


def make_model(folder: Path, texts: list[str], number: dict[str, int]) -> Path:
    """transformers' native MPT with random weights, and a tokenizer of the task's texts."""
    config = MptConfig(
        d_model=number["d_model"],
        n_heads=number["heads"],
        n_layers=number["layers"],
        max_seq_len=number["seq"],
        vocab_size=number["vocab"],
    )
    torch.manual_seed(0)
    MptForCausalLM(config).save_pretrained(folder / "model")
    train_bpe(texts, number["vocab"], folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    return folder / "model"


def make_documents(number: dict[str, int]) -> list[dict[str, Any]]:
    """Questions of made-up words, with choices of one to five words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(5000)]
    return [
        {
            "question": " ".join(
                draw.choices(words, k=draw.randint(number["words"] // 2, number["words"] * 3 // 2))
            ),
            "choices": [
                " ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(number["choices"])
            ],
            "gold": draw.randrange(number["choices"]),
        }
        for _ in range(number["documents"] + 50)
    ]


def make_task(folder: Path, documents: list[dict[str, Any]], number: dict[str, int]) -> Any:
    """The task with its requests, as the harness writes them."""
    for name, part in (
        ("test", documents[: number["documents"]]),
        ("train", documents[number["documents"] :]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
    definition = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in ("test", "train")}},
        "test_split": "test",
        "training_split": "train",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "num_fewshot": number["shots"],
    }
    task = TaskManager(include_defaults=False).load([definition])["tasks"]["words"]
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return task


def measure(
    contestants: dict[str, Contestant], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Seconds of each contestant in each repeat, and its answers."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Answers] = {}
    for _ in range(repeats):
        for name, answer in contestants.items():
            began_at = time.perf_counter()
            answers[name] = answer()
            seconds[name].append(time.perf_counter() - began_at)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds, answers


def compare(ours: Answers, theirs: Answers) -> tuple[int, float]:
    """The documents with the same choice, and the largest difference of a log-likelihood, in nats."""

    def chosen(answers: Answers) -> dict[int, int]:
        best: dict[int, int] = {}
        for (doc_id, choice), total in sorted(answers.items()):
            if doc_id not in best or total > answers[doc_id, best[doc_id]]:
                best[doc_id] = choice
        return best

    own, other = chosen(ours), chosen(theirs)
    equal = sum(own[doc_id] == other[doc_id] for doc_id in own)
    return equal, max(abs(ours[each] - theirs[each]) for each in ours)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
