"""Self-attention of a block, and the backends that compute it.

A backend is a module with a function, and with two more if they spare it some work:

``attend(query, key, value, context) -> out``
    ``query`` and ``out`` are (batch, seq, n_heads, head_dim); ``key`` and ``value`` are (batch, keys,
    kv_heads, head_dim) with keys = tokens in the cache + seq. The queries are the last ``seq`` tokens. The
    inputs may be strided views of a fused matrix or of a cache. The AttentionContext defines the mask and
    the bias.
``attend_joined(qkv, n_heads, context) -> out``
    The same from the (batch, seq, n_heads + 2 * kv_heads, head_dim) of the projection, if nothing lies in
    between, so that its gradient need not be joined from three.
``prepare(context, seq) -> None``
    Compute once per forward pass what all layers share, with ``context.once``. Blocks then only read the
    context, so that each of them compiles as one graph, also with activation checkpointing.

backends.py knows each backend's limits and chooses one. `OWN_BACKENDS` has those of the user's own: such a
module, an object with these functions, or `attend` alone; ``why_not(config, device_type, dtype)`` may tell
why it can't compute a model's attention, one clause, or None.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import attention_flash, attention_torch, attention_triton
from .attention_chunks import WeightsKept
from .backends import choose_backend
from .config import OWN_BACKENDS, MPTConfig
from .linear import Linear
from .norm import Norm
from .position import AttentionContext, rotate

BACKENDS: dict[str, Any] = {
    "torch": attention_torch,
    "flash": attention_flash,
    "triton": attention_triton,
}


def capability_of(gpu: int | None) -> tuple[int, int]:
    """The compute capability of a GPU, by its index; a constant where blocks are compiled."""
    return torch.cuda.get_device_capability(gpu)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo.
capability_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def prepare(context: AttentionContext, config: MPTConfig, x: torch.Tensor) -> None:
    """Choose the backend for ``x`` (batch, seq, d_model), and let it compute what all layers share."""
    backend = context.once("backend", lambda: _backend_for(config, x))
    if hasattr(backend, "prepare"):
        backend.prepare(context, x.shape[1])


def _backend_for(config: MPTConfig, x: torch.Tensor) -> Any:
    if torch.jit.is_tracing():  # a trace must work for other lengths: no cuts by length
        return WeightsKept()
    dtype = str(x.dtype).removeprefix("torch.")
    capability = capability_of(x.device.index) if x.is_cuda else None
    name = choose_backend(config, x.device.type, dtype, capability)[0]
    return BACKENDS[name] if name in BACKENDS else own_backend(OWN_BACKENDS[name])


def own_backend(own: Any) -> Any:
    """A backend of the user's own; a function is its `attend`."""
    return own if hasattr(own, "attend") else SimpleNamespace(attend=own)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention with a fused QKV projection."""

    def __init__(self, config: MPTConfig, layer: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.d_head
        self.q_width = config.n_heads * config.d_head
        self.kv_width = config.kv_heads * config.d_head
        self.clip_qkv = config.attn_config.clip_qkv
        self.config = config
        qkv_width = self.q_width + 2 * self.kv_width
        self.Wqkv = Linear(config.d_model, qkv_width, bias=config.has_qkv_bias, device=device)
        self.normalise_heads = config.attn_config.qk_gn
        self.q_ln: nn.Module | None = None
        self.k_ln: nn.Module | None = None
        if config.attn_config.qk_ln or config.attn_config.qk_gn:
            self.q_ln = Norm(self.head_dim if self.normalise_heads else self.q_width, config, device)
            self.k_ln = Norm(self.head_dim if self.normalise_heads else self.kv_width, config, device)
        self.out_proj = Linear(self.q_width, config.d_model, bias=not config.no_bias, device=device)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map (batch, seq, d_model) to (batch, seq, d_model); appends to the context's cache."""
        qkv = self.Wqkv(x)  # (batch, seq, q_width + 2 * kv_width)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        backend = context.once("backend", lambda: _backend_for(self.config, qkv))
        if self._is_joined(backend, context):
            joined = qkv.unflatten(-1, (-1, self.head_dim))  # (batch, seq, n_heads + 2 * kv_heads, head_dim)
            return self.out_proj(backend.attend_joined(joined, self.config.n_heads, context).flatten(2))
        parts = qkv.split([self.q_width, self.kv_width, self.kv_width], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in parts)  # (batch, seq, heads, ...)
        if self.q_ln is not None and self.k_ln is not None:
            query, key = self._normalise(query, self.q_ln), self._normalise(key, self.k_ln)
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        out = backend.attend(query, key, value, context)  # (batch, seq, n_heads, head_dim)
        return self.out_proj(out.flatten(2))

    def _is_joined(self, backend: Any, context: AttentionContext) -> bool:
        """Whether queries, keys and values go to the backend as the projection gives them."""
        is_changed = self.q_ln is not None or context.rotary is not None or context.cache is not None
        return hasattr(backend, "attend_joined") and not is_changed

    def _normalise(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Normalise the heads of (batch, seq, heads, head_dim), together or one by one."""
        if self.normalise_heads:
            return norm(x).to(x.dtype)
        return norm(x.flatten(-2)).to(x.dtype).unflatten(-1, (-1, self.head_dim))
