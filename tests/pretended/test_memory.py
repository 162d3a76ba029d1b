"""The plan's estimate of memory against the peak of a step on the pretended GPU, in widths of MPT-7B."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

RECOMPUTED = "fsdp_config.activation_checkpointing=true"
TARGET = "model.activation_checkpointing_target"
LONG = ("max_seq_len=65536", "model.attn_config.clip_qkv=6")
# Rows of a step and of a microbatch, and the words of the config.
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (8, 8, ()),
    "two microbatches": (2, 1, ()),
    "blocks": (8, 8, (RECOMPUTED,)),
    "mlp": (8, 8, (RECOMPUTED, f"{TARGET}=mlp")),
    "attention": (8, 8, (RECOMPUTED, f"{TARGET}=attention")),
    "norm": (8, 8, (RECOMPUTED, f"{TARGET}=norm")),
    "65k": (1, 1, (RECOMPUTED, *LONG)),
}


def case(rows: int, microbatch: int, words: tuple[str, ...], n_layers: int = 4) -> dict[str, Any]:
    own = [
        f"model.n_layers={n_layers}",
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
    assert peaks["plain"] > peaks["attention"] > peaks["mlp"] > peaks["blocks"]
    assert peaks["norm"] <= peaks["plain"]
