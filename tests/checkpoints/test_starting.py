from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.checkpoints.source import ModelSource, with_rows
from mptfoundry.checkpoints.starting import StartingWeights
from mptfoundry.checkpoints.weights import Rows, TensorOutline, Weights
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

# An odd number of rows, so that two shards differ in length.
CONFIG = MPTConfig(
    d_model=32, n_heads=4, n_layers=2, vocab_size=35, no_bias=True, attn_config=AttnConfig(alibi=True)
)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return save(tmp_path, MPT(CONFIG, seed=5))


def save(folder: Path, network: MPT) -> ModelSource:
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**network.config.to_dict(), "model_type": "mptfoundry"}))
    return open_model(folder)


def assert_same(network: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_every_weight_is_that_of_the_source(source: ModelSource) -> None:
    network = MPT(CONFIG, empty=True)
    StartingWeights(source, network, seed=1).fill(network)
    assert_same(network, MPT(CONFIG, seed=5))


def test_without_a_source_every_weight_is_drawn() -> None:
    network = MPT(CONFIG, empty=True)
    StartingWeights(None, network, seed=1).fill(network)
    assert_same(network, MPT(CONFIG, seed=1))


class Counting:
    """Weights that count the numbers that are read."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.numbers = 0

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        return self.weights.outlines

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        tensor = self.weights.read(name, dtype, rows)
        self.numbers += tensor.numel()
        return tensor


@pytest.fixture(params=[0, 1])
def rank_of_two(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process that takes itself for one of two, as far as no other is asked for anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(request.param))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    torch.distributed.destroy_process_group()


def test_a_rank_reads_its_own_rows_alone_where_a_model_is_sharded_before_it_has_weights(
    source: ModelSource, rank_of_two: int
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from mptfoundry.models.causal_lm import ComposerMPT

    counting = Counting(source.weights)
    network = MPT(CONFIG, device="meta")
    starting = StartingWeights(replace(source, weights=counting), network, seed=1)
    ComposerMPT(network).start_from(starting)
    mesh = init_device_mesh("cpu", (2,))
    for block in network.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to_empty(device="cpu")
    for module in network.modules():
        network.param_init_fn(module)
    held = 0
    for name, whole in MPT(CONFIG, seed=5).state_dict().items():
        own: Any = network.state_dict()[name]
        assert torch.equal(own.to_local(), whole.chunk(2)[rank_of_two]), name
        held += own.to_local().numel()
    assert counting.numbers == held


def test_a_part_that_is_new_is_drawn_and_named_and_nothing_else_may_be(source: ModelSource) -> None:
    larger = replace(CONFIG, n_layers=3)
    network = MPT(larger, empty=True)
    starting = StartingWeights(source, network, seed=1, new=["transformer.blocks.2."])
    assert len(starting.drawn) == 6
    assert all(name.startswith("transformer.blocks.2.") for name in starting.drawn)
    starting.fill(network)
    drawn, read = MPT(larger, seed=1), MPT(CONFIG, seed=5)
    assert_same(network.transformer.blocks[2], drawn.transformer.blocks[2])
    assert_same(network.transformer.blocks[1], read.transformer.blocks[1])
    with pytest.raises(CheckpointError, match=r"transformer.blocks.2.norm_1.weight is missing; .*Wqkv"):
        StartingWeights(source, network, seed=1, new=["score."])


def test_what_the_source_has_beside_may_be_left_only_where_that_is_said(tmp_path: Path) -> None:
    source = save(tmp_path, MPT(replace(CONFIG, tie_word_embeddings=False), seed=5))
    network = MPT(CONFIG, empty=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not of this architecture"):
        StartingWeights(source, network, seed=1)
    StartingWeights(source, network, seed=1, unused=["lm_head."]).fill(network)
    assert torch.equal(network.transformer.wte.weight, source.weights.read("transformer.wte.weight"))


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_the_vocabulary_are_the_mean_of_the_old_ones(tmp_path: Path, tied: bool) -> None:
    there = replace(CONFIG, tie_word_embeddings=tied)
    source = with_rows(save(tmp_path, MPT(there, seed=5)), 40)
    assert source.config.vocab_size == 40
    network = MPT(source.config, empty=True)
    StartingWeights(source, network, seed=1).fill(network)
    old = MPT(there, seed=5)
    for matrix, stored in (
        (network.transformer.wte.weight, old.transformer.wte.weight),
        (network.output_weight, old.output_weight),
    ):
        assert torch.equal(matrix[:35], stored)
        assert torch.equal(matrix[35:], stored.double().mean(0).float().expand(5, -1))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(network(ids).logits[..., :35], old(ids).logits)
    assert (network(ids).logits[..., 35:] < network(ids).logits.amax(-1, keepdim=True)).all()


def test_rows_across_the_old_end_are_read_and_made(source: ModelSource) -> None:
    weights = with_rows(source, 40).weights
    whole = weights.read("transformer.wte.weight")
    for rows in ((0, 20), (20, 40), (34, 36), (35, 40), (40, 40)):
        part = weights.read("transformer.wte.weight", rows=rows)
        assert torch.equal(part, whole[rows[0] : rows[1]])
    assert weights.read("transformer.wte.weight", torch.bfloat16).dtype is torch.bfloat16
    assert with_rows(source, 35) is source


def test_a_smaller_vocabulary_loses_its_last_rows(source: ModelSource) -> None:
    cut = with_rows(source, 20)
    assert torch.equal(
        cut.weights.read("transformer.wte.weight"), MPT(CONFIG, seed=5).transformer.wte.weight[:20]
    )
    network = MPT(cut.config, empty=True)
    StartingWeights(cut, network, seed=1).fill(network)
