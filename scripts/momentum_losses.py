"""Train small models with LION's momentum in float32, bfloat16 and int8; print the means of the last losses.

    python scripts/momentum_losses.py [text=mptfoundry] [steps=250] [seeds=1,2,3]

Each model (d_model 64, 2 layers, float32) reads 8 rows of 128 bytes in each step, from the Python files below
`text`. With a seed both start with the same weights and read the same rows.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mptfoundry.mpt.config import AttnConfig, MPTConfig  # noqa: E402
from mptfoundry.mpt.network import MPT  # noqa: E402
from mptfoundry.optim.lion import DecoupledLionW  # noqa: E402

ROWS, SEQ, LAST, LR, WARMUP = 8, 128, 50, 1e-3, 25


def main(words: list[str]) -> None:
    options = {"text": str(ROOT / "mptfoundry"), "steps": "250", "seeds": "1,2,3"}
    options |= dict(word.split("=", 1) for word in words)
    files = sorted(Path(options["text"]).rglob("*.py"))
    text = torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))
    print(f"{len(text):,} bytes; means of the last {LAST} losses")
    print("| seed | float32 | bfloat16 | difference | int8 | difference |\n|---:|---:|---:|---:|---:|---:|")
    for seed in map(int, options["seeds"].split(",")):
        plain, *others = (
            mean_loss(text, seed, int(options["steps"]), dtype)
            for dtype in (None, torch.bfloat16, torch.int8)
        )
        shown = " | ".join(f"{other:.4f} | {other - plain:+.4f}" for other in others)
        print(f"| {seed} | {plain:.4f} | {shown} |", flush=True)


def mean_loss(text: torch.Tensor, seed: int, steps: int, dtype: torch.dtype | None) -> float:
    """The mean of the last losses of a model that is trained along a warmup and a cosine."""
    attention = AttnConfig(alibi=True, attn_impl="torch")
    config = MPTConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=SEQ, vocab_size=256, attn_config=attention
    )
    net = MPT(config, seed=seed).train()
    optimizer = DecoupledLionW(net.parameters(), lr=LR, weight_decay=1e-4, momentum_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - SEQ, (ROWS,), generator=generator).tolist()
        ids = torch.stack([text[start : start + SEQ] for start in starts])
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP) * cosine
        loss = net(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / len(losses[-LAST:])


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
