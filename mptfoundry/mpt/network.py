"""The network: embedding, blocks, norm, and then logits or the loss.

Letters of the shapes: batch = rows, seq = tokens of this pass, past = tokens in the cache, keys = past + seq.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .attention import prepare
from .block import Block
from .config import MPTConfig
from .init import materialise
from .linear import linear
from .loss import IGNORED, linear_cross_entropy
from .norm import Norm, compute_dtype
from .position import (
    AttentionContext,
    Cache,
    alibi_slopes,
    count_positions,
    number_documents,
    rotary_tables,
)


class MPTOutput(NamedTuple):
    """The outputs of a forward pass; None for those that were not requested.

    It is a tuple because FSDP finds output tensors in tuples and hooks them to gather weights for backward.

    Attributes:
        loss: Mean cross entropy over the tokens in the loss, a float32 scalar.
        token_loss: (batch, seq) float32; entry t is the loss of predicting the label at t + 1. It is 0 where
            that label is not in the loss, and at the end of a row.
        token_correct: (batch, seq) bool; whether the label at t + 1 is the most likely token.
        logits: (batch, seq, vocab), or (batch, 1, vocab) for the last token only.
    """

    loss: torch.Tensor | None = None
    token_loss: torch.Tensor | None = None
    token_correct: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class KVCache:
    """Keys and values of all layers for the tokens so far, in storage that is allocated once.

    It is for generation: gradients don't flow through it.

    Attributes:
        length: Tokens in the cache, the same for all rows; shorter rows are padded on the left.
        max_len: The cache's capacity in tokens.
        documents: (batch, max_len) int64, 0 for a token and -1 for padding; None until a row has padding.
    """

    def __init__(
        self,
        config: MPTConfig,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.n_layers, 2, batch, config.kv_heads, max_len, config.d_head)
        self.storage = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.max_len = max_len
        self.documents: torch.Tensor | None = None

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, each (batch, seq, kv_heads, head_dim).

        ``length`` grows after the last layer's append.

        Returns:
            Keys and values of all tokens so far, each a (batch, keys, kv_heads, head_dim) view, in the
            dtype of the new ones.
        """
        stop = self.length + key.shape[1]
        keys, values = self.storage[layer].transpose(2, 3)  # (batch, max_len, kv_heads, head_dim)
        keys[:, self.length : stop] = key.detach()
        values[:, self.length : stop] = value.detach()
        return keys[:, :stop].to(key.dtype), values[:, :stop].to(value.dtype)

    def append_documents(self, documents: torch.Tensor | None, batch: int, seq: int) -> torch.Tensor | None:
        """Store which new tokens are padding; returns (batch, keys), or None without any padding so far."""
        if documents is None and self.documents is None:
            return None
        if self.documents is None:
            self.documents = torch.zeros(batch, self.max_len, dtype=torch.int64, device=self.storage.device)
        stop = self.length + seq
        self.documents[:, self.length : stop] = 0 if documents is None else documents
        return self.documents[:, :stop]


class Transformer(nn.Module):
    """From token ids to the normalised residual stream.

    Under autocast the stream has its dtype, whether or not FSDP gathers the weights in that dtype.
    """

    def __init__(
        self, config: MPTConfig, device: torch.device | str | None, block: type[Block] = Block
    ) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model, device=device)
        if config.has_learned_positions:
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model, device=device)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(block(config, layer, device) for layer in range(config.n_layers))
        self.norm_f = Norm(config.d_model, config, device)

    def forward(
        self,
        input_ids: torch.Tensor,
        documents: torch.Tensor | None,
        prefix: torch.Tensor | None,
        cache: Cache | None,
        max_documents: int | None = None,
    ) -> torch.Tensor:
        """Map (batch, seq) ids, or their embeddings (batch, seq, d_model), to (batch, seq, d_model).

        ``documents`` (batch, keys) and ``prefix`` (batch, keys) cover the tokens in the cache too.
        """
        if prefix is not None and not self.config.attn_config.prefix_lm:
            raise ValueError("prefix_mask: this model is not a prefix-LM. Set attn_config.prefix_lm: true.")
        x = input_ids if input_ids.is_floating_point() else self.wte(input_ids)  # (batch, seq, d_model)
        x = x.to(compute_dtype(x) or x.dtype)
        rotary = None
        if self.config.has_learned_positions or self.config.attn_config.rope:
            x, rotary = self._with_positions(x, documents, cache.length if cache is not None else 0)
        fraction = self.config.embedding_fraction
        if fraction < 1:
            x = x * fraction + x.detach() * (1 - fraction)
        x = self.emb_drop(x)
        attn = self.config.attn_config
        slopes = alibi_slopes(self.config.n_heads, attn.alibi_bias_max, x.device) if attn.alibi else None
        context = AttentionContext(
            scale=attn.softmax_scale or 1 / math.sqrt(self.config.d_head),
            slopes=slopes,
            documents=documents,
            prefix=prefix,
            window=attn.sliding_window_size if attn.sliding_window_size >= 0 else None,
            softcap=attn.attn_logit_softcapping,
            dropout=attn.attn_pdrop if self.training else 0.0,
            rotary=rotary,
            cache=cache,
            skips=attn.alibi_skips,
            max_documents=max_documents,
        )
        prepare(context, self.config, x)
        for block in self.blocks:
            x = block(x, context)
        return self.norm_f(x)

    def _with_positions(
        self, x: torch.Tensor, documents: torch.Tensor | None, past: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Add learned positions to x (batch, seq, d_model), or return the tables that rotate keys."""
        seq, limit = x.shape[1], self.config.max_seq_len
        if self.config.has_learned_positions and past + seq > limit:
            raise ValueError(f"input_ids: {past + seq} tokens, but the model has {limit} learned positions.")
        positions = count_positions(documents, past, seq, x.device)
        if self.config.has_learned_positions:
            return x + self.wpe(positions).to(x.dtype), None
        return x, rotary_tables(self.config, positions, past + seq)


class MPT(nn.Module):
    """An MPT language model.

    Children are ``transformer`` (wte, wpe, emb_drop, blocks, norm_f) and, where the embedding is not tied,
    ``lm_head``: weights have the names and shapes of published MPTs.

    Args:
        config: The architecture.
        device: The device of the weights. On ``meta`` nothing is allocated.
        seed: Draw the weights from this seed. Default: a seed from torch's random state, as for PyTorch's own
            modules.
        empty: Allocate the weights without initializing them, for a network whose weights are loaded.

    Attributes:
        fuses_loss: Compute the loss's gradients by a kernel where one can run; see loss.py.
    """

    fuses_loss = True

    def __init__(
        self,
        config: MPTConfig,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, "meta")
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device="meta")
        materialise(self, config, device, seed, empty)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        sequence_id: torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        max_documents: int | None = None,
    ) -> MPTOutput:
        """Predict each next token.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, seq) bool, or integers; False for padding, left or right. With a cache
                it may be (batch, keys); only its last ``seq`` columns are used.
            sequence_id: (batch, seq) int64, changes where a new document begins; documents don't attend to
                each other.
            prefix_mask: (batch, seq) bool, tokens that attend to each other bidirectionally; for prefix_lm.
            labels: (batch, seq) int64, aligned with ``input_ids``; -100 for tokens that are not in the loss.
            cache: Keys and values of earlier tokens; those of this pass are appended.
            last_only: Return logits of the last token only.
            max_documents: The most documents in a row, if padding is at the end of rows. It changes no
                result; it saves a backend that needs the number from a device sync.

        Returns:
            With ``labels`` the loss, and outside training the loss of each token (``token_correct`` only
            if no gradient is needed); otherwise logits.

        Raises:
            ValueError: The arguments don't fit each other or the model.
        """
        seq = input_ids.shape[1]
        documents = None
        if attention_mask is not None or sequence_id is not None:
            mask = None if attention_mask is None else attention_mask[:, -seq:].bool()
            documents = number_documents(mask, sequence_id, cache)
        if cache is not None:
            _check_cache(cache, seq, max_documents)
            documents = cache.append_documents(documents, input_ids.shape[0], seq)
            prefix_mask = None if prefix_mask is None else F.pad(prefix_mask, (cache.length, 0))
        # (batch, seq, d_model)
        x = self.transformer(input_ids, documents, prefix_mask, cache, max_documents)
        if cache is not None:
            cache.length += seq
        if self.config.logit_scale is not None:
            x = x * self.config.logit_factor
        if labels is not None:
            return self._loss(x, labels)
        return self._logits(x[:, -1:] if last_only else x)

    @property
    def output_weight(self) -> torch.Tensor:
        """The output projection, (vocab, d_model): the embedding's weight if they are tied."""
        tied = self.config.tie_word_embeddings
        return self.transformer.wte.weight if tied else self.lm_head.weight

    def _logits(self, x: torch.Tensor) -> MPTOutput:
        logits, softcap = linear(x, self.output_weight), self.config.final_logit_softcapping
        return MPTOutput(logits=logits if softcap is None else softcap * torch.tanh(logits / softcap))

    def _loss(self, x: torch.Tensor, labels: torch.Tensor) -> MPTOutput:
        """The loss of predicting ``labels`` (batch, seq) from x (batch, seq, d_model), shifted by one."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        softcap, fused = self.config.final_logit_softcapping, self.fuses_loss
        loss, token_loss, correct = linear_cross_entropy(
            x.flatten(0, 1), self.output_weight, targets.flatten(), softcap, fused
        )
        if self.training:
            return MPTOutput(loss=loss)
        correct = None if correct is None else correct.view_as(labels)
        return MPTOutput(loss=loss, token_loss=token_loss.view_as(labels), token_correct=correct)


def _check_cache(cache: KVCache, seq: int, max_documents: int | None) -> None:
    """Raise ValueError for arguments that don't fit the cache."""
    keys = cache.length + seq
    if max_documents is not None:
        raise ValueError("max_documents: it is a number for whole rows and can't be given with a cache.")
    if keys > cache.max_len:
        raise ValueError(f"cache: {keys} tokens don't fit into its {cache.max_len}.")
