from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from mptfoundry.mpt.config import AttnConfig, MPTConfig, RotaryScalingConfig
from mptfoundry.mpt.position import (
    AttentionContext,
    alibi_slopes,
    count_positions,
    number_documents,
    rotary_tables,
    rotate,
)


@pytest.mark.parametrize("n_heads", [1, 4, 12, 32, 56, 64])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_slopes_equal_those_of_transformers(n_heads: int, bias_max: int) -> None:
    distances = build_mpt_alibi_tensor(n_heads, 2, alibi_bias_max=bias_max)
    assert torch.equal(alibi_slopes(n_heads, bias_max), -distances[:, 0, 0])


def test_slopes_of_six_heads_by_hand() -> None:
    assert alibi_slopes(6, 8).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_documents_are_numbered_along_the_row_and_padding_is_none() -> None:
    sequence_id = torch.tensor([[7, 7, 7, 2, 2, 9], [0, 0, 0, 0, 1, 1]])
    mask = torch.tensor([[True] * 5 + [False], [False, *[True] * 5]])
    assert number_documents(None, None) is None
    assert number_documents(None, sequence_id).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
    assert number_documents(mask, None).tolist() == [[0, 0, 0, 0, 0, -1], [-1, 0, 0, 0, 0, 0]]
    assert number_documents(mask, sequence_id).tolist() == [[0, 0, 0, 1, 1, -1], [-1, 0, 0, 0, 1, 1]]


def test_positions_count_the_real_tokens_of_a_document() -> None:
    documents = torch.tensor([[-1, -1, 0, 0, 0], [0, 0, 0, -1, -1], [0, 0, 1, 1, 1], [0, -1, 0, 0, 0]])
    positions = count_positions(documents, 0, 5, torch.device("cpu"))
    assert positions[0, 2:].tolist() == [0, 1, 2]
    assert positions[1, :3].tolist() == [0, 1, 2]
    assert positions[2].tolist() == [0, 1, 0, 1, 2]
    assert positions[3, [0, 2, 3, 4]].tolist() == [0, 1, 2, 3]
    assert (positions >= 0).all()
    assert count_positions(documents, 3, 2, torch.device("cpu")).tolist() == positions[:, 3:].tolist()
    assert count_positions(None, 3, 2, torch.device("cpu")).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    "scaling", [("no_scaling", 1.0, "default"), ("linear", 2.0, "linear"), ("dynamic", 2.0, "dynamic")]
)
@pytest.mark.parametrize("length", [10, 100])
def test_rotary_positions_equal_those_of_transformers(scaling: tuple[str, float, str], length: int) -> None:
    name, factor, theirs = scaling
    attn = AttnConfig(
        rope=True,
        rope_theta=500.0,
        rope_impl="hf",
        rope_hf_config=RotaryScalingConfig(type=name, factor=factor),  # type: ignore[arg-type]
    )
    config = MPTConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=40, attn_config=attn)
    llama = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=40,
        rope_theta=500.0,
        rope_scaling={"rope_type": theirs, "factor": factor},
    )
    query, key = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16)
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(llama)(query, positions)
    expected = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    tables = rotary_tables(config, positions, length)
    for x, turned in zip((query, key), expected, strict=True):
        torch.testing.assert_close(rotate(x, tables), turned, atol=1e-4, rtol=1e-4)


def test_dail_knows_no_scaling() -> None:
    scaled = AttnConfig(rope=True, rope_hf_config=RotaryScalingConfig(type="linear", factor=4))
    plain = AttnConfig(rope=True)
    tables = [
        rotary_tables(
            MPTConfig(d_model=32, n_heads=2, n_layers=1, attn_config=attn), torch.arange(9)[None], 9
        )
        for attn in (scaled, plain)
    ]
    assert torch.equal(tables[0][0], tables[1][0])


def test_a_context_makes_a_thing_once() -> None:
    context, made = AttentionContext(scale=1.0), []
    for _ in range(3):
        assert context.once("thing", lambda: made.append(1) or "thing") == "thing"
    assert made == [1]
