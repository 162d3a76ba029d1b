"""Measure what a GPU can do at most, to state the results of a training step against.

    python scripts/bench_ceilings.py [config=configs/mpt-7b.yaml] [batch=8] [key=value ...] [lines=true]

In bf16, on random data: a large matrix product, a large copy, and the bare replay of the matrix products of a
step of `config` with `batch` rows, forward and backward, without anything in between. Medians of CUDA events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from timing import seconds_between, stamp
from torch.nn import functional as F

from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.plan.devices import detect_device

SIDE, COPIED = 16_384, 2**32
REPEATS = 5
LARGEST = 16_384  # tokens of a product; more are several


def main(words: list[str]) -> int:
    from words import tell

    options = dict(word.split("=", 1) for word in words)
    path, batch = options.get("config", "configs/mpt-7b.yaml"), int(options.get("batch", "8"))
    if not torch.cuda.is_available():
        print("error: no GPU found here. Run this on a machine with one.", file=sys.stderr)
        return 1
    own = ("config", "batch", "lines")
    config, _ = load_train_config(path, [word for word in words if word.split("=")[0] not in own])
    peak = detect_device(world_size=1).peak_flops
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(partial(torch.mm, a, b))
    product = 2 * SIDE**3 / seconds
    with_peak = f"the vendor's dense bf16 peak, {peak / 1e12 if peak else float('nan'):.1f} TFLOP/s"
    rows = [{"what": f"product of {SIDE} x {SIDE}", "tflops": product / 1e12, "compared_with": with_peak}]
    source = torch.empty(COPIED, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source))
    rows.append(
        {"what": "copy", "tb_per_second": 2 * COPIED / seconds / 1e12, "compared_with": "bytes moved"}
    )
    del a, b, source, target
    tokens = batch * config.max_seq_len
    pieces = pieces_of(config.model.network(), batch, config.max_seq_len, "cuda")[:-1]
    seconds = seconds_of(pieces, "cuda")
    flops = sum(piece.times * piece.flops for piece in pieces)
    rows.append(
        {
            "what": f"products of a step of {batch} x {config.max_seq_len}",
            "milliseconds": 1000 * seconds,
            "tflops": flops / seconds / 1e12,
            "tokens_per_second": tokens / seconds,
            "compared_with": f"the large product, {product / 1e12:.0f} TFLOP/s",
        }
    )
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
            )
        )
        tell(options, **row)
    return 0


@dataclass(frozen=True)
class Piece:
    """Something that a step computes, as often as it computes it: a whole number of times, or a fraction."""

    name: str
    times: float
    flops: float
    work: Callable[[], object]


def pieces_of(config: MPTConfig, rows: int, seq: int, device: str) -> list[Piece]:
    """The matrix products of a step and plain causal attention, forward and backward, in any order.

    Nothing is allocated while they run. They are in bf16 on a GPU, in float32 on a CPU.
    """
    width, heads = config.d_model, config.n_heads * config.d_head
    ups = 2 if config.ffn_config.ffn_type == "mptglu" else 1
    shapes = {
        "Wqkv": (width, heads + 2 * config.kv_heads * config.d_head),
        "out_proj": (heads, width),
        **{f"up_proj {number}": (width, config.d_ffn) for number in range(ups)},
        "down_proj": (config.d_ffn, width),
    }
    tokens = rows * seq
    pieces = [_products(name, config.n_layers, tokens, *shape, device) for name, shape in shapes.items()]
    at_once = max(16, 2**23 // config.vocab_size) if device == "cpu" else LARGEST
    pieces.append(_products("logits", 1, tokens, width, config.vocab_size, device, at_once))
    shape = (rows, config.n_heads, seq, config.d_head)
    q, k, v, grad = (_draw(*shape, device=device) for _ in range(4))
    inputs = [each.requires_grad_() for each in (q, k, v)]

    def attention() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, grad)

    flops = 7 * rows * config.n_heads * seq * seq * config.d_head
    return [*pieces, Piece("attention", config.n_layers, flops, attention)]


def seconds_of(pieces: Iterable[Piece], device: str, repeats: int = REPEATS) -> float:
    """Seconds of all pieces, each as often as it occurs, from its median over `repeats`."""
    return sum(piece.times * median_seconds(piece.work, device, repeats) for piece in pieces)


def _products(
    name: str, layers: int, tokens: int, inputs: int, outputs: int, device: str, at_once: int = LARGEST
) -> Piece:
    """A linear layer's forward and both products of its backward."""
    rows = min(tokens, at_once)
    x, weight, grad = (
        _draw(*shape, device=device) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    out, x_grad, weight_grad = (torch.empty_like(each) for each in (grad, x, weight))

    def products() -> None:
        torch.mm(x, weight.T, out=out)
        torch.mm(grad, weight, out=x_grad)
        torch.mm(grad.T, x, out=weight_grad)

    return Piece(name, layers * tokens / rows, 6.0 * rows * inputs * outputs, products)


def _draw(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def median_seconds(work: Callable[[], object], device: str = "cuda", repeats: int = REPEATS) -> float:
    if device == "cuda":
        for _ in range(2):
            work()
    stamps = [stamp(device)]
    for _ in range(repeats):
        work()
        stamps.append(stamp(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return statistics.median(seconds_between(start, stop) for start, stop in pairwise(stamps))


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
