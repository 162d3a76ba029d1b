"""Compare the attention backends with the full-bias formula and PyTorch's own kernels, forward and backward.

    python scripts/bench_attention.py [seq=512,2048] [head_dim=64] [heads=8] [batch=1] [documents=8]
        [repeats=7] [seconds=140] [check=true] [out=FILE.json] [lines=true]

It runs in float32 on a CPU, in bf16 on a GPU. The GPU's default is 2k, 8k and 65k tokens of width 2048 in
heads of 128 and of 64, with enough rows for 32k tokens. Before timing, each contestant is compared with the
formula in float64 at a small size: the error of outputs and gradients must be at most twice that of the plain
formula in the same dtype (`no bias`: compared with the formula without ALiBi and documents; these are upper
limits). Times are medians over random data, with contestants interleaved within each repeat. The `x` columns
are speedups over the first contestant of the case. TFLOP/s count the pairs of tokens that see each other, and
are omitted where blocks are skipped.

GPU times come from a queue that always has work, so they exclude Python. What all layers share (the bounds of
documents) is computed before; on a CPU it is computed each time. No case starts after `seconds`. With
`check=true` the contestants are compared with the formula, and not timed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import seconds_between, stamp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mptfoundry.mpt.attention import BACKENDS
from mptfoundry.mpt.backends import choose_backend, why_not
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.position import AttentionContext, alibi_slopes
from mptfoundry.plan.devices import cpu_name

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FORMULA = "full-bias formula"
CPU = {"seq": "512,2048", "head_dim": "64", "heads": "8", "batch": "1"}
GPU = {"seq": "2048,8192,65536", "head_dim": "128,64", "heads": "", "batch": ""}
GPU_WIDTH, GPU_TOKENS = 2048, 32768
LARGEST_BIAS = 2**33  # bytes
SMALL = 384


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed: rows of several documents or of one, which the backend is told of or not."""

    name: str
    batch: int
    seq: int
    heads: int
    head_dim: int
    device: str
    alibi: bool = True
    documents: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def numbers(self) -> torch.Tensor:
        """(seq) the number of each token's document, all of about the same length."""
        return torch.arange(self.seq, device=self.device) * max(1, self.documents) // self.seq

    @property
    def flops(self) -> int:
        """Of forward; backward has two and a half times as many."""
        pairs = sum(n * (n + 1) // 2 for n in torch.bincount(self.numbers).tolist())
        return 4 * self.batch * self.heads * self.head_dim * pairs


def main(words: list[str]) -> int:
    from words import tell

    options = dict(word.split("=", 1) for word in words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.monotonic() + float(options.get("seconds", "140" if device == "cuda" else "inf"))
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "bf16" if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {threads}")
    titles = ("seq", "dim", "case", "contestant", "fwd ms", "fwd+bwd ms", "x fwd", "x both", "TFLOP/s", "bwd")
    print("{:>6} {:>4} {:<20} {:<24} {:>9} {:>11} {:>6} {:>6} {:>8} {:>5}".format(*titles))
    rows: list[dict[str, Any]] = []
    for case in cases(options, device):
        if time.monotonic() > deadline:
            print(f"{case.seq:>6} {case.head_dim:>4} {case.name:<20} left out: no time left")
            continue
        contestants = {}
        for name, attend in contestants_of(case).items():
            reason = why_wrong(name, case)
            if options.get("check") == "true":
                tell(options, case=case.name, head_dim=case.head_dim, contestant=name, wrong=reason)
                print(f"{case.head_dim:>4} {case.name:<20} {name:<24} {reason or 'as exact as the formula'}")
            elif reason is None:
                contestants[name] = attend
            else:
                print(f"{case.seq:>6} {case.head_dim:>4} {case.name:<20} {name:<24} left out: {reason}")
        if not contestants:
            continue
        for row in measure(contestants, case, int(options.get("repeats", "7"))):
            rows.append({"device": device, **dataclasses.asdict(case), "case": case.name, **row})
            print(line(rows[-1]), flush=True)
            tell(options, compared_with=next(iter(contestants)), **rows[-1])
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    wrong = sorted({name for (name, *_), reason in _reasons.items() if reason and name.startswith("ours")})
    if wrong:
        print(f"error: {', '.join(wrong)} did not pass the check against the formula.", file=sys.stderr)
    return 1 if wrong else 0


def cases(options: dict[str, str], device: str) -> Iterator[Case]:
    chosen = (GPU if device == "cuda" else CPU) | options
    documents = int(options.get("documents", "8"))
    for head_dim in map(int, chosen["head_dim"].split(",")):
        for seq in map(int, chosen["seq"].split(",")):
            batch = int(chosen["batch"] or max(1, GPU_TOKENS // seq))
            shape = (batch, seq, int(chosen["heads"] or GPU_WIDTH // head_dim), head_dim, device)
            yield Case("causal", *shape, alibi=False)
            yield Case("alibi", *shape)
            if device == "cuda":
                yield Case("alibi, 1 document", *shape, documents=1)
            yield Case("alibi, packed", *shape, documents=documents)


def contestants_of(case: Case) -> dict[str, Attend]:
    """Functions of query, key and value, each (batch, seq, heads, head_dim), by name; the yardstick first."""
    mine = our_backends(case)
    if case.documents == 1:
        return mine
    bias_is_small = case.heads * case.seq**2 * 2 <= LARGEST_BIAS
    others: dict[str, Attend] = {}
    if case.device == "cpu":
        others[FORMULA] = formula(case)
    elif case.alibi:
        others["FlexAttention"] = flex(case)
    if case.device == "cpu" or not case.alibi:
        for name, backend in sdpa_backends(case).items():
            others[f"SDPA, {name}, no bias"] = sdpa(None, backend)
    if bias_is_small and (case.alibi or case.device == "cpu"):
        bias, hidden = bias_of(case)
        others["SDPA, bias tensor"] = sdpa(bias.masked_fill_(hidden, -torch.inf)[None].to(case.dtype), None)
    return others | mine


def our_backends(case: Case) -> dict[str, Attend]:
    slopes = alibi_slopes(case.heads, 8, case.device) if case.alibi else None
    documents = case.numbers.expand(case.batch, case.seq) if case.documents else None
    context = AttentionContext(case.head_dim**-0.5, slopes, documents, max_documents=max(1, case.documents))

    def ours(name: str, skips: bool) -> Attend:
        shared = dataclasses.replace(context, skips=skips, _made={})

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = shared if case.device == "cuda" else dataclasses.replace(shared, _made={})
            return BACKENDS[name].attend(q, k, v, own)

        return attend

    width = case.heads * case.head_dim
    config = MPTConfig(
        d_model=width, n_heads=case.heads, n_layers=1, attn_config=AttnConfig(alibi=case.alibi)
    )
    dtype = str(case.dtype).removeprefix("torch.")
    default, _ = choose_backend(config, case.device, dtype)
    found: dict[str, Attend] = {}
    for name in BACKENDS:
        # PyTorch alone needs seconds for a long row on a GPU.
        if why_not(name, config, case.device, dtype) or (
            name == "torch" and case.device == "cuda" and case.seq > 8192
        ):
            continue
        can_skip = name == "triton" and case.alibi
        found[f"ours, {name}{' (auto)' if name == default else ''}"] = ours(name, True)
        if can_skip:
            found[f"ours, {name}, no skips"] = ours(name, False)
    return found


def formula(case: Case, dtype: torch.dtype | None = None) -> Attend:
    """The plain formula with its (heads, seq, seq) of bias, in the case's dtype or another."""
    bias, hidden = bias_of(case)
    bias = bias.to(dtype or bias.dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.to(dtype or x.dtype).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT * case.head_dim**-0.5 + bias).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    return attend


def bias_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, seq, seq) float32, and (seq, seq) where a token does not see another."""
    places, numbers = torch.arange(case.seq, device=case.device), case.numbers
    hidden = (places > places[:, None]) | (numbers != numbers[:, None])
    slopes = alibi_slopes(case.heads, 8, case.device) * case.alibi
    return slopes[:, None, None] * (places - places[:, None]), hidden


def sdpa_backends(case: Case) -> dict[str, SDPBackend | None]:
    if case.device == "cpu":
        return {"causal": None}
    return {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def sdpa(mask: torch.Tensor | None, backend: SDPBackend | None) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)

    return attend


def flex(case: Case) -> Attend:
    """FlexAttention, compiled for this shape, ALiBi as its score_mod and documents in its block mask."""
    slopes, numbers = alibi_slopes(case.heads, 8, case.device), case.numbers

    def bias(score: Any, b: Any, head: Any, query: Any, key: Any) -> Any:
        return score + slopes[head] * (key - query)

    def visible(b: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (numbers[query] == numbers[key])

    mask = create_block_mask(visible, None, None, case.seq, case.seq, device=case.device)
    torch._dynamo.reset()  # it falls back to slow code after eight shapes
    compiled = torch.compile(flex_attention, dynamic=False) if case.device == "cuda" else flex_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Any = compiled(q, k, v, score_mod=bias, block_mask=mask, scale=case.head_dim**-0.5)
        return out.transpose(1, 2)

    return attend


_reasons: dict[tuple[str, str, int], str | None] = {}


def why_wrong(name: str, case: Case) -> str | None:
    """Why a contestant of a case is not the formula, asked once for all sizes; None if it is."""
    if (name, case.name, case.head_dim) not in _reasons:
        small = dataclasses.replace(case, batch=2, seq=SMALL)
        if name.endswith("no bias"):
            small = dataclasses.replace(small, alibi=False, documents=0)
        _reasons[name, case.name, case.head_dim] = _compare(name, small)
    return _reasons[name, case.name, case.head_dim]


def _compare(name: str, case: Case) -> str | None:
    inputs, grad = draw(case)

    def distances(attend: Attend, truth: list[torch.Tensor] | None = None) -> list[Any]:
        out = attend(*inputs)
        found = [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
        found = [x.detach().double() for x in found]
        return found if truth is None else [(x - y).norm().item() for x, y in zip(found, truth, strict=True)]

    truth = distances(formula(case, torch.float64))
    allowed = distances(formula(case), truth)
    try:
        found = distances(contestants_of(case)[name], truth)
    except Exception as error:  # Triton's and the compiler's are of no common class
        return " ".join(str(error).split())[:100]
    ratio = max(x / y for x, y in zip(found, allowed, strict=True))
    return f"{ratio:.1f} times as far from float64 as the plain formula" if not ratio <= 2 else None


def draw(case: Case) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Query, key and value as parts of one fused matrix, and a gradient of the output."""
    shape = (case.batch, case.seq, case.heads, case.head_dim)
    fused = torch.randn(*shape[:2], 3, *shape[2:], device=case.device, dtype=case.dtype)
    inputs = tuple(part.requires_grad_() for part in fused.unbind(2))
    return inputs, torch.randn(shape, device=case.device, dtype=case.dtype)


def measure(contestants: dict[str, Attend], case: Case, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of each, how many times faster than the first, and TFLOP/s."""
    inputs, grad = draw(case)
    stamps: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, attend in contestants.items():
            if case.device == "cuda":
                torch.cuda._sleep(2_000_000)  # a millisecond in which Python gets ahead
            started_at = stamp(case.device)
            out = attend(*inputs)
            middle = stamp(case.device)
            torch.autograd.grad(out, inputs, grad)
            if turn:
                stamps[name].append((started_at, middle, stamp(case.device)))
    if case.device == "cuda":
        torch.cuda.synchronize()
    medians = {
        name: [statistics.median(1000 * seconds_between(s[0], s[end]) for s in all_stamps) for end in (1, 2)]
        for name, all_stamps in stamps.items()
    }
    first = next(iter(medians.values()))
    rows = []
    for name, (forward, both) in medians.items():
        skips = name.startswith("ours, triton") and case.alibi and "no skips" not in name
        rows.append(
            {
                "contestant": name,
                "forward_ms": forward,
                "both_ms": both,
                "forward_ratio": first[0] / forward,
                "both_ratio": first[1] / both,
                "forward_tflops": None if skips else case.flops / forward / 1e9,
                "backward_tflops": None if skips else 2.5 * case.flops / (both - forward) / 1e9,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    tflops = [f"{x:.3g}" if x else "-" for x in (row["forward_tflops"], row["backward_tflops"])]
    return (
        f"{row['seq']:>6} {row['head_dim']:>4} {row['case']:<20} {row['contestant']:<24} "
        f"{row['forward_ms']:>9.2f} {row['both_ms']:>11.2f} {row['forward_ratio']:>6.2f} "
        f"{row['both_ratio']:>6.2f} {tflops[0]:>8} {tflops[1]:>5}"
    )


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
