from __future__ import annotations

from typing import Any

import pytest

from mptfoundry.mpt.config import MPTConfig, from_values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"expansion_ratio": -4}, "expansion_ratio: -4 is not positive. Use a positive number."),
        (
            {"init_config": {"emb_init_uniform_lim": ["a", 1]}},
            "init_config.emb_init_uniform_lim: ['a', 1]. Allowed: float, tuple, null.",
        ),
        (
            {"ffn_config": {"ffn_act_fn": {"name": "relu", "approximate": "tanh"}}},
            "approximate: only gelu takes it, not relu. Remove it.",
        ),
        ({"norm_eps": -1e-5}, "norm_eps: -1e-05 is not positive. Use a positive number."),
        ({"ffn_config": {"ffn_hidden_size": 0}}, "ffn_hidden_size: 0 is not positive. Use 1 or more."),
        (
            {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 0}},
            "kv_n_heads: 0 is not positive. Use 1 or more.",
        ),
        (
            {"attn_config": {"alibi": True, "alibi_bias_max": -8}},
            "alibi_bias_max: -8 is not positive. Use 1 or more.",
        ),
        ({"attn_config": {"rope_theta": 0}}, "rope_theta: 0 is not positive. Use a positive number."),
        (
            {"final_logit_softcapping": 0},
            "final_logit_softcapping: 0 is not positive. Use a positive number, or null for none.",
        ),
    ],
)
def test_what_no_network_can_have_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_values(MPTConfig, values)
    assert str(caught.value) == said
