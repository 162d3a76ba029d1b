"""transformers' own MPT saves a folder; the network that is read from it computes the same logits.

The yardstick is transformers' own rounding in float32, around logits in float64: the network read from the
folder may be at most twice as far from them. Its own float64 is the truth, since transformers computes its
softmax in float32 whatever the model's number format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.reading import load_network
from mptfoundry.mpt.network import MPT, KVCache
from tests.mpt.reference import assert_as_exact, rms

ROWS, TOKENS, VOCABULARY = 2, 24, 97


def saved(folder: Path, n_heads: int = 4, **attention: Any) -> Any:
    """A small model with weights large enough that nothing is near zero, and its folder."""
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(
        d_model=n_heads * 8,
        n_heads=n_heads,
        n_layers=2,
        vocab_size=VOCABULARY,
        max_seq_len=32,
        initializer_range=0.2,
        attn_config=attention,
    )
    torch.manual_seed(n_heads)
    theirs = MptForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    return theirs


def batch() -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def assert_at_rounding(found: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    assert rms(truth) > 0.1
    assert rms(theirs - truth) < 1e-4 * rms(truth)
    assert_as_exact([found], [theirs], [truth])


@torch.no_grad()
def logits_of(
    folder: Path, ids: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32 and in float64."""
    network, _ = load_network(folder)
    return network(ids, attention_mask=mask).logits, network.double()(ids, attention_mask=mask).logits


@pytest.mark.parametrize("n_heads", [12, 32, 64])
def test_slopes_of_any_number_of_heads_agree(tmp_path: Path, n_heads: int) -> None:
    theirs = saved(tmp_path, n_heads)
    found, truth = logits_of(tmp_path, batch(), None)
    assert_at_rounding(found, theirs(batch()).logits, truth)


@pytest.mark.parametrize(
    "attention", [{"clip_qkv": 0.5}, {"softmax_scale": 0.9}, {"clip_qkv": 1.0, "softmax_scale": 0.1}]
)
def test_clipping_that_binds_and_another_scale_agree(tmp_path: Path, attention: dict[str, float]) -> None:
    theirs = saved(tmp_path / "changed", **attention)
    plain = saved(tmp_path / "plain")
    found, truth = logits_of(tmp_path / "changed", batch(), None)
    assert_at_rounding(found, theirs(batch()).logits, truth)
    assert rms(plain(batch()).logits - truth) > 0.01 * rms(truth)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_agrees(tmp_path: Path, side: str) -> None:
    theirs = saved(tmp_path)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = False
    found, truth = logits_of(tmp_path, batch(), mask)
    theirs_logits = theirs(batch(), attention_mask=mask.long()).logits
    assert_at_rounding(found[mask], theirs_logits[mask], truth[mask])


@pytest.mark.parametrize("side", [None, "left"])
@torch.no_grad()
def test_token_by_token_with_a_cache_agrees(tmp_path: Path, side: str | None) -> None:
    theirs = saved(tmp_path, n_heads=12)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    if side == "left":
        mask[1, :7] = False
    found = step_by_step(load_network(tmp_path)[0], mask)
    past, pieces = None, []
    for t in range(TOKENS):
        output = theirs(
            batch()[:, t : t + 1],
            attention_mask=mask[:, : t + 1].long(),
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        pieces.append(output.logits)
    truth = step_by_step(load_network(tmp_path)[0].double(), mask)
    assert_at_rounding(found[mask], torch.cat(pieces, 1)[mask], truth[mask])
    whole, _ = logits_of(tmp_path, batch(), mask)
    assert_at_rounding(found[mask], whole[mask], truth[mask])


def step_by_step(network: MPT, mask: torch.Tensor) -> torch.Tensor:
    """Logits of each token, which sees the others through the cache."""
    dtype = network.transformer.wte.weight.dtype
    cache = KVCache(network.config, ROWS, TOKENS, device="cpu", dtype=dtype)
    steps = [
        network(batch()[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits
        for t in range(TOKENS)
    ]
    return torch.cat(steps, 1)
