"""The `model` and `tokenizer` sections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mptfoundry.mpt.config import MPTConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(MPTConfig):
    """An MPT for language modelling: its architecture, and how a run builds it.

    Attributes:
        name: The kind of model.
        loss_fn: Names of the same exact cross-entropy, computed in chunks of tokens; all three are equal.
        init_device: Where new weights are made: `meta` allocates them only once they are sharded, `cpu`
            makes them whole, `mixed` makes them whole on rank 0 alone. `auto` is `meta` with FSDP and
            `cpu` without. The weights drawn are the same.
    """

    name: Literal["mpt_causal_lm"] = "mpt_causal_lm"
    loss_fn: Literal["auto", "fused_crossentropy", "torch_crossentropy"] = "auto"
    init_device: Literal["auto", "cpu", "meta", "mixed"] = "auto"

    def network(self) -> MPTConfig:
        """The architecture alone."""
        return MPTConfig(**{f.name: getattr(self, f.name) for f in fields(MPTConfig)})


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids.

    Attributes:
        name: A folder with a tokenizer in Hugging Face format, or its name on the hub.
        kwargs: Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is `max_seq_len`.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
