"""The bytes that a forward keeps for backward, exactly: each tensor that autograd saves.

They are those of float32 on a CPU with the `torch` backend and layernorms, for models with ALiBi or learned
positions; `plan/memory.py` estimates all models, and leaves out the statistics of norms and attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import attention_activations, block_activations, ffn_activations

FP32, INT64 = 4, 8
# Mean and inverse deviation of a norm's rows.
NORM_STATISTICS = 2


def kept_bytes(
    network: MPTConfig, tokens: int, recomputed: Mapping[str, frozenset[int]] | None = None
) -> int:
    """Bytes that a forward over so many tokens keeps, its weights not included.

    Args:
        network: The architecture.
        tokens: Tokens of the microbatch.
        recomputed: The blocks of each part that backward computes again: `recomputed_parts` of the config.
    """
    statistics = 2 * NORM_STATISTICS
    block = FP32 * (block_activations(network) + statistics + network.n_heads)
    saved = {
        "block": block - FP32 * network.d_model,
        "attention": FP32 * (attention_activations(network) + network.n_heads),
        "mlp": FP32 * ffn_activations(network),
        "norm": FP32 * 2 * network.d_model,  # the outputs
    }
    # The ids, the last norm's input and statistics, and the count of the tokens in the loss.
    around = INT64 + FP32 * (network.d_model + NORM_STATISTICS)
    if network.has_learned_positions:
        around += FP32
    per_token = network.n_layers * block + around
    per_token -= sum(saved[part] * len(blocks) for part, blocks in (recomputed or {}).items())
    return tokens * per_token + INT64
