"""Compare greedy generation with a cache: our network and transformers' own MPT classes, same weights.

    python scripts/bench_generate.py [batch=1,8] [prompt=128] [new=64] [d_model=512] [layers=8] [heads=8]
        [vocab=8192] [repeats=7] [out=FILE.json]

Weights are random, in float32. Each contestant runs its own `generate`, interleaved; the ids must be equal.
Results are medians over the repeats: the prompt's time and the time per further token, in milliseconds, and
their ratios within each repeat.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MptConfig, MptForCausalLM

from mptfoundry.generation import generate
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.plan.devices import detect_device

DEFAULTS = {"prompt": 128, "new": 64, "d_model": 512, "layers": 8, "heads": 8, "vocab": 8192, "repeats": 7}
Continue = Callable[[torch.Tensor, int], torch.Tensor]


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    number = {key: int(options.get(key, default)) for key, default in DEFAULTS.items()}
    print(f"{detect_device(world_size=1).name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    contestants = make_contestants(number)
    rows = []
    print(f"{'batch':>5}  {'':<14} {'prompt ms':>10} {'ms/token':>10} {'tokens/s':>10}")
    for batch in map(int, options.get("batch", "1,8").split(",")):
        measured = measure(contestants, batch, number)
        for name, turns in measured.items():
            prompt_ms, token_ms = medians(turns)
            row = {"batch": batch, "contestant": name, "prompt_ms": prompt_ms, "token_ms": token_ms}
            rows.append(row)
            speed = 1000 * batch / token_ms
            print(f"{batch:>5}  {name:<14} {prompt_ms:>10.1f} {token_ms:>10.2f} {speed:>10.1f}")
        pairs = zip(*measured.values(), strict=True)
        ratios = medians([(theirs[0] / ours[0], theirs[1] / ours[1]) for ours, theirs in pairs])
        print("{:>5}  {:<14} {:>10.2f} {:>10.2f}".format(batch, "ratio", *ratios), flush=True)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def make_contestants(number: dict[str, int]) -> dict[str, Continue]:
    """Functions of prompt ids (batch, seq) and a number of new tokens, by name, over the same weights."""
    length = number["prompt"] + number["new"]
    config = MPTConfig(
        d_model=number["d_model"],
        n_heads=number["heads"],
        n_layers=number["layers"],
        max_seq_len=length,
        vocab_size=number["vocab"],
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )
    network = MPT(config, seed=1).eval()
    theirs: Any = MptForCausalLM(  # type: ignore[attr-defined]
        MptConfig(
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            max_seq_len=length,
            vocab_size=config.vocab_size,
        )
    ).eval()
    theirs.load_state_dict(network.state_dict(), strict=False)

    def stock(ids: torch.Tensor, new: int) -> torch.Tensor:
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )

    return {"mptfoundry": lambda ids, new: generate(network, ids, max_new_tokens=new), "transformers": stock}


def measure(
    contestants: dict[str, Continue], batch: int, number: dict[str, int]
) -> dict[str, list[tuple[float, float]]]:
    """Each turn's milliseconds of the prompt with its first token, and of each further token."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(number["vocab"], (batch, number["prompt"]), generator=generator)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(number["repeats"] + 1):
        outs = []
        for name, run in contestants.items():
            first, _ = seconds(run, ids, 1)
            whole, out = seconds(run, ids, number["new"])
            outs.append(out)
            if turn:
                times[name].append((1000 * first, 1000 * (whole - first) / (number["new"] - 1)))
        assert torch.equal(*outs), "the contestants gave different tokens"
    return times


def medians(turns: list[tuple[float, float]]) -> tuple[float, float]:
    first, further = zip(*turns, strict=True)
    return statistics.median(first), statistics.median(further)


def seconds(run: Continue, ids: torch.Tensor, new: int) -> tuple[float, torch.Tensor]:
    started_at = time.perf_counter()
    out = run(ids, new)
    return time.perf_counter() - started_at, out


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
