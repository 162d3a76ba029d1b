"""Token positions and masks: documents, ALiBi slopes, rotary tables.

A *document* is a run of tokens in a row that attend to each other. A packed row holds several documents; a
padded row holds one, and its padding is numbered -1. Each forward pass computes this once and hands it to
all layers as one AttentionContext.

Letters of the shapes: keys = tokens in the cache + seq.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional as F

from .config import MPTConfig

T = TypeVar("T")

PADDING = -1


class Cache(Protocol):
    """Keys and values of the ``length`` tokens so far."""

    length: int

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, each (batch, seq, kv_heads, head_dim); returns all so far."""


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What a backend needs besides queries, keys and values; the same for all layers.

    A key is visible to a query if it is not later (or both are in the prefix), is in the same document
    and is at most ``window`` tokens away. A visible key's score is
    ``softcap(scale * q . k) - slope * distance``.

    Attributes:
        scale: Factor on the products of queries and keys.
        slopes: (n_heads,) float32, the slope of ALiBi in each head; None without ALiBi.
        documents: (batch, keys) int64, the index of each key's document; None if every row is one document.
        prefix: (batch, keys) bool, the keys that attend bidirectionally; None without a prefix.
        window: How many earlier tokens a token attends to; None for all.
        softcap: Scores become ``softcap * tanh(score / softcap)``; None for none.
        dropout: Dropout probability of the attention weights; 0 outside training.
        rotary: Cosines and sines, each (batch or 1, seq, 1, head_dim) float32; None without rotary positions.
        cache: Keys and values of earlier tokens, to which attention appends; None without a cache.
        max_documents: The most documents in a row, if padding is at the end of rows; None if only a
            device sync could tell.
        skips: Whether to skip keys that ALiBi pushes below rounding; changes no result.
    """

    scale: float
    slopes: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    cache: Cache | None = None
    max_documents: int | None = None
    skips: bool = True
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of ``make``, which runs once per forward pass and is shared by all layers."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def made(self, name: str) -> Any:
        """What `once` made under this name; None if nothing yet."""
        return self._made.get(name)


def number_documents(
    attention_mask: torch.Tensor | None, sequence_id: torch.Tensor | None, cache: Cache | None = None
) -> torch.Tensor | None:
    """Number the documents of each row.

    Args:
        attention_mask: (batch, seq) bool, False where padded.
        sequence_id: (batch, seq) integers that change where a new document begins.
        cache: The cache that the tokens are appended to, if any.

    Returns:
        (batch, seq) int64: 0, 1, ... along the row and -1 for padding; None if both arguments are None.

    Raises:
        ValueError: There are several documents, but a cache holds only one.
    """
    if sequence_id is not None:
        if cache is not None:
            raise ValueError("sequence_id: rows of several documents can't be kept in a cache.")
        begins = F.pad(sequence_id[:, 1:] != sequence_id[:, :-1], (1, 0))
        documents = begins.cumsum(1)
    elif attention_mask is not None:
        documents = torch.zeros_like(attention_mask, dtype=torch.int64)
    else:
        return None
    return documents if attention_mask is None else documents.masked_fill(~attention_mask, PADDING)


def count_positions(
    documents: torch.Tensor | None, past: int, seq: int, device: torch.device
) -> torch.Tensor:
    """Count each token's position in its own document, without padding.

    Args:
        documents: (batch, past + seq), or None.
        past: Tokens in the cache.
        seq: Tokens of this pass.
        device: The result's device.

    Returns:
        (batch or 1, seq) int64. Padding gets an arbitrary position in range.
    """
    if documents is None:
        return torch.arange(past, past + seq, device=device)[None]
    position = (documents != PADDING).cumsum(1).sub_(1).clamp_(min=0)
    latest = documents.cummax(1).values
    begins = F.pad(latest[:, 1:] != latest[:, :-1], (1, 0))
    start = position.masked_fill(~begins, 0).cummax(1).values
    return (position - start)[:, past:]


def alibi_slopes(n_heads: int, alibi_bias_max: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Slopes of ALiBi, (n_heads,) float32, in the order that published MPT weights expect.

    For a power of two they are ``2 ** (-alibi_bias_max * i / n_heads)``, i = 1 ... n_heads
    (https://arxiv.org/abs/2108.12409, section 3); otherwise those of the next power of two, every second
    one first, truncated to ``n_heads``.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (alibi_bias_max / power)
    slopes = 1.0 / torch.pow(2, exponents)
    return slopes if power == n_heads else torch.cat([slopes[1::2], slopes[::2]])[:n_heads]


def rotary_tables(
    config: MPTConfig, positions: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that rotate queries and keys (https://arxiv.org/abs/2104.09864, equation 34).

    With dynamic scaling the base grows with ``length`` once that exceeds the model's ``max_seq_len``;
    cached keys keep their rotation.

    Args:
        config: Base, scaling and head width.
        positions: (batch or 1, seq) int64.
        length: Tokens of the longest row, cache included.

    Returns:
        Two tensors (batch or 1, seq, 1, head_dim) float32; the two halves of head_dim are equal.
    """
    theta, width = config.attn_config.rope_theta, config.d_head
    scaling = config.attn_config.rope_hf_config
    divisor = 1.0
    if config.attn_config.rope_impl == "hf" and scaling.type == "linear":
        divisor = scaling.factor
    elif config.attn_config.rope_impl == "hf" and scaling.type == "dynamic" and length > config.max_seq_len:
        growth = scaling.factor * length / config.max_seq_len - (scaling.factor - 1)
        theta *= growth ** (width / (width - 2))
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-pairs / width)
    angles = (positions[..., None] / divisor) * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]  # (batch or 1, seq, 1, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair (i, i + head_dim / 2) of (batch, seq, heads, head_dim) by its position's angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
