"""Networks with heads as Composer sees them: what they measure, and two ranks that do as one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.errors import ConfigError
from mptfoundry.models.heads import ComposerHead, best_spans, found_and_wanted
from mptfoundry.mpt.config import AttnConfig
from mptfoundry.mpt.head_config import (
    HeadConfig,
    SequenceClassifierConfig,
    SpanFinderConfig,
    TokenClassifierConfig,
)
from mptfoundry.mpt.heads import HeadOutput, make_network

SHAPE: dict[str, Any] = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "vocab_size": 384,
    "max_seq_len": 8,
    "attn_config": AttnConfig(alibi=True),
}


def measure(
    config: HeadConfig, batch: dict[str, Any], logits: torch.Tensor, tokenizer: Any
) -> dict[str, float]:
    """The metrics of some logits, which came in two batches."""
    model = ComposerHead(make_network(config, seed=0), tokenizer=tokenizer)
    assert model.get_metrics(is_train=True) == {}
    rows = len(logits)
    found = {}
    for name, metric in model.get_metrics(is_train=False).items():
        for part in (slice(0, 1), slice(1, rows)):
            some = {key: value[part] for key, value in batch.items()}
            terms = torch.tensor(len(logits[part]))
            model.update_metric(some, HeadOutput(terms * 2.0, terms, logits[part]), metric)
        found[name] = float(metric.compute())
    # Parts of 1 and of rows - 1 terms, with a loss of twice as many.
    assert found.pop("loss") == pytest.approx((2 + 2 * (rows - 1) ** 2) / rows)
    return found


def test_a_choice_is_measured_by_accuracy_and_f1(tiny_tokenizer: Any) -> None:
    logits = torch.eye(3)[[0, 0, 1, 2]]
    batch = {"labels": torch.tensor([0, 1, 1, 2])}
    found = measure(SequenceClassifierConfig(**SHAPE, num_labels=3), batch, logits, tiny_tokenizer)
    assert found == pytest.approx({"accuracy": 3 / 4, "f1": (2 / 3 + 2 / 3 + 1) / 3})


def test_tokens_that_are_not_learned_are_not_measured(tiny_tokenizer: Any) -> None:
    logits = torch.eye(2)[torch.tensor([[0, 0, 1], [1, 1, 1]])]
    batch = {"labels": torch.tensor([[0, 1, -100], [1, -100, -100]])}
    found = measure(TokenClassifierConfig(**SHAPE), batch, logits, tiny_tokenizer)
    assert found == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})


def test_several_labels_are_measured_each_for_itself(tiny_tokenizer: Any) -> None:
    config = SequenceClassifierConfig(**SHAPE, problem_type="multi_label_classification")
    # All logits lie between 0 and 1: they are logits all the same, and all say yes.
    logits = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    batch = {"labels": torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])}
    found = measure(config, batch, logits, tiny_tokenizer)
    assert found == pytest.approx({"accuracy": (1 + 2 / 3) / 2, "f1": (1 + 4 / 5) / 2})


def test_numbers_are_measured_by_squares_and_correlation(tiny_tokenizer: Any) -> None:
    batch = {"labels": torch.tensor([1.0, 2.0, 4.0])}
    logits = torch.tensor([[3.0], [5.0], [9.0]])
    found = measure(SequenceClassifierConfig(**SHAPE, num_labels=1), batch, logits, tiny_tokenizer)
    assert found == pytest.approx({"mse": (4 + 9 + 25) / 3, "pearson": 1})
    several = SequenceClassifierConfig(**SHAPE, num_labels=2, problem_type="regression")
    batch, logits = {"labels": torch.tensor([[1.0, 2.0], [1.0, 0.0]])}, torch.zeros(2, 2)
    assert measure(several, batch, logits, tiny_tokenizer) == {"mse": (1 + 4 + 1) / 4}


def test_answers_are_measured_as_texts(tiny_tokenizer: Any) -> None:
    offsets = torch.tensor([[[0, 0], [0, 3], [4, 8], [9, 12]]]).repeat(2, 1, 1)
    batch = {
        "offsets": offsets,
        "context": ["the left end", "one two six"],
        "answers": [["Left", "x"], ["six"]],
    }
    logits = torch.zeros(2, 4, 2)
    logits[0, 2] = 9.0  # "left": the same but for its case
    logits[1, 2, 0] = logits[1, 3, 1] = 9.0  # "two six": one word of two is right
    logits[:, 0] = 99.0  # not in the text
    found, wanted = found_and_wanted(logits, batch)
    assert [entry["prediction_text"] for entry in found] == ["left", "two six"]
    assert wanted[0]["answers"]["text"] == ["Left", "x"]
    found = measure(SpanFinderConfig(**SHAPE), batch, logits, tiny_tokenizer)
    assert found == pytest.approx({"exact_match": 50.0, "f1": (100 + 200 / 3) / 2})


def test_the_best_span_is_the_best_of_all_that_do_not_end_before_they_begin() -> None:
    logits = torch.randn(20, 9, 2, generator=torch.Generator().manual_seed(0))
    is_text = torch.rand(20, 9, generator=torch.Generator().manual_seed(1)) < 0.8
    for row, (first, last) in enumerate(best_spans(logits, is_text, longest=4).tolist()):
        sums = {
            (i, j): float(logits[row, i, 0] + logits[row, j, 1])
            for i in range(9)
            for j in range(i, min(i + 4, 9))
            if is_text[row, i] and is_text[row, j]
        }
        assert sums[first, last] == max(sums.values())


def test_a_text_classifier_needs_a_tokenizer_with_padding(tokenizer_folder: Path) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_folder))
    network = make_network(SequenceClassifierConfig(**SHAPE), device="meta")
    ComposerHead(network, tokenizer=tokenizer)
    assert network.pad_token_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"tokenizer: has no padding token.*tokenizer.kwargs.pad_token"):
        ComposerHead(network, tokenizer=tokenizer)
    ComposerHead(make_network(TokenClassifierConfig(**SHAPE), device="meta"), tokenizer=tokenizer)


TRAIN = """
import json, sys, warnings
from composer import Trainer
from composer.core import Evaluator
from composer.loggers import InMemoryLogger
from composer.utils import FSDP2Config, dist
from mptfoundry.models.gloo_average import average_gradients
from tests.loaders import labelled_loader
from mptfoundry.models.heads import ComposerHead
from mptfoundry.mpt.config import AttnConfig
from mptfoundry.mpt.head_config import SequenceClassifierConfig, SpanFinderConfig, TokenClassifierConfig
from mptfoundry.mpt.heads import make_network
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.tokenizer import load_tokenizer

warnings.simplefilter("ignore")
out, folder = sys.argv[1:]
SHAPE = dict(d_model=16, n_heads=2, n_layers=1, vocab_size=384, max_seq_len=32)
SHAPE["attn_config"] = AttnConfig(alibi=True)
HEADS = {
    "sequence": SequenceClassifierConfig(**SHAPE, num_labels=3),
    "token": TokenClassifierConfig(**SHAPE, classifier_dropout=0.0),
    "span": SpanFinderConfig(**SHAPE),
}

def train(task, parallelism=None):
    tokenizer, ranks = load_tokenizer(folder + "/tokenizer"), dist.get_world_size()
    common = dict(local=folder, split=task, model=HEADS[task], tokenizer=tokenizer, max_seq_len=32)
    logger = InMemoryLogger()
    model = ComposerHead(make_network(HEADS[task], seed=0), tokenizer=tokenizer)
    trainer = Trainer(
        model=model,
        train_dataloader=labelled_loader(
            **common, device_batch_size=8 // ranks, shuffle=True),
        eval_dataloader=Evaluator(label="held_out", dataloader=labelled_loader(
            **common, device_batch_size=3, drop_last=False, is_training=False)),
        optimizers=DecoupledLionW(model.parameters(), lr=1e-3),
        max_duration="4ba", eval_interval="4ba", device="cpu", progress_bar=False,
        device_train_microbatch_size=8 if ranks == 1 else 3, accumulate_train_batch_on_tokens=True,
        loggers=[logger], parallelism_config=parallelism,
    )
    average_gradients(trainer.state.model)
    trainer.fit()
    wanted = ("loss/train/total", "metrics/held_out")
    data = {name: values for name, values in logger.data.items() if name.startswith(wanted)}
    return {name: [float(value) for _, value in values] for name, values in data.items()}

if __name__ == "__main__":
    dist.initialize_dist("cpu")
    sharded = {"sequence": {"fsdp": FSDP2Config()}} if dist.get_world_size() > 1 else {}
    found = {task: train(task, sharded.get(task)) for task in HEADS}
    if dist.get_global_rank() == 0:
        json.dump(found, open(out, "w"))
    dist.barrier()
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with a tokenizer and 17 examples of each task, of differing length."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "tokenizer").symlink_to(tokenizer_folder)
    rows: dict[str, list[dict[str, Any]]] = {"sequence": [], "token": [], "span": []}
    for n in range(17):
        text = f"def f{n}(x): " + "x " * (n % 5)
        words, start = text.split(), text.index("f", 3)
        rows["sequence"].append({"text": text, "label": n % 3})
        rows["token"].append({"words": words, "labels": [int(word == "x") for word in words]})
        answers = {"text": [f"f{n}"], "answer_start": [start]}
        rows["span"].append({"question": "which", "context": text, "answers": answers})
    for task, records in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_ranks_copied_or_sharded_and_microbatches_change_neither_losses_nor_measures(
    examples: Path, on_one_rank_and_two: Callable[..., tuple[Any, Any]]
) -> None:
    one, two = on_one_rank_and_two(TRAIN, str(examples))
    for task, expected in one.items():
        assert len(expected["loss/train/total"]) == 4 and len(expected) >= 4
        for name, numbers in expected.items():
            assert two[task][name] == pytest.approx(numbers, rel=1e-4), (task, name)
