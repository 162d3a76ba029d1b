"""The `model` and `tokenizer` sections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.config.engine.forms import check_not_empty
from mptfoundry.config.parallel import Target, recomputed_parts
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.head_config import (
    HEADS,
    HeadConfig,
    SequenceClassifierConfig,
    SpanFinderConfig,
    TokenClassifierConfig,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(MPTConfig):
    """An MPT for language modelling: its architecture, and how a run builds it.

    Attributes:
        name: The kind of model.
        loss_fn: llm-foundry's names for one exact cross-entropy, computed in chunks of tokens; all are equal.
        init_device: Where new weights are created: `meta` allocates them only once they are sharded, `cpu`
            creates them whole, `mixed` creates them whole on rank 0 only. `auto` is `meta` with FSDP and
            `cpu` without. The weights are the same in each case.
        pretrained_model_name_or_path: The model to start from: a Hugging Face folder, a name on the hub, or a
            run. Its architecture becomes this model's.
        revision: Branch, tag or commit of a name on the hub. Default: its main branch.
        pretrained: Take the weights, too; false takes only the architecture. Default: true if a model is
            named.
        config_overrides: Architecture keys to change, such as `max_seq_len`. Another `vocab_size` cuts the
            embedding, or pads it with the mean of its rows.
        peft_config: Train adapters on top of that model's weights, which stay fixed. Default: train all
            weights.
        load_in_8bit: Keep the blocks' matrices in 8 bits during training, through bitsandbytes. Evaluation,
            generation and export use the base's own weights.
        load_in_4bit: The same in 4 bits (NF4).
        activation_checkpointing_target: What `fsdp_config.activation_checkpointing` recomputes: `block`,
            `attention`, `mlp`, `norm` or a list of these, in all blocks; or a section that gives each its
            blocks (`first-N`, `last-N`, `middle-N`, `range-N-M`, `every-K`, numbers from 0, a list of these,
            or N for the first N). Default: `block`.
    """

    name: Literal["mpt_causal_lm"] = "mpt_causal_lm"
    loss_fn: Literal["auto", "fused_crossentropy", "torch_crossentropy"] = "auto"
    init_device: Literal["auto", "cpu", "meta", "mixed"] = "auto"
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    pretrained: bool | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    peft_config: LoRAConfig | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    activation_checkpointing_target: Target | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Older configs say true next to alibi, which has no effect; a resolved config says what is computed.
        check_not_empty(self, "pretrained_model_name_or_path")
        object.__setattr__(self, "learned_pos_emb", self.has_learned_positions)
        recomputed_parts(self.activation_checkpointing_target, self.n_layers)
        if self.pretrained_model_name_or_path is None:
            for key in ("revision", "pretrained", "config_overrides"):
                if getattr(self, key):
                    raise ValueError(f"{key}: has no effect without pretrained_model_name_or_path.")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both given. Use one of them.")
        if self.bits and self.peft_config is None:
            raise ValueError(f"load_in_{self.bits}bit: can't be learned. Add adapters: peft_config.")
        if self.peft_config is not None:
            if isinstance(self, HeadConfig):
                raise ValueError(f"peft_config: is for language models alone, and not for {self.name}.")
            try:
                self.peft_config.targets(self)
            except ValueError as error:
                raise ValueError(f"peft_config.{error}") from error

    @property
    def bits(self) -> Literal[8, 4] | None:
        """Of the blocks' matrices, where they are quantized."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    @property
    def takes_weights(self) -> bool:
        """Whether the weights are those of another model, and not new."""
        return self.pretrained_model_name_or_path is not None and self.pretrained is not False

    @property
    def vocabulary_key(self) -> str:
        """The key that changes how many rows the embedding has."""
        is_named = self.pretrained_model_name_or_path is not None
        return "model.config_overrides.vocab_size" if is_named else "model.vocab_size"

    def network(self) -> MPTConfig:
        """The architecture alone, with its head if it has one."""
        kind = next((kind for kind in HEADS if isinstance(self, kind)), MPTConfig)
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationConfig(SequenceClassifierConfig, ModelConfig):
    """An MPT that classifies texts, or rates them, by their last token."""

    name: Literal["mpt_sequence_classification"] = field()  # type: ignore[assignment]
    loss_fn: Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class TokenClassificationConfig(TokenClassifierConfig, ModelConfig):
    """An MPT that classifies each word of a text."""

    name: Literal["mpt_token_classification"] = field()  # type: ignore[assignment]
    loss_fn: Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig(SpanFinderConfig, ModelConfig):
    """An MPT that answers a question with a span of a text."""

    name: Literal["mpt_question_answering"] = field()  # type: ignore[assignment]
    loss_fn: Literal["auto"] = "auto"


AnyModelConfig = (
    ModelConfig | SequenceClassificationConfig | TokenClassificationConfig | QuestionAnsweringConfig
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids.

    Attributes:
        name: A folder with a tokenizer in Hugging Face format, or its name on the hub (`NAME@REVISION` for a
            branch, tag or commit).
        kwargs: Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is always `max_seq_len`.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_not_empty(self, "name")
