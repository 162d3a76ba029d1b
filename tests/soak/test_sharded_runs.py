"""A run over several ranks, however it is spread over them, trains the model that one rank trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.config.load import load_train_config
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a sharded, hybrid or DDP run is killed",
        "SIGKILL half-way, 5 layouts over 1 to 4 ranks",
        "losses and weights of a run on one rank, within rounding",
    ),
]

ROOT = Path(__file__).parent.parent.parent
PLAIN = ("model.resid_pdrop=0", "model.n_layers=4", "max_duration=20ba", "save_interval=5ba")
# Ranks, whether all are killed after twelve batches and started again, and how the run is spread over them.
# All have ALiBi, tied embeddings, LION and clipping by norm.
SPREADS: dict[str, tuple[int, bool, str, tuple[str, ...]]] = {
    "full-shard": (
        2,
        True,
        "{forward_prefetch: true, backward_prefetch_limit: 2, state_dict_type: sharded}",
        (),
    ),
    "shard-grad-op": (
        2,
        False,
        "{sharding_strategy: SHARD_GRAD_OP, activation_checkpointing: true, activation_cpu_offload: true}",
        ("model.activation_checkpointing_target=[attention,mlp]", "model.init_device=mixed"),
    ),
    "full-shard-of-four": (
        4,
        False,
        "{activation_checkpointing: true, state_dict_type: full}",
        ("device_train_microbatch_size=1",),
    ),
    "two-copies-of-two-shards": (
        4,
        True,
        "{sharding_strategy: HYBRID_SHARD, data_parallel_replicate_degree: 2, state_dict_type: sharded, "
        "activation_checkpointing: true}",
        ("model.activation_checkpointing_target={block: every-2, mlp: [1]}",),
    ),
    "whole-copies": (2, False, "{sharding_strategy: NO_SHARD, activation_checkpointing: true}", ()),
}


def result(folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The losses and gradient norms of a run, and its weights."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    weights = {name: tensor.clone() for name, tensor in open_model(folder).tensors()}
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights


def evaluated(ranks: int, run: Path, data: Path) -> dict[str, float]:
    out = run / f"eval-{ranks}.json"
    loader = f"eval_loader={{name: text, label: held_out, dataset: {{local: {data}/a, split: val}}}}"
    words = [str(run), loader, "device_eval_batch_size=3", f"out={out}"]
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks), "scripts/eval.py"]
    subprocess.run([*launcher, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads(out.read_text())["results"]["held_out"]


def test_a_sharded_run_is_evaluated_in_shards_on_several_ranks_and_whole_on_one(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, shards: Path
) -> None:
    run = launch(tiny_run, "run_name=two", "fsdp_config={state_dict_type: sharded}", ranks=2)
    assert run.wait() == 0, run.printed
    whole, sharded = (evaluated(ranks, tmp_path / "two", shards) for ranks in (1, 2))
    assert sharded == pytest.approx(whole, rel=1e-6) and whole["tokens"] > 0


@pytest.mark.parametrize("name", SPREADS)
def test_a_run_over_ranks_trains_the_model_that_one_rank_trains(
    name: str, tiny_run: Path, launch: Callable[..., Any], tmp_path: Path
) -> None:
    ranks, is_killed, fsdp, words = SPREADS[name]
    given = (tiny_run, "run_name=spread", *PLAIN, f"fsdp_config={fsdp}", *words)
    train(load_train_config(tiny_run, ["run_name=alone", *PLAIN])[0])
    run = launch(*given, ranks=ranks)
    losses, norms, weights = result(tmp_path / "alone")
    assert len(losses) == 20 and max(norms) > 1, "clipping has something to do"
    if is_killed:
        run.kill_after(12, tmp_path / "spread")
        run = launch(*given, ranks=ranks)
    assert run.wait() == 0, run.printed
    assert ("resuming from" in run.printed) == is_killed
    found_losses, found_norms, found = result(tmp_path / "spread")
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    # LION moves a weight by its learning rate or back: rounding may turn the sign of a gradient near zero.
    for key, weight in weights.items():
        is_other = (found[key] - weight).abs() > 1e-6 + 1e-5 * weight.abs()
        assert is_other.double().mean() < 1e-3, key
