"""Self-attention of a block, and the choice of the backend that computes it.

A backend is a module with two functions:

``attend(query, key, value, context) -> out``
    ``query`` and ``out`` are (batch, seq, n_heads, head_dim); ``key`` and ``value`` (batch, keys, kv_heads,
    head_dim), keys = tokens in the cache + seq, the queries being the last ``seq`` of them. All are read by
    their strides: parts of one fused matrix or of a cache. What is visible to whom, and with which bias, is
    said by the AttentionContext.
``cannot(config, device_type) -> str | None``
    Why the backend cannot compute this model's attention on that kind of device; None if it can.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

from . import attention_torch
from .config import MPTConfig
from .norm import make_norm
from .position import AttentionContext, rotate

BACKENDS: dict[str, ModuleType] = {"torch": attention_torch}

# The first of these that can serve is what `auto` takes.
_PREFERENCE = {"cuda": ("triton", "flash", "torch"), "cpu": ("torch",)}


def choose_backend(config: MPTConfig, device_type: str) -> tuple[str, str]:
    """Choose the backend that ``attn_impl`` asks for, or with ``auto`` the fastest that can serve.

    Args:
        config: The model.
        device_type: ``cpu`` or ``cuda``.

    Returns:
        Its name in BACKENDS and the reason for it, one clause.

    Raises:
        ValueError: The backend that is asked for cannot serve.
    """
    wanted = config.attn_config.attn_impl
    if wanted != "auto":
        reason = _why_not(wanted, config, device_type)
        if reason is None:
            return wanted, "asked for"
        able = [name for name in BACKENDS if _why_not(name, config, device_type) is None]
        raise ValueError(
            f"attn_config.attn_impl: {wanted} can't be used: {reason}. "
            f"Use {' or '.join(['auto', *able])}; all give the same mathematics."
        )
    refused: list[str] = []
    for name in _PREFERENCE.get(device_type, ("torch",)):
        reason = _why_not(name, config, device_type)
        if reason is None:
            return name, "; ".join([f"serves this model on {device_type}", *refused])
        refused.append(f"not {name}: {reason}")
    raise ValueError(f"attn_config.attn_impl: auto finds no backend. {'; '.join(refused)}.")


def _why_not(name: str, config: MPTConfig, device_type: str) -> str | None:
    if name not in BACKENDS:
        return "this version has no such backend"
    return BACKENDS[name].cannot(config, device_type)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention; one matrix makes queries, keys and values."""

    def __init__(self, config: MPTConfig, layer: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.d_head
        self.q_width = config.n_heads * config.d_head
        self.kv_width = config.kv_heads * config.d_head
        self.clip_qkv = config.attn_config.clip_qkv
        self.config = config
        qkv_width = self.q_width + 2 * self.kv_width
        self.Wqkv = nn.Linear(config.d_model, qkv_width, bias=config.has_qkv_bias, device=device)
        self.normalise_heads = config.attn_config.qk_gn
        self.q_ln: nn.Module | None = None
        self.k_ln: nn.Module | None = None
        if config.attn_config.qk_ln or config.attn_config.qk_gn:
            self.q_ln = make_norm(self.head_dim if self.normalise_heads else self.q_width, config, device)
            self.k_ln = make_norm(self.head_dim if self.normalise_heads else self.kv_width, config, device)
        self.out_proj = nn.Linear(self.q_width, config.d_model, bias=not config.no_bias, device=device)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map (batch, seq, d_model) to (batch, seq, d_model); appends to the context's cache."""
        qkv = self.Wqkv(x)  # (batch, seq, q_width + 2 * kv_width)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.split([self.q_width, self.kv_width, self.kv_width], dim=-1)
        query, key = self._normalise(query, self.q_ln), self._normalise(key, self.k_ln)
        value = value.unflatten(-1, (-1, self.head_dim))  # (batch, seq, kv_heads, head_dim)
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        backend = context.once("backend", lambda: BACKENDS[choose_backend(self.config, x.device.type)[0]])
        out = backend.attend(query, key, value, context)  # (batch, seq, n_heads, head_dim)
        return self.out_proj(out.flatten(2))

    def _normalise(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """Split (batch, seq, width) into heads, normalising all of them together, or each by itself."""
        if norm is not None and not self.normalise_heads:
            x = norm(x).to(x.dtype)
        x = x.unflatten(-1, (-1, self.head_dim))  # (batch, seq, heads, head_dim)
        return norm(x).to(x.dtype) if norm is not None and self.normalise_heads else x
