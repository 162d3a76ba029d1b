"""Quantize the matrices of an adapter's base model to 8 or 4 bits with bitsandbytes.

They are quantized from the weights as loaded, and are not trainable.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mptfoundry.errors import ConfigError


def quantize_blocks(network: Any, bits: Literal[8, 4], dtype: torch.dtype) -> None:
    """Quantize the matrices of an MPT's blocks, in place: LLM.int8() (https://arxiv.org/abs/2208.07339), or
    NF4 (https://arxiv.org/abs/2305.14314).

    Args:
        network: On the CPU, with its weights; it gets the attribute `is_loaded_in_{bits}bit`, for peft.
        bits: 8 or 4.
        dtype: The compute dtype of matrix products.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"model.load_in_{bits}bit: needs the package bitsandbytes. Install it: "
            "pip install 'mptfoundry[bitsandbytes]'."
        ) from error
    for block in network.transformer.blocks:
        for parent in (block.attn, block.ffn):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, _quantized(linear, bits, dtype, bitsandbytes.nn))
    setattr(network, f"is_loaded_in_{bits}bit", True)


def _quantized(linear: nn.Linear, bits: Literal[8, 4], dtype: torch.dtype, kinds: Any) -> nn.Module:
    bias = linear.bias is not None
    if bits == 4:
        made = kinds.Linear4bit(
            linear.in_features, linear.out_features, bias=bias, compute_dtype=dtype, quant_type="nf4"
        )
        # On some CPUs, evaluation would round the weights' scales, and training would continue with those.
        made.support_avx512bf16_for_cpu = False
        made.weight = kinds.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        made = kinds.Linear8bitLt(linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False)
        made.weight = kinds.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to(linear.weight.device)  # type: ignore[no-any-return]
