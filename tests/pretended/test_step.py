"""What a step moves and launches on a GPU, for each parameter, token and layer: no size changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

D_MODEL, ROWS, SEQ = 256, 2, 128
SMALL = [f"model.d_model={D_MODEL}", "model.n_heads=2", "model.vocab_size=512", f"max_seq_len={SEQ}"]
SMALL += [f"global_train_batch_size={ROWS}", f"device_train_microbatch_size={ROWS}"]
COMPILED = "compile_config={}"
# The config shards its checkpoints, so it has FSDP also on a single device, unless this says otherwise.
WITHOUT_FSDP = "fsdp_config.state_dict_type=full"
# Steps with matrices that stay in bfloat16.
UNCAST = {"bf16 weights", "bf16 momentum", "int8 momentum", "compiled"}
# What a stored momentum saves of the 20 bytes; in 8 bits, 64 numbers share a scale in float32.
SAVED = {"bf16 momentum": 4, "int8 momentum": 2 * (3 - 4 / 64)}
Step = dict[str, Any]


def case(n_layers: int, *words: str, residual: str | None = None) -> dict[str, Any]:
    words = (*SMALL, f"model.n_layers={n_layers}", *words)
    return {"config": "configs/mpt-7b.yaml", "words": words, "residual": residual}


@pytest.fixture(scope="module")
def steps(start: Callable[..., Any]) -> dict[str, tuple[Step, Step]]:
    """For each kind, a step with one layer and one with two."""
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "float32 residual": {"residual": "float32"}}
    words: dict[str, tuple[str, ...]] = {
        "unfused": ("optimizer.fused=false", "model.loss_fn=torch_crossentropy"),
        "bf16 weights": (WITHOUT_FSDP,),
        "bf16 momentum": (WITHOUT_FSDP, "optimizer.momentum_dtype=bfloat16"),
        "int8 momentum": (WITHOUT_FSDP, "optimizer.momentum_dtype=int8"),
    }
    if hasattr(TorchDispatchMode, "ignore_compile_internals"):
        words["compiled"] = (WITHOUT_FSDP, COMPILED)
    cases = [case(n, **options) for options in kinds.values() for n in (1, 2)]
    cases += [case(n, *some) for some in words.values() for n in (1, 2)]
    results = iter(start("step.py", json.dumps(cases)))
    return {name: (next(results), next(results)) for name in [*kinds, *words]}


def total(step: Step, key: str, *parts: str) -> int:
    return sum(each[key] for each in step["operators"] if not parts or each["part"] in parts)


def of_a_layer(steps: tuple[Step, Step], key: str, *parts: str) -> int:
    return total(steps[1], key, *parts) - total(steps[0], key, *parts)


def layer_parameters(steps: tuple[Step, Step]) -> int:
    return steps[1]["parameters"] - steps[0]["parameters"]


def test_the_optimizer_moves_so_many_bytes_for_a_parameter(steps: dict[str, tuple[Step, Step]]) -> None:
    for name, pair in steps.items():
        optimizer, clipping = (52, 12) if name == "unfused" else (20, 2 if name in UNCAST else 4)
        optimizer -= SAVED.get(name, 0)
        for part, expected in (("optimizer", optimizer), ("clipping", clipping)):
            moved = of_a_layer(pair, "bytes", part) / layer_parameters(pair)
            assert moved == pytest.approx(expected, rel=0.01), name


def test_weights_and_their_gradients_are_cast_once_or_not_at_all(steps: dict[str, tuple[Step, Step]]) -> None:
    for name in steps.keys() - {"float32 residual"}:
        casts = of_a_layer(steps[name], "bytes", "casts and copies") / layer_parameters(steps[name])
        # float32 to bfloat16 and back: 4 + 2 bytes each.
        assert casts < (0.1 if name in UNCAST else 12.1), name


def test_a_layer_moves_so_many_bytes_of_a_tokens_features(steps: dict[str, tuple[Step, Step]]) -> None:
    moved = {
        name: of_a_layer(pair, "bytes", "elementwise and norms", "casts and copies")
        for name, pair in steps.items()
    }
    weights = {name: 0 if name in UNCAST else 12 * layer_parameters(steps["plain"]) for name in steps}
    features = {name: (each - weights[name]) / (ROWS * SEQ * D_MODEL) for name, each in moved.items()}
    # A norm (4 there, 8 back), one with the sum before it (8 there, 8 back; the residual stream's gradient is
    # added in both), a sum (6) and GELU (16 there, 24 back). The scales' gradients by program are the rest.
    assert features["plain"] < 77 and features["bf16 weights"] < 77, features
    assert features["float32 residual"] > 1.2 * features["plain"], features
    assert features.get("compiled", 0) < 77, features


def test_the_loss_reads_its_logits_twice_and_writes_them_once(steps: dict[str, tuple[Step, Step]]) -> None:
    tokens, vocab = ROWS * SEQ, 512
    for name, (step, _) in steps.items():
        # bfloat16 logits; the matrix is cast, and its float32 gradient scaled; the hidden states' is scaled.
        expected = 6 * tokens * vocab + 14 * vocab * D_MODEL + 4 * tokens * D_MODEL
        is_fused = total(step, "bytes", "loss") == pytest.approx(expected, rel=0.02)
        assert is_fused == (name != "unfused"), name


def test_a_layer_launches_so_many_kernels(steps: dict[str, tuple[Step, Step]]) -> None:
    launches = {name: of_a_layer(pair, "launches") for name, pair in steps.items()}
    # Of these the optimizer launches one for each of the six parameters.
    assert launches["plain"] <= 42 and launches["bf16 weights"] <= 34, launches
    assert launches.get("compiled", 0) <= 30, launches


def test_a_step_multiplies_what_its_formula_says(steps: dict[str, tuple[Step, Step]]) -> None:
    for step in (step for pair in steps.values() for step in pair):
        needed = step["causal_flops_per_token"] * step["tokens"]
        assert total(step, "flops") == pytest.approx(needed, rel=0.02)
