"""The network as Composer sees it, and one training on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.flops import flops_per_token
from mptfoundry.mpt.network import MPT

CONFIG = MPTConfig(
    d_model=16, n_heads=2, n_layers=2, vocab_size=32, max_seq_len=8, attn_config=AttnConfig(alibi=True)
)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, 3:6] = -100
    return {"input_ids": tokens, "labels": labels, "sample_id": torch.arange(3)}


def test_training_gives_the_mean_loss_and_evaluation_the_losses_of_tokens() -> None:
    model = ComposerMPT(MPT(CONFIG, seed=0))
    outputs = model(batch())
    assert outputs.logits is None
    loss = model.loss(outputs, batch())
    assert loss.shape == ()
    model.eval()
    token_loss = model.eval_forward(batch()).token_loss
    assert token_loss.shape == (3, 8)
    predicted = (batch()["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(token_loss.sum() / predicted, loss)


def test_all_that_the_network_takes_of_a_batch_reaches_it() -> None:
    model = ComposerMPT(MPT(CONFIG, seed=0))
    given: list[Any] = []
    model.model.transformer.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    sequence_id = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]] * 3)
    model({**batch(), "sequence_id": sequence_id, "max_documents": 3})
    assert torch.equal(given[1], sequence_id) and given[-1] == 3


def test_metrics_are_those_of_evaluation_only() -> None:
    model = ComposerMPT(MPT(CONFIG, seed=0), eval_metrics=token_loss_metrics())
    assert model.get_metrics(is_train=True) == {}
    metric = model.get_metrics(is_train=False)["LanguageCrossEntropy"]
    model.eval()
    outputs = model.eval_forward(batch())
    model.update_metric(batch(), outputs, metric)
    assert metric.compute().item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert all(name.startswith("model.transformer.") for name in model.state_dict())


def test_flops_are_those_of_the_batchs_length() -> None:
    model = ComposerMPT(MPT(CONFIG, device="meta"))
    expected = 3 * 8 * flops_per_token(CONFIG, 8, causal=False)
    assert model.flops_per_batch(batch()) == expected


def test_blocks_are_what_is_wrapped_recomputed_or_not() -> None:
    network = MPT(CONFIG, device="meta")
    checkpoint_activations(network, {"block": [0]})
    ComposerMPT(network)
    wrapped = [name for name, module in network.named_modules() if network.fsdp_wrap_fn(module)]
    assert wrapped == ["transformer.blocks.0", "transformer.blocks.1"]


def test_weights_drawn_module_by_module_after_meta_are_those_drawn_at_once() -> None:
    network = MPT(CONFIG, device="meta")
    ComposerMPT(network, seed=3)

    def materialise(module: nn.Module) -> None:
        for child in reversed(list(module.children())):
            materialise(child)
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            network.param_init_fn(module)

    materialise(network)
    whole = MPT(CONFIG, seed=3).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in network.state_dict().items())


TRAIN = """
import json, sys, warnings
import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.loggers import InMemoryLogger
from composer.utils import FSDP2Config, dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from mptfoundry.models.gloo_average import average_gradients
from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.clipping import GradientClipping
from mptfoundry.optim.lion import DecoupledLionW

warnings.simplefilter("ignore")
ROWS = torch.randint(0, 32, (35, 8), generator=torch.Generator().manual_seed(0))

def collate(numbers):
    rows = ROWS[list(numbers)]
    return {"input_ids": rows, "labels": rows.clone(), "sample_id": torch.tensor(numbers)}

def loader(count):
    ranks = dist.get_world_size()
    # Batches of four over all ranks, of the same rows whatever the number of ranks; the last is filled up.
    numbers = list(range(count)) + list(range(-count % 4))
    mine = [numbers[i : i + 4][dist.get_global_rank() :: ranks] for i in range(0, len(numbers), 4)]
    return DataLoader(mine, batch_size=None, collate_fn=collate, sampler=Own(len(mine)))

class Own(torch.utils.data.DistributedSampler):
    def __init__(self, batches):
        super().__init__(range(batches), num_replicas=1, rank=0, shuffle=False, drop_last=True)

# An odd number of rows, so that two shards differ in length.
CONFIG = MPTConfig(
    d_model=16, n_heads=2, n_layers=2, vocab_size=33, max_seq_len=8, attn_config=AttnConfig(alibi=True)
)

def check_that_shards_drawn_after_meta_are_those_of_the_whole():
    network = MPT(CONFIG, device="meta")
    ComposerMPT(network, seed=3)
    for block in network.transformer.blocks:
        fully_shard(block)
    fully_shard(network)
    network.to_empty(device="cpu")
    for module in network.modules():
        network.param_init_fn(module)
    whole = MPT(CONFIG, seed=3).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value.full_tensor(), whole[name]), name

def train(parallelism):
    model = ComposerMPT(MPT(CONFIG, seed=0), eval_metrics=token_loss_metrics())
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=loader(32),
        eval_dataloader=Evaluator(label="held_out", dataloader=loader(35), device_eval_microbatch_size=4),
        optimizers=DecoupledLionW(model.parameters(), lr=1e-3, weight_decay=1e-3),
        algorithms=[GradientClipping("norm", 0.5)],
        max_duration="8ba",
        eval_interval="8ba",
        device_train_microbatch_size=2,
        device="cpu",
        loggers=[logger],
        parallelism_config=parallelism,
        progress_bar=False,
    )
    average_gradients(trainer.state.model)
    trainer.fit()
    scores = [f"metrics/held_out/{name}" for name in ("LanguageCrossEntropy", "tokens")]
    wanted = ("loss/train/total", "grad_norm", *scores)
    return {name: [float(value) for _, value in logger.data[name]] for name in wanted}

if __name__ == "__main__":
    dist.initialize_dist("cpu")
    found = {"alone or copied": train(None)}
    if dist.get_world_size() > 1:
        check_that_shards_drawn_after_meta_are_those_of_the_whole()
        found["sharded"] = train({"fsdp": FSDP2Config()})
    if dist.get_global_rank() == 0:
        json.dump(found, open(sys.argv[1], "w"))
    dist.barrier()
"""


def test_two_ranks_train_and_evaluate_as_one_copied_or_sharded(
    on_one_rank_and_two: Callable[..., tuple[Any, Any]],
) -> None:
    one, two = on_one_rank_and_two(TRAIN)
    (alone,) = one.values()
    assert alone["grad_norm"][0] > 0.5
    assert alone["metrics/held_out/tokens"] == [35 * 7]
    for together in two.values():
        for name, values in alone.items():
            assert together[name] == pytest.approx(values, rel=1e-5), name
