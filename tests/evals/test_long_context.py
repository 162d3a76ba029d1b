"""Loss by position, needles and copies: they add up, and a sliding window shows in all three."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mptfoundry.cli import main
from mptfoundry.evals.needles import copies, evaluate_questions, needles
from mptfoundry.evals.positions import evaluate_positions, position_buckets, token_loss_in_chunks
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY
from tests.ranks import run_on_ranks

Capture = pytest.CaptureFixture[str]
VOCAB, TRAINED = 128, 32
# Of the counting network's predictions.
SHARPNESS = 0.4


def counting_network(window: int) -> MPT:
    """A network that predicts the tokens in its window by how often they occur there.

    A token's embedding is a vector of its own, attention is uniform, and the output is the mean of what is
    seen.
    """
    config = MPTConfig(
        d_model=VOCAB,
        n_heads=1,
        n_layers=1,
        max_seq_len=TRAINED,
        vocab_size=VOCAB,
        no_bias=True,
        learned_pos_emb=False,
        attn_config=AttnConfig(sliding_window_size=window),
    )
    network = MPT(config, seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        network.transformer.wte.weight.copy_(torch.eye(VOCAB))
        block = network.transformer.blocks[0]
        block.attn.Wqkv.weight[2 * VOCAB :] = torch.eye(VOCAB)
        network.transformer.norm_f.weight.fill_(SHARPNESS)
        block.attn.out_proj.weight.copy_(10 * torch.eye(VOCAB))
    return network.eval()


class Rows:
    """A data set of rows of the training length; every document of four rows has 16 tokens of its own."""

    def __init__(self, rows: int) -> None:
        draw = np.random.default_rng(1)
        self.ids = [
            draw.choice(VOCAB, 16, replace=False)[draw.integers(16, size=4 * TRAINED)]
            for _ in range(rows // 4)
        ]
        self.num_samples = rows
        self.sample_offset_per_stream, self.samples_per_stream = np.array([0]), np.array([rows])

    def get_item(self, number: int) -> dict[str, Any]:
        start = number % 4 * TRAINED
        return {"input_ids": self.ids[number // 4][start : start + TRAINED], "sample_id": number}


def curve(window: int) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    return evaluate_positions(
        counting_network(window),
        Rows(240),
        length=4 * TRAINED,
        joined=4,
        batch_size=8,
        token_bytes=None,
        is_sharded=False,
    )


def test_buckets_add_up_to_the_loss() -> None:
    whole, buckets = curve(-1)
    tokens = sum(each["tokens"] for each in buckets.values())
    loss = sum(each["tokens"] * each["LanguageCrossEntropy"] for each in buckets.values())
    assert tokens == whole["tokens"] == 60 * (4 * TRAINED - 1)
    assert loss / tokens == pytest.approx(whole["LanguageCrossEntropy"], rel=1e-12)
    assert list(buckets) == position_buckets(4 * TRAINED, TRAINED) == [*range(0, 32, 4), *range(32, 128, 16)]


def test_with_a_window_the_loss_stops_falling_at_the_window() -> None:
    """Without one, more of a document's tokens still help."""
    seen, blind = ({k: v["LanguageCrossEntropy"] for k, v in curve(window)[1].items()} for window in (-1, 12))
    assert blind[0] - blind[24] > 0.4
    after = [loss for first, loss in blind.items() if first >= 16]
    assert max(after) - min(after) < 0.2
    assert seen[16] - seen[112] > 0.2


def test_needles_beyond_the_window_are_lost() -> None:
    text = np.random.default_rng(2).integers(VOCAB, size=5000)
    found: dict[tuple[int, float], float] = {}
    for window in (-1, 28):
        for depth in (0.0, 1.0):
            questions = needles(text, 4 * TRAINED, depth, count=40, seed=3)
            network = counting_network(window)
            result = evaluate_questions(network, questions, batch_size=8, is_sharded=False)
            found[window, depth] = result["accuracy"]
            assert result["random_baseline"] == 0.25 and result["documents"] == 40
    assert min(found[-1, 0.0], found[-1, 1.0]) > 0.8
    assert found[28, 1.0] > 0.9 and found[28, 0.0] < 0.5


def test_counting_does_not_help_to_copy() -> None:
    """All choices occur in the context equally often, so a network that only counts is right by chance."""
    text = np.random.default_rng(2).integers(VOCAB, size=5000)
    questions = copies(text, 128, count=100, seed=3)
    result = evaluate_questions(counting_network(-1), questions, batch_size=8, is_sharded=False)
    assert 0.1 < result["accuracy"] < 0.4 and abs(result["margin"]) < 0.05
    context, choices = questions.contexts[0], questions.choices[0]
    assert len(context) == 128 and torch.equal(context[:48], context[80:])
    assert torch.equal(context[48:56], choices[0])  # what followed the first time


@pytest.mark.parametrize("attention", ["alibi", "rope", "window"])
def test_chunks_give_the_loss_of_whole_rows(attention: str) -> None:
    kinds = {"alibi": AttnConfig(alibi=True), "rope": AttnConfig(rope=True)}
    kinds["window"] = AttnConfig(alibi=True, sliding_window_size=9)
    network = MPT(replace(TINY, attn_config=kinds[attention]), seed=1).eval()
    ids = torch.randint(TINY.vocab_size, (3, 97))
    labels = ids.clone()
    labels[1, 80:] = -100
    with torch.inference_mode():
        whole = network(ids, labels=labels)
    for chunk in (16, 24, 96, 97):
        losses, correct = token_loss_in_chunks(network, ids, labels, chunk)
        assert torch.allclose(losses[:, :-1], whole.token_loss[:, :-1], atol=1e-5)
        assert torch.equal(correct[:, :79], whole.token_correct[:, :79])


@pytest.fixture
def words(write_run: Callable[..., Path], shards: Path, tmp_path: Path) -> list[str]:
    """An evaluation of a small network on text in rows of 32 tokens, its training length."""
    model = write_run(
        network=MPT(replace(TINY, max_seq_len=32), seed=1), config=replace(TINY, max_seq_len=32)
    )
    loader = [
        f"eval_loader.dataset.local={shards}/a",
        "eval_loader.dataset.split=val",
        "eval_loader.name=text",
    ]
    return [str(model), *loader, f"tokenizer={shards}/tokenizer", "eval_loader.label=val"]


def evaluated(words: list[str], out: Path, *more: str) -> dict[str, dict[str, float]]:
    assert main(["eval", *words, f"out={out}", *more]) == 0
    return json.loads(out.read_text())["results"]


@pytest.mark.pictures
def test_positions_needles_and_copies_of_a_run(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    ordinary = evaluated(words, tmp_path / "ordinary.json")["val"]
    once = evaluated(words, tmp_path / "once.json", "positions=true")
    buckets = [metrics for label, metrics in once.items() if label.startswith("val/")]
    total = sum(each["LanguageCrossEntropy"] * each["tokens"] for each in buckets)
    assert total / ordinary["tokens"] == pytest.approx(ordinary["LanguageCrossEntropy"], rel=1e-6)
    assert once["val"] == pytest.approx(ordinary, rel=1e-6)
    more = ["positions=true", "max_seq_len=4x", "needle={lengths: [48, 96], depths: 2, documents: 6}"]
    longer = evaluated(words, tmp_path / "longer.json", *more, "copy={lengths: [70], documents: 5}")
    assert longer["val"]["tokens"] > ordinary["tokens"]
    assert {"val/0-3", "val/112-127", "needle/96/depth 1.00", "copy/70"} <= longer.keys()
    assert (tmp_path / "longer.positions.png").stat().st_size > 5000
    assert "val/112-127" in capsys.readouterr().out


def test_two_ranks_give_the_results_of_one(words: list[str], tmp_path: Path) -> None:
    more = ["positions=true", "max_seq_len=2x", "needle={lengths: [48], depths: 1, documents: 5}"]
    alone = evaluated(words, tmp_path / "one.json", *more, "device_eval_batch_size=2")
    done = run_on_ranks(
        "scripts/eval.py", *words, f"out={tmp_path}/two.json", *more, "device_eval_batch_size=2"
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "two.json").read_text())["results"] == alone


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["max_seq_len=4y"], 2, "'4y' is not a number of tokens. Use one, or 2x or 4x."),
        (["max_seq_len=4x"], 2, "needs positions: true"),
        (["max_seq_len=0x"], 2, "'0x' is not a number of tokens"),
        (["needle={lengths: [8]}"], 2, "Use one or more numbers of tokens, of at least 32"),
        (["copy={lengths: [32]}"], 2, "Use one or more numbers of tokens, of at least 64"),
        (["needle={lengths: [900000]}"], 1, "the held-out text has"),
        (["positions=true", "eval_subset_num_batches=2"], 2, "has no effect with positions: true"),
    ],
)
def test_bad_input_is_a_sentence(
    words: list[str], capsys: Capture, more: list[str], code: int, said: str
) -> None:
    assert main(["eval", *words, *more]) == code
    assert said in capsys.readouterr().err


def test_a_model_with_other_positions_is_refused(
    write_run: Callable[..., Path], words: list[str], capsys: Capture
) -> None:
    learned = replace(TINY, max_seq_len=32, attn_config=AttnConfig())
    documents = replace(TINY, max_seq_len=32, attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True))
    for config, said in (
        (learned, "128 tokens, but the model has 32 learned positions"),
        (documents, "attend"),
    ):
        write_run(config=config)
        assert main(["eval", *words, "positions=true", "max_seq_len=4x"]) == 2
        assert said in capsys.readouterr().err
