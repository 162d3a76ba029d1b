"""Networks and a training on the backends `torch` and `triton`: the same numbers, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.generation import generate
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train

from .cases import DEVICE
from .reference import assert_as_exact, assert_gradients_as_exact

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("triton_runs")]

SHAPE: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mpt": {},
    "clipped, scaled": {"clip_qkv": 0.5, "softmax_scale": 0.4},
    "grouped queries, qk_ln, window": {
        "qk_ln": True,
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
        "sliding_window_size": 9,
    },
    "one key head, rotary, softcap": {
        "alibi": False,
        "rope": True,
        "attn_type": "multiquery_attention",
        "attn_logit_softcapping": 3.0,
    },
}
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)
MIXED = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=pytest.mark.soak if name in ("mpt", "clipped, scaled") else [])
        for name in ARCHITECTURES
    ],
)


def network(backend: str, dtype: torch.dtype = torch.float32, **attention: Any) -> MPT:
    """A network with the weights of its architecture's, whatever the backend."""
    attn_config = AttnConfig(**{"alibi": True, "attn_impl": backend, **attention})
    return MPT(MPTConfig(**SHAPE, no_bias=True, attn_config=attn_config), seed=1).eval().to(DEVICE, dtype)


def tokens(batch: int = 2, seq: int = 40) -> torch.Tensor:
    return torch.randint(101, (batch, seq), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def shifted(ids: torch.Tensor, lengths: list[int], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which the first ``lengths`` tokens are moved beside padding, and their attention mask."""
    rows, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(ids.shape[1] - length, None) if left else slice(0, length)
        rows[row, place], mask[row, place] = ids[row, :length], True
    return rows, mask


@MIXED
def test_logits_and_gradients_are_the_same(architecture: str) -> None:
    ids, attention = tokens(), ARCHITECTURES[architecture]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 33:] = False
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        made = network(backend, dtype, **attention)
        with torch.no_grad():
            logits = made(ids, attention_mask=mask).logits[mask]
        made.train()(ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss.backward()
        results.append((logits, [x.grad for x in made.parameters()]))
    logits, gradients = zip(*results, strict=True)
    assert_as_exact(*([x] for x in logits))
    assert_gradients_as_exact(*gradients)


@BOTH
@MIXED
def test_padding_on_either_side_changes_nothing(backend: str, architecture: str) -> None:
    attention, ids, lengths = ARCHITECTURES[architecture], tokens(3), [40, 33, 7]
    made, exact = network(backend, **attention), network("torch", torch.float64, **attention)
    with torch.no_grad():
        alone = [made(ids[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        truth = [exact(ids[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        for left in (True, False):
            rows, mask = shifted(ids, lengths, left)
            assert_as_exact(
                [made(rows, attention_mask=mask).logits[mask]], [torch.cat(alone)], [torch.cat(truth)]
            )


@BOTH
@MIXED
def test_packed_documents_equal_the_same_documents_alone(backend: str, architecture: str) -> None:
    attention, ids = ARCHITECTURES[architecture], tokens(1, 48)
    made, exact = network(backend, **attention), network("torch", torch.float64, **attention)
    lengths = [16, 5, 27]
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None].to(DEVICE)
    with torch.no_grad():
        packed = made(ids, sequence_id=numbers).logits
        alone = torch.cat([made(part).logits for part in ids.split(lengths, 1)], 1)
        truth = torch.cat([exact(part).logits for part in ids.split(lengths, 1)], 1)
    assert_as_exact([packed], [alone], [truth])


@MIXED
def test_the_same_tokens_are_generated(architecture: str) -> None:
    rows, mask = shifted(tokens(2, 20), [20, 7], left=True)
    some, others = (
        generate(network(backend, **ARCHITECTURES[architecture]), rows, max_new_tokens=6, attention_mask=mask)
        for backend in ("triton", "torch")
    )
    assert torch.equal(some, others)


CONFIG = """
max_seq_len: 32
model: {{name: mpt_causal_lm, d_model: 64, n_heads: 2, n_layers: 1, vocab_size: 384, no_bias: true,
  attn_config: {{alibi: true}}}}
tokenizer: {{name: {folder}/tokenizer}}
train_loader: {{name: text, dataset: {{local: {folder}/a, split: train}}}}
optimizer: {{name: decoupled_adamw, lr: 3e-3}}
scheduler: {{name: constant_with_warmup, t_warmup: 1ba}}
max_duration: 5ba
precision: fp32
global_train_batch_size: 4
save_folder: {folder}/runs/{{run_name}}
save_interval: 5ba
log_to_console: false
"""


def test_a_training_has_the_same_losses(shards: Path) -> None:
    (shards / "backends.yaml").write_text(CONFIG.format(folder=shards))
    losses = {}
    for backend in ("torch", "triton"):
        words = [f"run_name={backend}", f"model.attn_config.attn_impl={backend}"]
        train(load_train_config(shards / "backends.yaml", words)[0])
        rows = read_rows(shards / "runs" / backend / "metrics.jsonl")
        losses[backend] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses["torch"]) == 5 and losses["torch"][-1] < losses["torch"][0] - 0.3
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-6)
