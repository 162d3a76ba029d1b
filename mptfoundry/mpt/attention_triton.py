"""The attention backend with our own FlashAttention kernels in Triton; see attention_kernels.py.

Queries, keys and values are read by their strides, without copies, and the gradient of a fused projection is
written as one tensor. Attention is a custom operator with its own backward, so that compilation, activation
checkpointing and FLOP counters see one node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .attention_tiles import Tile, keys_of_decoding, padded, tile_of
from .position import PADDING, AttentionContext

try:
    import triton

    from .attention_kernels import (
        backward_key_kernel,
        backward_query_kernel,
        decode_kernel,
        forward_kernel,
        join_kernel,
    )
except ImportError:  # why_not in backends.py reports this first
    triton = None

_LOG2_E = math.log2(math.e)
_MOST_DECODING_ROWS = 64

# An exported folder's copy of this file registers its own operators, separate from the installed package's.
_NAMESPACE = re.sub(r"\W", "_", __package__ or "mpt")

_OPTIONS = (
    "Tensor? slopes, Tensor? codes, Tensor? bounds, Tensor? seed, float scale, int window, float softcap, "
    "float dropout, bool has_prefix, bool skips"
)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Attend from (batch, seq, n_heads, head_dim) to (batch, keys, kv_heads, head_dim).

    Returns:
        (batch, seq, n_heads, head_dim), in ``query``'s dtype; zero for padding.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    seq, n_heads = query.shape[1:3]
    is_decoding = context.cache is not None and seq * (n_heads // key.shape[2]) <= _MOST_DECODING_ROWS
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not is_decoding or needs_grad or context.dropout > 0:
        return _attend([query, key, value], n_heads, context)
    codes, _ = _codes_and_bounds(context)
    return _operators.decode(query, key, value, context.slopes, codes, context.scale, *_limits(context))


def attend_joined(qkv: torch.Tensor, n_heads: int, context: AttentionContext) -> torch.Tensor:
    """Attend within (batch, seq, n_heads + 2 * kv_heads, head_dim): queries, then keys, then values.

    Its gradient is one tensor, which no one has to join. For contexts without a cache.

    Returns:
        (batch, seq, n_heads, head_dim), in ``qkv``'s dtype; zero for padding.
    """
    return _attend([qkv if qkv.stride(-1) == 1 else qkv.contiguous()], n_heads, context)


def _attend(inputs: list[torch.Tensor], n_heads: int, context: AttentionContext) -> torch.Tensor:
    seed = torch.randint(2**62, (1,), device=inputs[0].device) if context.dropout > 0 else None
    skips = context.slopes is not None and context.skips
    window, softcap, has_prefix = _limits(context)
    out, _, _ = _operators.attention(
        inputs, n_heads, context.slopes, *_codes_and_bounds(context), seed, context.scale, window, softcap,
        context.dropout, has_prefix, skips,
    )  # fmt: skip
    return out


def _limits(context: AttentionContext) -> tuple[int, float, bool]:
    """The window (-1: none), the cap of scores (0: none), and whether there are prefixes."""
    window = -1 if context.window is None else context.window
    return window, context.softcap or 0.0, context.prefix is not None


def prepare(context: AttentionContext, seq: int) -> None:
    """Encode the documents and prefixes of a forward pass, before the first layer needs them."""
    _codes_and_bounds(context)


def _codes_and_bounds(context: AttentionContext) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if context.documents is None and context.prefix is None:
        return None, None
    return context.once(
        "codes and bounds",
        lambda: encode_documents(context.documents, context.prefix, context.max_documents is None),
    )


def encode_documents(
    documents: torch.Tensor | None, prefix: torch.Tensor | None, may_have_gaps: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Encode documents and prefixes for the kernels, on the device without a sync.

    Args:
        documents, prefix: (batch, keys) each, as in AttentionContext; one of them may be None.
        may_have_gaps: Whether padding may stand between tokens of one document.

    Returns:
        codes: (batch, keys) int32, 2 * document + is-in-prefix, and -1 for padding. None without gaps and
            prefix, where the bounds are enough.
        bounds: (2 or 4, batch, keys) int32: start and stop of a token's document, then, with codes, start and
            stop of its run without padding in between. For padding the values are empty ranges.
    """
    if documents is None:
        assert prefix is not None
        documents = torch.zeros_like(prefix, dtype=torch.int64)
    batch, keys = documents.shape
    is_padding = documents == PADDING
    positions = torch.arange(keys, device=documents.device).expand(batch, keys)

    def begins(numbers: torch.Tensor) -> torch.Tensor:
        is_first = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        return positions.masked_fill(~is_first, 0).cummax(1).values

    def ends(numbers: torch.Tensor) -> torch.Tensor:
        is_last = F.pad(numbers[:, 1:] != numbers[:, :-1], (0, 1), value=True)
        return (positions + 1).masked_fill(~is_last, keys).flip(1).cummin(1).values.flip(1)

    # Document numbers increase along a row, so padding takes the number of the document before or after it.
    before = documents.cummax(1).values
    after = documents.masked_fill(is_padding, torch.iinfo(torch.int64).max).flip(1).cummin(1).values.flip(1)
    starts, stops = begins(before).masked_fill(is_padding, keys), ends(after).masked_fill(is_padding, 0)
    if prefix is None and not may_have_gaps:
        return None, torch.stack([starts, stops.cummax(1).values]).int()
    codes = documents * 2 if prefix is None else documents * 2 + prefix
    codes = codes.masked_fill(is_padding, PADDING)
    run_starts = begins(documents).masked_fill(is_padding, keys)
    run_stops = ends(documents).masked_fill(is_padding, 0)
    return codes.int(), torch.stack([starts, stops, run_starts, run_stops]).int()


def _constants(
    query: torch.Tensor,
    key: torch.Tensor,
    slopes: torch.Tensor | None,
    codes: torch.Tensor | None,
    window: int,
    softcap: float,
    has_prefix: bool,
) -> dict[str, Any]:
    """Constants that all kernels are compiled for; float32 is multiplied in full precision, not TF32."""
    head_dim, is_float32 = query.shape[3], query.dtype == torch.float32
    return {
        "GROUP": query.shape[2] // key.shape[2],
        "HEAD_DIM": head_dim,
        "WIDTH": padded(head_dim),
        "HAS_ALIBI": slopes is not None,
        "HAS_CODES": codes is not None,
        "HAS_PREFIX": has_prefix,
        "HAS_WINDOW": window >= 0,
        "HAS_SOFTCAP": softcap > 0,
        "EXACT": has_prefix or is_float32,
        "PRECISION": "ieee" if is_float32 else "tf32",
    }


def _tile(kernel: str, query: torch.Tensor, *, has_dropout: bool) -> Tile:
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    return tile_of(kernel, query.shape[-1], capability, query.element_size(), has_dropout=has_dropout)


def _factors(scale: float, softcap: float) -> tuple[float, float]:
    """The factors inside and outside tanh; without a cap, the second is the factor on the products."""
    return (scale / softcap, softcap * _LOG2_E) if softcap > 0 else (0.0, scale * _LOG2_E)


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of rows, tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _views(tensors: list[torch.Tensor], n_heads: int) -> Sequence[torch.Tensor]:
    """Queries, keys and values of the operator's inputs, or of gradients like them: three tensors, or one."""
    if len(tensors) == 3:
        return tensors
    kv_heads = (tensors[0].shape[2] - n_heads) // 2
    return tensors[0].split([n_heads, kv_heads, kv_heads], dim=2)


@torch.library.custom_op(
    f"{_NAMESPACE}::attention",
    mutates_args=(),
    schema=f"(Tensor[] inputs, int n_heads, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _attention(  # type: ignore[no-untyped-def]
    inputs, n_heads, slopes, codes, bounds, seed, scale, window, softcap, dropout, has_prefix, skips
):  # fmt: skip
    """Out (batch, seq, n_heads, head_dim), lse (batch, n_heads, seq), reach (batch, n_heads, blocks)."""
    query, key, value = _views(inputs, n_heads)
    batch, seq = query.shape[:2]
    keys = key.shape[1]
    tile = _tile("forward", query, has_dropout=seed is not None)
    out, lse, reach = _empty_results(query)
    blocks = reach.shape[2]
    longest = lse
    if skips:
        longest = torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax(1)  # (batch, kv_heads)
    bits = 25 + math.log2(keys)
    nothing = lse
    with torch.cuda.device_of(query):
        forward_kernel[(blocks * batch * n_heads,)](
            query, key, value, out, lse, reach,
            *(nothing if x is None else x for x in (slopes, codes, bounds)), longest,
            nothing if seed is None else seed, *_strides(query, key, value),
            seq, keys, batch * keys, n_heads, blocks, *_factors(scale, softcap), window, dropout, bits,
            **_constants(query, key, slopes, codes, window, softcap, has_prefix), BLOCK_Q=tile.block_q,
            BLOCK_K=tile.block_k, HAS_DOCUMENTS=bounds is not None, HAS_DROPOUT=seed is not None, SKIPS=skips,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse, reach


def _empty_results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, seq, n_heads, _ = query.shape
    blocks = -(-seq // _tile("forward", query, has_dropout=False).block_q)
    lse = query.new_empty((batch, n_heads, seq), dtype=torch.float32)
    reach = query.new_empty((batch, n_heads, blocks), dtype=torch.int32)
    return query.new_empty(query.shape), lse, reach


_attention.register_fake(lambda inputs, n_heads, *_: _empty_results(_views(inputs, n_heads)[0]))


@torch.library.custom_op(
    f"{_NAMESPACE}::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] inputs, Tensor out, Tensor lse, Tensor reach, int n_heads, {_OPTIONS}) "
    "-> Tensor[]",
)
def _backward(  # type: ignore[no-untyped-def]
    grad, inputs, out, lse, reach, n_heads, slopes, codes, bounds, seed, scale, window, softcap, dropout,
    has_prefix, skips,
):  # fmt: skip
    """The gradients of the inputs."""
    query, key, value = _views(inputs, n_heads)
    batch, seq = query.shape[:2]
    keys, kv_heads = key.shape[1:3]
    has_dropout = seed is not None
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = [x.new_empty(x.shape) for x in inputs]
    grad_query, grad_key, grad_value = _views(grads, n_heads)
    delta = torch.empty_like(lse)
    pointers = [lse if x is None else x for x in (slopes, codes, bounds, seed)]
    factors = (*_factors(scale, softcap), window, dropout)
    options = {
        **_constants(query, key, slopes, codes, window, softcap, has_prefix),
        "REACH_BLOCK": _tile("forward", query, has_dropout=has_dropout).block_q,
        "HAS_DOCUMENTS": bounds is not None,
        "HAS_DROPOUT": has_dropout,
    }
    with torch.cuda.device_of(query):
        tile = _tile("backward_query", query, has_dropout=has_dropout)
        blocks = -(-seq // tile.block_q)
        backward_query_kernel[(blocks * batch * n_heads,)](
            grad, query, key, value, out, lse, reach, *pointers, delta, grad_query,
            *_strides(grad, query, key, value), *grad_query.stride()[:2], seq, keys, batch * keys, n_heads,
            blocks, scale, *factors, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, num_warps=tile.warps,
            num_stages=tile.stages, **options,
        )  # fmt: skip
        kernel = "backward_key" if kv_heads == n_heads else "backward_key_grouped"
        tile = _tile(kernel, query, has_dropout=has_dropout)
        blocks = -(-keys // tile.block_k)
        backward_key_kernel[(blocks * batch * kv_heads,)](
            grad, query, key, value, lse, reach, *pointers, delta, grad_key, grad_value,
            *_strides(grad, query, key, value), *grad_key.stride()[:2], seq, keys, batch * keys, n_heads,
            blocks, scale, *factors, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, SKIPS=skips,
            num_warps=tile.warps, num_stages=tile.stages, **options,
        )  # fmt: skip
    return grads


_backward.register_fake(lambda grad, inputs, *_: [x.new_empty(x.shape) for x in inputs])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    (given, ctx.n_heads), tensors, ctx.options = inputs[:2], inputs[2:6], inputs[6:]
    ctx.save_for_backward(*given, *tensors, *output)


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *inputs, slopes, codes, bounds, seed, out, lse, reach = ctx.saved_tensors
    grads = _operators.attention_backward(
        grad, inputs, out, lse, reach, ctx.n_heads, slopes, codes, bounds, seed, *ctx.options
    )
    return (grads, *(None,) * 11)


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


@torch.library.custom_op(
    f"{_NAMESPACE}::decode",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? codes, float scale, int window, "
    "float softcap, bool has_prefix) -> Tensor",
)
def _decode(query, key, value, slopes, codes, scale, window, softcap, has_prefix):  # type: ignore[no-untyped-def]
    """Few queries against many keys, without gradients."""
    batch, seq, n_heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    block_k = keys_of_decoding(head_dim, query.element_size())
    keys_of_part, parts = _cut(keys, block_k, batch * kv_heads, query.device)
    partial = query.new_empty((batch, parts, n_heads, seq, head_dim), dtype=torch.float32)
    partial_lse, out = partial.new_empty(partial.shape[:4]), query.new_empty(query.shape)
    constants = _constants(query, key, slopes, codes, window, softcap, has_prefix)
    width = constants["WIDTH"]
    with torch.cuda.device_of(query):
        decode_kernel[(batch * kv_heads * parts,)](
            query, key, value, partial, partial_lse, *(partial if x is None else x for x in (slopes, codes)),
            *_strides(query, key, value), keys, seq, keys, parts, keys_of_part, n_heads,
            *_factors(scale, softcap), window,
            **constants, ROWS=padded(constants["GROUP"] * seq), BLOCK_K=block_k,
            num_warps=8 if width == 256 else 4, num_stages=2,
        )  # fmt: skip
        join_kernel[(batch * n_heads * seq,)](
            partial, partial_lse, out, seq, parts, n_heads,
            HEAD_DIM=head_dim, WIDTH=width, PARTS=max(2, 1 << (parts - 1).bit_length()),
        )  # fmt: skip
    return out


_decode.register_fake(lambda query, *_: query.new_empty(query.shape))


def _cut(keys: int, block_k: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Keys per part, a multiple of the kernel's block, and the number of parts, to fill the GPU twice."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    )
    parts = max(1, min(128, 2 * processors // programs))
    keys_of_part = max(1, -(-keys // (parts * block_k))) * block_k
    return keys_of_part, -(-keys // keys_of_part)


_operators = getattr(torch.ops, _NAMESPACE)


@register_flop_formula(_operators.attention)
def _flops(inputs: Any, n_heads: int, *_: Any, **__: Any) -> int:
    """FLOPs as PyTorch counts its own attention: all pairs, also masked and skipped ones."""
    batch, seq, _, head_dim = inputs[0]
    return 4 * batch * n_heads * seq * inputs[-1][1] * head_dim


@register_flop_formula(_operators.attention_backward)
def _backward_flops(grad: Any, inputs: Any, *_: Any, **__: Any) -> int:
    return 5 * _flops(inputs, grad[2]) // 2
