"""Train a run's model on random tokens, and say where the time goes, next to what others take for the same.

    python scripts/bench_train.py CONFIG [steps=5] [repeats=5] [peers=true] [key=value ...] [out=FILE.json]
        [picture=FILE.png] [lines=true]

The step is the run's own: model, optimizer, clipping, precision, global batch and microbatch, on one device,
without a loader. It prints tokens per second first, both MFUs if the device's peak is known, and peak memory.
Parts are of one more step, whose operators are timed one by one, so that they add up to a little more than a
step; compiled kernels are in none of them. With their bytes and FLOPs they say what the device reached.

Peers are measured in the same run: the bare matrix products, and attention of all layers by each backend of
ours, by PyTorch's SDPA without ALiBi (a limit) and with a bias tensor, and on a GPU by FlexAttention with
ALiBi. A peer that can't run here is left out with its reason.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_attention import Attend, Case, contestants_of, flex, sdpa, sdpa_backends
from bench_attention import measure as measure_attention
from bench_ceilings import seconds_of
from bench_step import Work, measure_work
from operators import PARTS, Operator, Recorder
from timing import seconds_between, stamp

from mptfoundry.config.load import load_train_config
from mptfoundry.plan.devices import detect_device
from mptfoundry.plan.plan import COMPUTE_DTYPE, make_plan

OWN = {"steps": "5", "repeats": "5", "peers": "true", "out": "", "picture": "", "lines": ""}


def main(words: list[str]) -> int:
    from words import tell

    if not words or "=" in words[0]:
        print("error: give the config first: python scripts/bench_train.py CONFIG", file=sys.stderr)
        return 2
    options = dict(word.split("=", 1) for word in words[1:])
    own = OWN | options
    overrides = [f"{key}={value}" for key, value in options.items() if key not in OWN]
    work = work_of(words[0], overrides)
    step = measure_work(work, int(own["steps"]))
    step = {"microbatch": work.microbatch, "precision": str(work.dtype or torch.float32)[6:], **step}
    step.setdefault("peak GiB", round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))
    parts = measure_parts(work)
    peers = measure_peers(work, int(own["repeats"])) if own["peers"] == "true" else []
    for key, value in step.items():
        print(f"  {key:45} {value}")
    print("\n".join(["", *table(parts), "", *(f"  {name:45} {ms:10.1f} ms" for name, ms in peers)]))
    tell(own, **step)
    for part in parts:
        tell(own, compared_with="the step", **part)
    for name, milliseconds in peers:
        tell(own, peer=name, milliseconds=milliseconds, compared_with="the same part of the step")
    if own["out"]:
        result = {"step": step, "parts": parts, "peers": dict(peers)}
        Path(own["out"]).write_text(json.dumps(result, indent=1) + "\n")
    if own["picture"]:
        draw(step, parts, dict(peers), Path(own["picture"]))
    return 0


def work_of(path: str, overrides: list[str]) -> Work:
    """The run's step on this device, as its plan says."""
    config, _ = load_train_config(path, overrides)
    device = detect_device(world_size=1)
    plan = make_plan(config, device)
    dtype = None if plan.precision == "fp32" else getattr(torch, COMPUTE_DTYPE[plan.precision])
    kind = "cuda" if device.kind == "gpu" else "cpu"
    microbatch = plan.device_train_microbatch_size
    rows = -(-config.global_train_batch_size // microbatch) * microbatch
    return Work(config, kind, rows, microbatch, dtype)


def measure_parts(work: Work) -> list[dict[str, Any]]:
    """Milliseconds, bytes and FLOPs of each part of a step, and what the device reached in it."""
    network, optimizer, ids = work.start()
    work.train(network, optimizer, ids, lambda part: None)
    recorder = Recorder(partial(stamp, work.kind))
    with recorder:
        work.train(network, optimizer, ids, partial(setattr, recorder, "phase"))
    if work.kind == "cuda":
        torch.cuda.synchronize()
    rows = []
    for part in PARTS:
        operators = [operator for operator in recorder.operators if operator.part == part]
        seconds = sum(map(_seconds, operators))
        moved, flops = (sum(getattr(each, key) for each in operators) for key in ("bytes", "flops"))
        rows.append(
            {
                "part": part,
                "milliseconds": 1000 * seconds,
                "operators": len(operators),
                "gflops": flops / 1e9,
                "gbytes": moved / 1e9,
                "gflops_per_second": flops / 1e9 / seconds if seconds else 0.0,
                "gbytes_per_second": moved / 1e9 / seconds if seconds else 0.0,
            }
        )
    return rows


def _seconds(operator: Operator) -> float:
    assert operator.moments is not None
    return seconds_between(*operator.moments)


def measure_peers(work: Work, repeats: int) -> list[tuple[str, float]]:
    """Names and milliseconds a step of the bare matrix products, and of attention by each contestant."""
    network, attn = work.config.model.network(), work.config.model.network().attn_config
    pieces = work.pieces
    peers = [("bare matrix products", 1000 * seconds_of(pieces[:-1], work.kind, repeats))]
    del pieces
    sizes = (work.microbatch, work.config.max_seq_len, network.n_heads, network.d_head)
    case = Case("alibi" if attn.alibi else "causal", *sizes, work.kind, alibi=attn.alibi)
    times = network.n_layers * work.rows / work.microbatch
    for name, attend in attention_of(case).items():
        try:
            row = measure_attention({name: attend}, case, repeats)[0]
        except Exception as error:  # Triton's and the compiler's are of no common class
            print(f"  attention, {name}: left out: {' '.join(str(error).split())[:100]}", file=sys.stderr)
            continue
        peers.append((f"attention, {name}", times * row["both_ms"]))
    return peers


def attention_of(case: Case) -> Mapping[str, Attend]:
    """Our backends and their peers; on a CPU FlexAttention has no backward, and Triton is interpreted."""
    peers = dict(contestants_of(case))
    for name, backend in sdpa_backends(case).items():
        peers.setdefault(f"SDPA, {name}, no bias", sdpa(None, backend))
    if case.device == "cuda":
        return {"FlexAttention": flex(case)} | peers
    return {name: attend for name, attend in peers.items() if "triton" not in name}


def table(parts: list[dict[str, Any]]) -> list[str]:
    total = sum(part["milliseconds"] for part in parts)
    lines = [f"  {'part':24} {'ms':>9} {'share':>6} {'operators':>9} {'GFLOP/s':>10} {'GB/s':>8}"]
    for part in parts:
        lines.append(
            f"  {part['part']:24} {part['milliseconds']:9.1f} {part['milliseconds'] / total:6.1%} "
            f"{part['operators']:9,} {part['gflops_per_second']:10,.0f} {part['gbytes_per_second']:8,.0f}"
        )
    return lines


def draw(step: dict[str, Any], parts: list[dict[str, Any]], peers: dict[str, float], path: Path) -> None:
    """The step by part, and its peers below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2 + 0.3 * len(peers)), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for part in parts:
        axes.barh(["step, by operator"], [part["milliseconds"]], left=left, label=part["part"])
        left += part["milliseconds"]
    for name, milliseconds in peers.items():
        axes.barh([name], [milliseconds], color="gray")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    axes.set_title(f"{step['device']}: {step['tokens per second']:,} tokens/s", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
