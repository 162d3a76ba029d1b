"""The `model` and `tokenizer` sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.config.engine.section_rules import (
    Problem,
    Rules,
    Section,
    not_empty,
    only_one,
    where_set,
)
from mptfoundry.config.parallel import Target, target_problems
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
        loss_fn: llm-foundry's names for one exact cross-entropy, computed in chunks of tokens. On a GPU with
            Triton, `fused_crossentropy` writes the gradient over the logits in one kernel: faster, and equal
            within rounding. Elsewhere both compute the same. `auto` is `fused_crossentropy` on such a GPU.
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
        float8_recipe: Compute the products of the blocks' matrices in float8 during training, by torchao's
            recipe of this name. It needs a GPU of compute capability 8.9 or newer; a CPU emulates it. The
            weights and checkpoints stay float32. Default: no float8.
        activation_checkpointing_target: What `fsdp_config.activation_checkpointing` recomputes: `block`,
            `attention`, `mlp`, the outputs of `norm`, the output of the feed-forward network's activation
            function, `act_fn`, or a list of these, in all blocks; or a section that gives each its blocks
            (`first-N`, `last-N`, `middle-N`, `range-N-M`, `every-K`, numbers from 0, a list of these, or N
            for the first N). Default: `block`.
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
    float8_recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    activation_checkpointing_target: Target | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Older configs say true next to alibi, which has no effect; a resolved config says what is computed.
        object.__setattr__(self, "learned_pos_emb", self.has_learned_positions)

    def rules(self) -> Rules:
        yield from super().rules()
        yield not_empty(self, "pretrained_model_name_or_path")
        yield where_set(self, "activation_checkpointing_target", ModelConfig._checkpointed_parts)
        yield from map(self._needs_a_model, ("revision", "pretrained", "config_overrides"))
        yield where_set(self, "bits", ModelConfig._quantized)
        yield where_set(self, "float8_recipe", ModelConfig._float8)
        yield where_set(self, "peft_config", ModelConfig._adapters)

    def _checkpointed_parts(self) -> Iterator[Problem]:
        assert self.activation_checkpointing_target is not None
        yield from target_problems(self.activation_checkpointing_target, self.n_layers)

    def _needs_a_model(self, name: str) -> Iterator[Problem]:
        if getattr(self, name) and self.pretrained_model_name_or_path is None:
            yield name, "has no effect without pretrained_model_name_or_path."

    def _float8(self) -> Iterator[Problem]:
        if self.bits or self.peft_config is not None:
            yield "float8_recipe", "is for weights that are trained, and those of an adapters' base are not."
        sizes = {"d_model": self.d_model, "ffn_config.ffn_hidden_size": self.d_ffn}
        for key, size in sizes.items():
            if size % 16:
                yield "float8_recipe", f"needs sizes that are multiples of 16, and {key} is {size}."

    def _quantized(self) -> Iterator[Problem]:
        yield from only_one(self, "are both given. Use one of them.", "load_in_8bit", "load_in_4bit")
        if self.peft_config is None:
            yield f"load_in_{self.bits}bit", "can't be trained. Add adapters: peft_config."

    def _adapters(self) -> Iterator[Problem]:
        assert self.peft_config is not None
        if isinstance(self, HeadConfig):
            yield "peft_config", f"is only for language models, not for {self.name}."
        else:
            yield from self.peft_config.target_problems(self)

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
class TokenizerConfig(Section):
    """Which tokenizer turns text into ids.

    Attributes:
        name: A folder with a tokenizer in Hugging Face format, or its name on the hub (`NAME@REVISION` for a
            branch, tag or commit).
        kwargs: Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is always `max_seq_len`.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def rules(self) -> Rules:
        yield not_empty(self, "name")
