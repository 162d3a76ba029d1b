"""Which parts of which blocks are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mptfoundry.config.model import ModelConfig
from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.run.changes import makes_the_run

EVERY = frozenset(range(8))


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (None, {"block": EVERY}),
        ((), {"block": EVERY}),
        ("MPTBlock", {"block": EVERY}),
        (("grouped_query_attention", "mptmlp"), {"attention": EVERY, "mlp": EVERY}),
        ({"low_precision_layernorm": "first-2", "norm": (7,)}, {"norm": {0, 1, 7}}),
        (("norm", "ffn_act_fn"), {"norm": EVERY, "act_fn": EVERY}),
        ({"block": 3}, {"block": {0, 1, 2}}),
        ({"block": "last-2, first-1"}, {"block": {0, 6, 7}}),
        ({"block": "middle-3"}, {"block": {2, 3, 4}}),
        ({"block": "range-2-4"}, {"block": {2, 3}}),
        ({"block": "every-3"}, {"block": {0, 3, 6}}),
        ({"block": (0, "every-4"), "attention": (1,)}, {"block": {0, 4}, "attention": {1}}),
    ],
)
def test_a_target_names_parts_and_blocks(target: Any, parts: dict[str, set[int]]) -> None:
    assert recomputed_parts(target, 8) == parts


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("blok", "'blok' is not a part. Use block"),
        ("norm_attn_norm", "is not a part"),
        ({"block": "first-9"}, r"'first-9' is not within the blocks 0 to 7"),
        ({"block": (8,)}, "8 is not within the blocks"),
        ({"block": "range-4-2"}, "is not within"),
        ({"block": "every-0"}, "is not within"),
        ({"block": "second-2"}, "is not a choice of blocks. Use first-N"),
        ({"block": ()}, "names no blocks"),
        ({"block": "first-4", "mlp": (3,)}, "block 3 is recomputed whole, its mlp with it"),
        ({"block": "first-4", "act_fn": (3,)}, "block 3 is recomputed whole, its act_fn with it"),
        (
            {"mlp": "last-2", "act_fn": "first-7"},
            "the mlp of block 6 is recomputed whole, its act_fn with it",
        ),
    ],
)
def test_a_target_that_the_model_does_not_have_is_refused(target: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig(
            d_model=32,
            n_heads=4,
            n_layers=8,
            max_seq_len=32,
            vocab_size=64,
            activation_checkpointing_target=target,
        )


def test_a_run_may_go_on_with_another_target(load: Callable[..., Any]) -> None:
    assert not makes_the_run("model.activation_checkpointing_target.block", load())
    assert makes_the_run("model.n_layers", load())
