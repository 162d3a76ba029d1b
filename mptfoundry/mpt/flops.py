"""Count a network's parameters, FLOPs and activations from its config alone.

Shared parameters (tied embeddings) count once. A multiply-add is two FLOPs. Training is forward plus
backward, and backward costs twice the forward. Recomputation in activation checkpointing doesn't count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .config import MPTConfig
from .head_config import HeadConfig


def parameter_shapes(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of the network of `config`; shared ones appear once."""
    block = _block_shapes(config)
    blocks = {
        f"transformer.blocks.{layer}.{name}": shape
        for layer in range(config.n_layers)
        for name, shape in block.items()
    }
    return _shapes_around_blocks(config) | blocks


def count_parameters(config: MPTConfig) -> int:
    """The exact number of parameters of the network of `config`."""
    return _numbers(_shapes_around_blocks(config)) + config.n_layers * block_parameters(config)


def block_parameters(config: MPTConfig) -> int:
    """The number of parameters of one block: two norms, the attention and the feed-forward network."""
    return _numbers(_block_shapes(config))


def flops_per_token(config: MPTConfig, seq_len: int, *, causal: bool) -> int:
    """FLOPs of training on one token of a sequence of `seq_len` tokens.

    6 per parameter, and 12 per attention feature and layer for each key that the token attends to: PaLM's
    convention (https://arxiv.org/abs/2204.02311, appendix B). An untied embedding is only a lookup, so it
    doesn't count.

    Args:
        config: The architecture.
        seq_len: Tokens of a sequence.
        causal: False: each token attends to all `seq_len` keys (or a whole window), the convention of
            published MFU. True: only to keys up to itself, the arithmetic that is really needed.
    """
    is_multiplied_too = config.tie_word_embeddings and not isinstance(config, HeadConfig)
    multiplied = count_parameters(config) - (0 if is_multiplied_too else config.vocab_size * config.d_model)
    window = config.attn_config.sliding_window_size
    keys = seq_len if window < 0 else min(seq_len, window + 1)
    attention = 12 * config.n_layers * config.n_heads * config.d_head * keys
    if causal:
        attention = attention * (2 * seq_len - keys) // (2 * seq_len)
    return 6 * multiplied + attention


def block_activations(config: MPTConfig) -> int:
    """Numbers per token that a block's forward saves for backward, with fused attention: the inputs of the
    norms and matrices, the queries, keys and values, and the input and output of the nonlinearity.
    """
    return 4 * config.d_model + attention_activations(config) + ffn_activations(config)


def attention_activations(config: MPTConfig) -> int:
    """The attention's share of these, without its input."""
    heads = config.n_heads * config.d_head
    qkv = heads + 2 * config.kv_heads * config.d_head
    attn = config.attn_config
    versions_of_qkv = 1 + (attn.clip_qkv is not None) + (attn.qk_ln or attn.qk_gn) + attn.rope
    return versions_of_qkv * qkv + heads


def ffn_activations(config: MPTConfig) -> int:
    """The feed-forward network's share of these, without its input."""
    return (4 if config.ffn_config.ffn_type == "mptglu" else 2) * config.d_ffn


def act_fn_activations(config: MPTConfig) -> int:
    """The part of these that is computed from the rest: the activation function's output, and gated, the
    product.
    """
    return ffn_activations(config) // 2


def _shapes_around_blocks(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    tokens = (config.vocab_size, config.d_model)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": tokens}
    if config.has_learned_positions:
        shapes["transformer.wpe.weight"] = (config.max_seq_len, config.d_model)
    shapes |= _norm("transformer.norm_f", config.d_model, config)
    if isinstance(config, HeadConfig):
        return shapes | _linear(config.head, config.d_model, config.outputs, config.has_bias)
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": tokens}


def _block_shapes(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's parameters."""
    queries, keys = config.n_heads * config.d_head, config.kv_heads * config.d_head
    attn, bias = config.attn_config, not config.no_bias
    shapes = _norm("norm_1", config.d_model, config)
    shapes |= _linear("attn.Wqkv", config.d_model, queries + 2 * keys, config.has_qkv_bias)
    if attn.qk_ln or attn.qk_gn:
        shapes |= _norm("attn.q_ln", config.d_head if attn.qk_gn else queries, config)
        shapes |= _norm("attn.k_ln", config.d_head if attn.qk_gn else keys, config)
    shapes |= _linear("attn.out_proj", queries, config.d_model, bias)
    shapes |= _norm("norm_2", config.d_model, config)
    shapes |= _linear("ffn.up_proj", config.d_model, config.d_ffn, bias)
    shapes |= _linear("ffn.down_proj", config.d_ffn, config.d_model, bias)
    if config.ffn_config.ffn_type == "mptglu":
        shapes |= _linear("ffn.gate_proj", config.d_model, config.d_ffn, bias)
    return shapes


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _linear(name: str, features_in: int, features_out: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (features_out, features_in)}
    return weight | ({f"{name}.bias": (features_out,)} if bias else {})


def _norm(name: str, features: int, config: MPTConfig) -> dict[str, tuple[int, ...]]:
    has_bias = config.norm_type.endswith("layernorm") and not config.no_bias
    return {f"{name}.{leaf}": (features,) for leaf in ("weight", "bias")[: 1 + has_bias]}
