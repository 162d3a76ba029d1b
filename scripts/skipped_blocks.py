"""Which share of attention's blocks is computed where ALiBi lets the kernels skip the rest, without a GPU.

    python scripts/skipped_blocks.py [config=configs/mpt-7b.yaml] [sharper=1,2,4,8] [key=value ...]
    python scripts/skipped_blocks.py model=RUN_OR_FOLDER text=FILE [sharper=1,2,4,8]

It goes by the kernels' own rule and block sizes (mptfoundry/mpt/attention_kernels.py). The first form takes
queries and keys of the first layer, with fresh weights and random tokens. Scores grow while a model is
trained, and then fewer blocks are skipped: `sharper` multiplies the scores. The second form takes all layers
of a trained model and the first tokens of a text. A row counts as one document.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
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
    options = {"config": "configs/mpt-7b.yaml", "model": "", "text": "", "sharper": "1,2,4,8"}
    options |= dict(word.split("=", 1) for word in words)
    config, model, text, sharper = (options.pop(key) for key in ("config", "model", "text", "sharper"))
    factors = [float(number) for number in sharper.split(",")]
    if model:
        layers = trained_layers(model, Path(text).read_text(encoding="utf-8"))
    else:
        run, _ = load_train_config(config, [f"{key}={value}" for key, value in options.items()])
        layers = fresh_layer(run.model.network(), run.max_seq_len)
    print("| scores times | largest possible score | share of blocks |\n|---:|---:|---:|")
    for factor, (largest, share) in zip(factors, computed_shares(layers, factors), strict=True):
        print(f"| {factor:g} | {' '.join(f'{each:.0f}' for each in largest)} | {share:.3f} |")


def computed_shares(layers: Sequence[Layer], factors: Sequence[float]) -> list[tuple[list[float], float]]:
    """For each factor on the scores: the largest score that is possible in each layer, and computed / all
    causal blocks."""
    tile = tile_of("forward", layers[0].query.shape[-1], H200, BYTES_OF_BF16)
    shares = []
    for factor in factors:
        found = [reach_of(q, k, slopes, factor * scale, tile) for q, k, slopes, scale in layers]
        reach = torch.stack([each for each, _ in found])  # (layers, n_heads, blocks)
        stops = stops_of(reach.shape[-1], len(layers[0].query), tile)
        share = (stops - reach).sum() / (stops.sum() * reach[..., 0].numel())
        shares.append(([largest for _, largest in found], share.item()))
    return shares


class Layer(NamedTuple):
    """Queries (seq, n_heads, head_dim), keys (seq, kv_heads, head_dim), ALiBi's slopes and the scale."""

    query: torch.Tensor
    key: torch.Tensor
    slopes: torch.Tensor
    scale: float


def fresh_layer(network: MPTConfig, seq: int) -> list[Layer]:
    """The first layer with fresh weights, of random tokens."""
    attention = replace(network.attn_config, attn_impl="torch")
    net = MPT(replace(network, n_layers=1, max_seq_len=seq, attn_config=attention), seed=17)
    net.transformer.blocks[0].ffn = torch.nn.Identity()  # nobody needs its result
    return layers_of(
        net, torch.randint(network.vocab_size, (1, seq), generator=torch.Generator().manual_seed(0))
    )


def trained_layers(model: str, text: str) -> list[Layer]:
    """All layers of a model, of the first `max_seq_len` tokens of a text."""
    from mptfoundry.checkpoints.reading import load_network

    net, tokenizer = load_network(model, device="cpu", dtype=torch.float32, attn_impl="torch")
    ids = tokenizer(text, truncation=True, max_length=net.config.max_seq_len)["input_ids"]
    return layers_of(net, torch.tensor([ids]))


def layers_of(net: Any, ids: torch.Tensor) -> list[Layer]:
    seen = []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Any) -> torch.Tensor:
        if context.slopes is None:
            raise SystemExit("error: the model has no ALiBi, so that no block is skipped.")
        seen.append(Layer(query[0], key[0], context.slopes, context.scale))
        if len(seen) == len(net.transformer.blocks):
            return query  # nobody needs the last layer's result, which takes minutes for a long row
        return attend(query, key, value, context)

    attend = attention_torch.attend
    with torch.no_grad(), patch.object(attention_torch, "attend", watched):
        net.eval().transformer(ids, None, None, None)
    return seen


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
