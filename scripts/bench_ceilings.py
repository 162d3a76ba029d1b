"""Measure what a GPU can do at most, to state the results of a training step against.

    python scripts/bench_ceilings.py [config=configs/mpt-7b.yaml] [batch=8] [key=value ...] [lines=true]

In bf16, on random data: a large matrix product, a large copy, and the bare replay of the matrix products of a
step of `config` with `batch` rows, forward and backward, without anything in between. Medians of CUDA events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.plan.devices import detect_device

SIDE, COPIED = 16_384, 2**32
REPEATS = 5


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
    seconds, flops = replay(config.model.network(), tokens)
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


def replay(config: MPTConfig, tokens: int) -> tuple[float, float]:
    """Seconds and FLOPs of the step's matrix products: those of one block, times the blocks, and the loss."""
    width, heads = config.d_model, config.n_heads * config.d_head
    ups = 2 if config.ffn_config.ffn_type == "mptglu" else 1
    shapes = [(width, heads + 2 * config.kv_heads * config.d_head), (heads, width)]
    shapes += [(width, config.d_ffn)] * ups + [(config.d_ffn, width)]
    block = sum(_three_products(tokens, *shape) for shape in shapes)
    seconds = config.n_layers * block + _three_products(tokens, width, config.vocab_size)
    numbers = config.n_layers * sum(a * b for a, b in shapes) + width * config.vocab_size
    return seconds, 6.0 * tokens * numbers


def _three_products(tokens: int, inputs: int, outputs: int) -> float:
    """Seconds of a linear layer's forward and of both products of its backward, for 16k tokens at once."""
    rows = min(tokens, 16_384)
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        x @ weight.T
        grad @ weight
        grad.T @ x

    return median_seconds(products) * tokens / rows


def median_seconds(work: Callable[[], object]) -> float:
    for _ in range(2):
        work()
    stamps = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    stamps[0].record()
    for stamp in stamps[1:]:
        work()
        stamp.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairwise(stamps)) / 1000


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
