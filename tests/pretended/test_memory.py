"""The plan's estimate of memory against the peak of a step on the pretended GPU, in widths of MPT-7B."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.pretended.conftest import LOOKS_AT_ALL

RECOMPUTED = "fsdp_config.activation_checkpointing=true"
TARGET = "model.activation_checkpointing_target"
GATED = "model.ffn_config.ffn_type=mptglu"
LONG = ("max_seq_len=65536", "model.attn_config.clip_qkv=6")
# Rows of a step and of a microbatch, and the words of the config.
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (8, 8, ()),
    "two microbatches": (2, 1, ()),
    "blocks": (8, 8, (RECOMPUTED,)),
    "norm": (8, 8, (RECOMPUTED, f"{TARGET}=norm")),
    "norm, act_fn": (8, 8, (RECOMPUTED, f"{TARGET}=[norm,act_fn]")),
    "65k": (1, 1, (RECOMPUTED, *LONG)),
}
MORE: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "act_fn": (8, 8, (RECOMPUTED, f"{TARGET}=act_fn")),
    "gated": (8, 8, (GATED,)),
    "gated, act_fn": (8, 8, (RECOMPUTED, f"{TARGET}=act_fn", GATED)),
    "mlp": (8, 8, (RECOMPUTED, f"{TARGET}=mlp")),
    "attention": (8, 8, (RECOMPUTED, f"{TARGET}=attention")),
    "every second block": (8, 8, (RECOMPUTED, f"{TARGET}={{block: every-2}}")),
    "7b": (8, 8, ("model.n_layers=32",)),
    "7b, norm, act_fn": (8, 8, ("model.n_layers=32", RECOMPUTED, f"{TARGET}=[norm,act_fn]")),
    "7b, blocks": (8, 8, ("model.n_layers=32", RECOMPUTED)),
}
if LOOKS_AT_ALL:
    CASES |= MORE


def case(rows: int, microbatch: int, words: tuple[str, ...]) -> dict[str, Any]:
    own = [
        "model.n_layers=4",
        "fsdp_config.state_dict_type=full",
        f"global_train_batch_size={rows}",
    ]
    return {"config": "configs/mpt-7b.yaml", "words": [*own, *words], "microbatch": microbatch}


@pytest.fixture(scope="module")
def found(start: Callable[..., Any]) -> dict[str, Any]:
    results = start("memory.py", json.dumps([case(*each) for each in CASES.values()]))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_five_percent_of_the_peak(name: str, found: dict[str, Any]) -> None:
    assert found[name]["estimated"] == pytest.approx(found[name]["peak"], rel=0.05), found[name]


def test_recomputing_saves_memory_and_never_costs_any(found: dict[str, Any]) -> None:
    peaks = {name: result["peak"] for name, result in found.items()}
    assert peaks["plain"] > peaks["norm"] > peaks["norm, act_fn"] > peaks["blocks"]
