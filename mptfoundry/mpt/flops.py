"""How many parameters, FLOPs and activations a network has, from its config alone.

Words: parameters are counted once when shared (tied embeddings). FLOPs are floating-point operations, a
multiply-add is two; training is forward plus backward, which costs twice the forward. Recomputation by
activation checkpointing is not counted: it is work, not progress.
"""

from __future__ import annotations

from .config import MPTConfig
from .head_config import HeadConfig


def count_parameters(config: MPTConfig) -> int:
    """The number of parameters of the network of `config`, exactly."""
    return (
        _embedding(config)
        + (config.max_seq_len * config.d_model if config.has_learned_positions else 0)
        + config.n_layers * block_parameters(config)
        + _norm(config, config.d_model)
        + _output(config)
    )


def block_parameters(config: MPTConfig) -> int:
    """The number of parameters of one block: two norms, the attention and the feed-forward network."""
    return 2 * _norm(config, config.d_model) + _attention(config) + _ffn(config)


def flops_per_token(config: MPTConfig, seq_len: int, *, causal: bool) -> int:
    """FLOPs of training on one token of a sequence of `seq_len` tokens.

    6 for each parameter, and 12 for each feature of each layer's attention and each key that the token
    meets: the convention of PaLM (https://arxiv.org/abs/2204.02311, appendix B). An embedding that makes no
    logits is only looked up, so it's left out.

    Args:
        config: The architecture.
        seq_len: Tokens of a sequence.
        causal: False: each token meets all `seq_len` keys (or a whole window), the convention in which
            MFU is published. True: only those up to itself, the arithmetic really needed.
    """
    is_multiplied_too = config.tie_word_embeddings and not isinstance(config, HeadConfig)
    multiplied = count_parameters(config) - (0 if is_multiplied_too else _embedding(config))
    window = config.attn_config.sliding_window_size
    keys = seq_len if window < 0 else min(seq_len, window + 1)
    attention = 12 * config.n_layers * config.n_heads * config.d_head * keys
    if causal:
        attention = attention * (2 * seq_len - keys) // (2 * seq_len)
    return 6 * multiplied + attention


def block_activations(config: MPTConfig) -> int:
    """Numbers for each token that a block's forward keeps for its backward, attention being a fused kernel:
    what goes into the norms and matrices, the queries, keys and values, and both sides of the nonlinearity.
    """
    return 4 * config.d_model + attention_activations(config) + ffn_activations(config)


def attention_activations(config: MPTConfig) -> int:
    """Of these, what the attention keeps beside its input."""
    heads = config.n_heads * config.d_head
    qkv = heads + 2 * config.kv_heads * config.d_head
    attn = config.attn_config
    copies_of_qkv = 1 + (attn.clip_qkv is not None) + (attn.qk_ln or attn.qk_gn) + attn.rope
    return copies_of_qkv * qkv + heads


def ffn_activations(config: MPTConfig) -> int:
    """Of these, what the feed-forward network keeps beside its input."""
    return (4 if config.ffn_config.ffn_type == "mptglu" else 2) * config.d_ffn


def _embedding(config: MPTConfig) -> int:
    return config.vocab_size * config.d_model


def _output(config: MPTConfig) -> int:
    if isinstance(config, HeadConfig):
        return config.head_parameters
    return 0 if config.tie_word_embeddings else _embedding(config)


def _attention(config: MPTConfig) -> int:
    queries = config.n_heads * config.d_head
    keys = config.kv_heads * config.d_head
    count = _linear(config.d_model, queries + 2 * keys, config.has_qkv_bias)
    count += _linear(queries, config.d_model, not config.no_bias)
    if config.attn_config.qk_ln:
        count += _norm(config, queries) + _norm(config, keys)
    if config.attn_config.qk_gn:
        count += 2 * _norm(config, config.d_head)
    return count


def _ffn(config: MPTConfig) -> int:
    bias = not config.no_bias
    into = 2 if config.ffn_config.ffn_type == "mptglu" else 1
    return into * _linear(config.d_model, config.d_ffn, bias) + _linear(config.d_ffn, config.d_model, bias)


def _linear(features_in: int, features_out: int, bias: bool) -> int:
    return features_in * features_out + (features_out if bias else 0)


def _norm(config: MPTConfig, features: int) -> int:
    has_bias = config.norm_type.endswith("layernorm") and not config.no_bias
    return features * (2 if has_bias else 1)
