"""Which share of attention's blocks is computed where ALiBi lets the kernels skip the rest, without a GPU.

    python scripts/skipped_blocks.py [config=configs/mpt-7b.yaml] [sharper=1,2,4,8] [key=value ...]

It takes the first layer's queries and keys of a model with fresh weights and of random tokens, and goes by
the kernels' own rule and block sizes (mptfoundry/mpt/attention_kernels.py). Scores grow while a model is
trained, and then fewer blocks are skipped: `sharper` multiplies the scores. A row counts as one document.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mptfoundry.config.load import load_train_config  # noqa: E402
from mptfoundry.mpt import attention_torch  # noqa: E402
from mptfoundry.mpt.attention_tiles import Tile, tile_of  # noqa: E402
from mptfoundry.mpt.config import MPTConfig  # noqa: E402
from mptfoundry.mpt.network import MPT  # noqa: E402

H200, BYTES_OF_BF16 = (9, 0), 2
LOG2_E = math.log2(math.e)


def main(words: list[str]) -> None:
    options = {"config": "configs/mpt-7b.yaml", "sharper": "1,2,4,8"} | dict(w.split("=", 1) for w in words)
    factors = [float(number) for number in options.pop("sharper").split(",")]
    config, _ = load_train_config(options.pop("config"), [f"{key}={value}" for key, value in options.items()])
    print("| scores times | largest possible score | share of blocks |\n|---:|---:|---:|")
    shares = computed_shares(config.model.network(), config.max_seq_len, factors)
    for factor, (largest, share) in zip(factors, shares, strict=True):
        print(f"| {factor:g} | {largest:.0f} | {share:.3f} |")


def computed_shares(network: MPTConfig, seq: int, factors: Sequence[float]) -> list[tuple[float, float]]:
    """For each factor on the scores: the largest score that is possible, and computed / all causal blocks."""
    query, key, context = first_layer(network, seq)
    tile = tile_of("forward", network.d_head, H200, BYTES_OF_BF16)
    shares = []
    for factor in factors:
        reach, largest = reach_of(query, key, context.slopes, factor * context.scale, tile)
        stops = stops_of(len(reach[0]), seq, tile)
        shares.append((largest, ((stops - reach).sum() / (stops.sum() * len(reach))).item()))
    return shares


def first_layer(network: MPTConfig, seq: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Queries (seq, n_heads, head_dim), keys (seq, kv_heads, head_dim) and context of a row of tokens."""
    attention = replace(network.attn_config, attn_impl="torch")
    net = MPT(replace(network, n_layers=1, max_seq_len=seq, attn_config=attention)).eval()
    net.transformer.blocks[0].ffn = torch.nn.Identity()  # nobody needs its result
    ids = torch.randint(network.vocab_size, (1, seq), generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Any) -> torch.Tensor:
        seen.extend((query[0], key[0], context))
        return query

    with torch.no_grad(), patch.object(attention_torch, "attend", attend):
        net.transformer(ids, None, None, None)
    return seen[0], seen[1], seen[2]


def reach_of(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scale: float, tile: Tile
) -> tuple[torch.Tensor, float]:
    """The first key that the forward kernel visits, (n_heads, blocks of queries), and the largest score that
    is possible. The kernel visits a block's last keys first and stops where no key before can reach a weight
    of 2 ** -25 / keys in any of its rows.
    """
    seq, n_heads = query.shape[:2]
    blocks, bits = -(-seq // tile.block_q), 25 + math.log2(seq)
    begins = torch.arange(blocks) * tile.block_q
    firsts = begins // tile.block_k * tile.block_k  # of the keys that only some of the queries see
    reach, largest = torch.empty(n_heads, blocks, dtype=torch.int64), 0.0
    for head in range(n_heads):
        q = F.pad(query[:, head], (0, 0, 0, blocks * tile.block_q - seq)).view(blocks, tile.block_q, -1)
        keys = key[:, head * key.shape[1] // n_heads]
        bounds = scale * LOG2_E * 1.001 * q.norm(dim=-1) * keys.norm(dim=-1).max()
        slope = slopes[head].item() * LOG2_E
        tops = torch.empty_like(bounds)
        for block, (begin, first) in enumerate(zip(begins.tolist(), firsts.tolist(), strict=True)):
            positions = torch.arange(first, min(begin + tile.block_q, seq))
            scores = q[block] @ keys[first : begin + tile.block_q].T * (scale * LOG2_E)
            scores += slope * (positions - begin)
            is_later = positions > begin + torch.arange(tile.block_q)[:, None]
            tops[block] = scores.masked_fill(is_later, -math.inf).max(1).values
        is_row = begins[:, None] + torch.arange(tile.block_q) < seq
        gaps = torch.minimum(bounds - tops, 2 * bounds).masked_fill(~is_row, -math.inf).max(1).values
        stops = (begins - (gaps + bits) / slope).clamp(min=0).long() // tile.block_k * tile.block_k
        reach[head] = torch.minimum(stops, firsts)
        largest = max(largest, bounds.max().item() / LOG2_E)
    return reach, largest


def stops_of(blocks: int, seq: int, tile: Tile) -> torch.Tensor:
    """One past the last key that each block of queries visits."""
    ends = ((torch.arange(blocks) + 1) * tile.block_q).clamp(max=seq)
    return -(-ends // tile.block_k) * tile.block_k


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
