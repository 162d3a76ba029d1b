"""What FSDP2 is told beside what Composer tells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from mptfoundry.models.sharding import HybridConfig, prefetch
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> MPT:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo")
    config = MPTConfig(
        d_model=16, n_heads=2, n_layers=4, max_seq_len=8, vocab_size=32, attn_config=AttnConfig(alibi=True)
    )
    network = MPT(config, seed=0)
    for block in network.transformer.blocks:
        fully_shard(block)
    return fully_shard(network)


def ahead(network: MPT, direction: str) -> list[list[int]]:
    """What the network and then each block gathers: numbers of blocks."""
    modules: list[Any] = [network, *network.transformer.blocks]
    states = [module._get_fsdp_state() for module in modules]
    return [
        [states.index(other) - 1 for other in getattr(state, f"_states_to_{direction}_prefetch")]
        for state in states
    ]


def test_as_many_blocks_are_gathered_ahead_as_was_asked_for(sharded: MPT) -> None:
    prefetch(sharded, forward=2, backward=1)
    assert ahead(sharded, "forward") == [[0, 1], [1, 2], [2, 3], [3], []]
    assert ahead(sharded, "backward") == [[3], [], [0], [1], [2]]


def test_what_was_not_asked_for_is_left_to_fsdp(sharded: MPT) -> None:
    prefetch(sharded, forward=0, backward=0)
    assert not any(ahead(sharded, "forward") + ahead(sharded, "backward"))


def test_a_hybrid_says_its_mesh_to_composer() -> None:
    config = HybridConfig(replicas=2, shards=4, reshard_after_forward=False)
    assert (config.data_parallel_replicate_degree, config.data_parallel_shard_degree) == (2, 4)
    assert config.reshard_after_forward is False
