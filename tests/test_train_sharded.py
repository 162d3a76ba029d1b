"""Two ranks under the launcher, sharded, with all that makes it cheaper, train the model that one trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.config.load import load_train_config
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

# LION's step is a sign, which the rounding of a gradient near zero may turn; this AdamW's is smooth there.
SMOOTH = "optimizer={name: decoupled_adamw, lr: 1e-3, eps: 1e-3}"
PLAIN = (SMOOTH, "model.resid_pdrop=0", "max_duration=6ba", "save_interval=6ba")
SHARDED = (
    "fsdp_config={state_dict_type: sharded, activation_checkpointing: true, forward_prefetch: true, "
    "backward_prefetch: BACKWARD_PRE}",
    "model.activation_checkpointing_target={block: first-1, mlp: last-1}",
)


def result(folder: Path) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    weights = {name: tensor.clone() for name, tensor in open_model(folder).tensors()}
    return [[row[name] for row in rows] for name in ("loss", "grad_norm")], weights


def test_two_sharded_ranks_train_the_model_that_one_trains(tiny_run: Path, tmp_path: Path) -> None:
    two = run_on_ranks("scripts/train.py", tiny_run, "run_name=two", *PLAIN, *SHARDED)
    train(load_train_config(tiny_run, ["run_name=one", *PLAIN])[0])
    assert two.returncode == 0, two.stdout
    (measured, weights), (expected, alone) = result(tmp_path / "two"), result(tmp_path / "one")
    assert len(measured[0]) == 6
    for found, value in zip(measured, expected, strict=True):
        assert found == pytest.approx(value, rel=1e-5)
    for name, weight in alone.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.soak
def test_two_sharded_ranks_store_a_momentum_in_8_bits_as_one_does_and_one_continues_it(
    tiny_run: Path, tmp_path: Path
) -> None:
    constant = "scheduler={name: constant_with_warmup, t_warmup: 2ba}"
    words = (constant, "model.d_model=64", "model.resid_pdrop=0", "optimizer.momentum_dtype=int8", SHARDED[0])
    for name, ranks, batches in (("two", 2, 6), ("two", 1, 8), ("one", 1, 8)):
        done = run_on_ranks(
            "scripts/train.py", tiny_run, f"run_name={name}", f"max_duration={batches}ba", *words, ranks=ranks
        )
        assert done.returncode == 0, done.stdout
    (measured, _), (expected, _) = result(tmp_path / "two"), result(tmp_path / "one")
    assert len(measured[0]) == 8 and measured[0] == pytest.approx(expected[0], rel=1e-4)
