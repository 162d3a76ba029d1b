"""Attention's backends against the full-bias formula and PyTorch's own kernel, forward and backward.

    python scripts/bench_attention.py [seq=512,2048] [batch=1] [heads=8] [head_dim=64] [repeats=7]
        [documents=8] [out=FILE.json]

Medians over random data, all contestants in turn within each repeat, float32 on a CPU and bf16 on a GPU. The
last columns say how many times faster each is than the full-bias formula of the same case.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from mptfoundry.mpt.attention import BACKENDS
from mptfoundry.mpt.backends import choose_backend, why_not
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.position import AttentionContext, alibi_slopes

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FORMULA = "full-bias formula"


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    print(f"{torch.cuda.get_device_name() if on_gpu else cpu_name()}, torch {torch.__version__}", end=", ")
    print(f"{torch.get_num_threads()} threads" if not on_gpu else "bf16")
    titles = ("seq", "case", "contestant", "fwd ms", "fwd+bwd ms", "x fwd", "x both")
    print("{:>6} {:<16} {:<22} {:>9} {:>11} {:>6} {:>6}".format(*titles))
    rows = []
    for seq in map(int, options.get("seq", "2048,8192" if on_gpu else "512,2048").split(",")):
        shape = (
            int(options.get("batch", "1")),
            seq,
            int(options.get("heads", "8")),
            int(options.get("head_dim", "64")),
        )
        for case in ("causal", "alibi", "alibi, packed"):
            documents = int(options.get("documents", "8")) if case == "alibi, packed" else 1
            contestants = contestants_of(shape, case != "causal", documents, device)
            for row in measure(contestants, shape, device, int(options.get("repeats", "7"))):
                rows.append({"device": device, "seq": seq, "case": case, **row})
                print(
                    f"{seq:>6} {case:<16} {row['contestant']:<22} {row['forward_ms']:>9.2f} "
                    f"{row['both_ms']:>11.2f} {row['forward_ratio']:>6.2f} {row['both_ratio']:>6.2f}"
                )
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def contestants_of(
    shape: tuple[int, int, int, int], has_alibi: bool, documents: int, device: str
) -> dict[str, Attend]:
    """Functions of query, key and value, each (batch, seq, heads, head_dim), by name."""
    batch, seq, heads, head_dim = shape
    scale = head_dim**-0.5
    slopes = alibi_slopes(heads, 8, device) if has_alibi else None
    numbers = (torch.arange(seq, device=device) * documents // seq).expand(batch, seq)
    places = torch.arange(seq, device=device)
    hidden = (places > places[:, None]) | (numbers[0] != numbers[0, :, None])
    bias = torch.zeros(heads, seq, seq, device=device)
    if slopes is not None:
        bias += slopes[:, None, None] * (places - places[:, None])
    masked = bias.masked_fill(hidden, -torch.inf)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT * scale + bias).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masked[None].to(q.dtype)).transpose(1, 2)

    def ceiling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ours(name: str) -> Attend:
        # A new context each time: what it derives is part of a training step, too.
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            context = AttentionContext(scale, slopes, numbers if documents > 1 else None)
            return BACKENDS[name].attend(q, k, v, context)

        return attend

    config = MPTConfig(
        d_model=heads * head_dim, n_heads=heads, n_layers=1, attn_config=AttnConfig(alibi=has_alibi)
    )
    dtype = "bfloat16" if device == "cuda" else "float32"
    able = [name for name in BACKENDS if why_not(name, config, device, dtype) is None]
    default, _ = choose_backend(config, device, dtype)
    mine = {f"ours, {name}{' (auto)' if name == default else ''}": ours(name) for name in able}
    return {FORMULA: formula, "SDPA, bias tensor": kernel, "SDPA, causal, no bias": ceiling, **mine}


def measure(
    contestants: dict[str, Attend], shape: tuple[int, int, int, int], device: str, repeats: int
) -> list[dict[str, object]]:
    """Median milliseconds of each, and how many times faster than the formula."""
    batch, seq, heads, head_dim = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    fused = torch.randn(batch, seq, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, seq, heads, head_dim, device=device, dtype=dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, attend in contestants.items():
            started_at = now(device)
            out = attend(*fused.unbind(2))
            middle = now(device)
            torch.autograd.grad(out, fused, grad)
            if turn:
                times[name].append((middle - started_at, now(device) - started_at))
    medians = {
        name: [1000 * statistics.median(pair[place] for pair in pairs) for place in (0, 1)]
        for name, pairs in times.items()
    }
    return [
        {
            "contestant": name,
            "forward_ms": forward,
            "both_ms": both,
            "forward_ratio": medians[FORMULA][0] / forward,
            "both_ratio": medians[FORMULA][1] / both,
        }
        for name, (forward, both) in medians.items()
    ]


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
