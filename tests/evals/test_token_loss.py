"""Exact losses: by hand, whatever the batches, and over ranks that repeat samples."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mptfoundry.evals.token_loss import add_up, token_loss_metrics, token_loss_rows
from tests.ranks import run_on_ranks

VOCAB = 16
TOKEN_BYTES = np.array([0, *range(1, VOCAB)])


def data(samples: int = 11, seq: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and labels of uneven samples; some tokens are masked."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (samples, seq), generator=generator)
    labels[torch.rand(samples, seq, generator=generator) < 0.3] = -100
    token_loss = torch.rand(samples, seq, generator=generator) * 5
    predicted = torch.zeros(samples, seq, dtype=torch.bool)
    predicted[:, :-1] = labels[:, 1:] != -100
    return token_loss * predicted, labels


def outputs(token_loss: torch.Tensor) -> SimpleNamespace:
    """Of a network whose likeliest token is right where the loss is below one."""
    return SimpleNamespace(token_loss=token_loss, token_correct=token_loss < 1)


def scores(order: list[list[int]]) -> dict[str, float]:
    """The metrics after batches of the samples with these numbers."""
    token_loss, labels = data()
    metrics = token_loss_metrics(TOKEN_BYTES)
    for numbers in order:
        batch = {"labels": labels[numbers], "sample_id": torch.tensor(numbers)}
        for metric in metrics.values():
            metric.update(batch, outputs(token_loss[numbers]))
    return {name: metric.compute().item() for name, metric in metrics.items()}


def test_two_samples_by_hand() -> None:
    """Predicted are 3 and 0 (a special token) with losses 1 and 2, then 5 with loss 4; 8 bytes in all. Two of
    them are the likeliest, and so is a token that is not predicted.
    """
    rows = token_loss_rows(
        torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]]),
        torch.tensor([[7, 3, 0], [7, -100, 5]]),
        torch.tensor([4, 9]),
        torch.tensor(TOKEN_BYTES),
        torch.tensor([[True, False, True], [True, True, True]]),
    )
    assert rows.tolist() == [[4, 3, 2, 1, 3, 1], [9, 4, 1, 4, 5, 1]]
    result = add_up(rows)
    assert result["LanguageCrossEntropy"] == pytest.approx(7 / 3, abs=1e-15)
    assert result["LanguagePerplexity"] == pytest.approx(math.exp(7 / 3))
    assert result["TokenAccuracy"] == 2 / 3
    assert result["bits_per_byte"] == pytest.approx(5 / math.log(2) / 8)
    assert (result["tokens"], result["bytes"], result["samples"]) == (3, 8, 2)


def test_the_result_does_not_depend_on_batches_order_or_repeats() -> None:
    whole = scores([list(range(11))])
    assert scores([[n] for n in range(11)]) == whole
    assert scores([[10, 3, 5, 0], [1, 2, 4, 6, 7], [9, 8]]) == whole
    assert scores([[0, 1, 2, 3, 4, 5, 6], [5, 7, 8, 9], [10, 0, 10]]) == whole


def test_it_is_the_mean_over_all_tokens_in_float64() -> None:
    token_loss, labels = data()
    count = (labels[:, 1:] != -100).sum().item()
    truth = math.fsum(token_loss.double().flatten().tolist()) / count
    assert scores([list(range(11))])["LanguageCrossEntropy"] == truth
    assert scores([list(range(11))])["tokens"] == count
    below_one = (token_loss[:, :-1] < 1) & (labels[:, 1:] != -100)
    assert scores([list(range(11))])["TokenAccuracy"] == below_one.sum().item() / count


def test_samples_without_a_number_count_each_time() -> None:
    token_loss, labels = data()
    once = add_up(token_loss_rows(token_loss, labels))
    twice = add_up(torch.cat([token_loss_rows(token_loss, labels)] * 2))
    assert twice["tokens"] == 2 * once["tokens"]
    assert twice["samples"] == 22
    assert math.isnan(once["bits_per_byte"]) and math.isnan(once["TokenAccuracy"])


def test_nothing_gives_no_number() -> None:
    metrics = token_loss_metrics()
    assert "bits_per_byte" not in metrics
    assert math.isnan(metrics["LanguageCrossEntropy"].compute().item())


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    rows = torch.tensor([[0.0, 1e6, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert add_up(rows)["LanguagePerplexity"] == math.inf


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_token_loss import TOKEN_BYTES, data, outputs, scores
from mptfoundry.evals.token_loss import token_loss_metrics

dist.init_process_group("gloo")
rank = dist.get_rank()
token_loss, labels = data()
metrics = token_loss_metrics(TOKEN_BYTES)
# The second rank repeats sample 0 to be as long as the first, as samplers do.
mine = ([[0, 2, 4], [6, 8, 10]], [[1, 3], [5, 7, 9], [0]])[rank]
for numbers in mine:
    batch = {{"labels": labels[numbers], "sample_id": torch.tensor(numbers)}}
    for metric in metrics.values():
        metric.update(batch, outputs(token_loss[numbers]))
found = {{name: metric.compute().item() for name, metric in metrics.items()}}
assert found == scores([list(range(11))]), found
# A rank may have no sample at all.
count = token_loss_metrics()["tokens"]
if rank == 0:
    count.update({{"labels": labels, "sample_id": torch.arange(11)}}, outputs(token_loss))
assert count.compute().item() == found["tokens"]
dist.barrier()
"""


def test_two_ranks_with_repeats_give_the_numbers_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(folder=str(Path(__file__).parent)))
    done = run_on_ranks(script)
    assert done.returncode == 0, done.stdout
