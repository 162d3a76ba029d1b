"""transformers classes for MPTs that transformers' own MPT classes can't represent.

An exported folder contains this file and the network's other files, and its config.json names the two classes
here. They need only torch and transformers, 4.51 or later. transformers copies only the files that this one
imports, so it imports each file of the network.

Letters of the shapes: batch = rows, seq = tokens of this pass, keys = tokens in the cache + seq.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .attention import Attention  # noqa: F401
from .attention_blocks import attend_by_blocks  # noqa: F401
from .attention_chunks import WeightsKept
from .attention_flash import attend as attend_by_flash  # noqa: F401
from .attention_tiles import Tile  # noqa: F401
from .attention_torch import attend as attend_by_torch  # noqa: F401
from .attention_triton import attend as attend_by_triton  # noqa: F401
from .backends import choose_backend  # noqa: F401
from .block import Block
from .config import MPTConfig, from_values
from .ffn import FFN  # noqa: F401
from .head_config import HEADS  # noqa: F401
from .init import initialize_parameter
from .linear import Linear  # noqa: F401
from .loss import IGNORED, linear_cross_entropy, mean_cross_entropy
from .network import Transformer
from .norm import Norm  # noqa: F401
from .position import AttentionContext, number_documents

with suppress(ImportError):  # triton may be missing
    from .attention_kernels import forward_kernel  # noqa: F401
    from .loss_kernel import cross_entropy  # noqa: F401
    from .norm_kernel import add_norm  # noqa: F401

# The problem_type in folders from earlier versions; transformers does not have this value.
_FORMER_PROBLEM_TYPE = "none of these: it needs AutoModelForCausalLM and trust_remote_code=True"

# transformers 5.24 names a cache `cache` in arguments and outputs; earlier ones and PEFT, `past_key_values`.
_CACHE_NAMES = ("past_key_values", "cache")
_CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in _CACHE_NAMES)
_SWITCHES = tuple(field.name for field in fields(MPTConfig))


class MPTFoundryConfig(PretrainedConfig):
    """An MPT's architecture, with the keys and defaults of MPTConfig.

    A partial section (`attn_config={"attn_impl": "flash"}`) keeps the other values.

    Attributes:
        init_device: The device of a new network's weights, and of `from_pretrained`'s weights unless
            `device_map` is given; `meta` creates a new network without storage.
        use_cache: Whether a pass outside training returns the keys and values of its tokens.
    """

    model_type = "mptfoundry"
    keys_to_ignore_at_inference = [*_CACHE_NAMES]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    def __init__(self, init_device: str = "cpu", use_cache: bool = True, **kwargs: Any) -> None:
        if kwargs.get("problem_type") == _FORMER_PROBLEM_TYPE:
            del kwargs["problem_type"]
        given = {name: kwargs.pop(name) for name in _SWITCHES if name in kwargs}
        network = from_values(MPTConfig, given).with_plain_heads()
        for name, value in network.to_dict().items():
            setattr(self, name, value)
        self.head_dim = network.d_head
        kwargs["tie_word_embeddings"] = self.tie_word_embeddings
        super().__init__(**kwargs)
        self.init_device = init_device
        self.use_cache = use_cache

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        if name in _SWITCHES and isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json; transformers' own MPT classes reject it."""
        return {**super().to_dict(), **self.network_config().to_explicit_dict()}

    @property
    def num_key_value_heads(self) -> int:
        """Heads for keys and values, under transformers' name."""
        return self.network_config().kv_heads

    @property
    def attn_impl(self) -> str:
        """The attention backend: auto, torch, flash or triton."""
        return self.attn_config["attn_impl"]

    @attn_impl.setter
    def attn_impl(self, name: str) -> None:
        self.attn_config = {"attn_impl": name}

    def network_config(self) -> MPTConfig:
        """The network's own config; raises ValueError for invalid values."""
        return from_values(MPTConfig, {name: getattr(self, name) for name in _SWITCHES}).with_plain_heads()


def _merged(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(before)
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(before.get(key), Mapping)
        merged[key] = _merged(before[key], value) if is_section else value
    return merged


class CheckpointedBlock(Block):
    """A block with transformers' gradient checkpointing, for models on one or several devices."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map (batch, seq, d_model) to (batch, seq, d_model)."""
        if x.device != context.once("device", lambda: x.device):
            context = context.once(f"on {x.device}", lambda: _moved(context, x.device))
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(super().forward, x, context)
        return super().forward(x, context)


def _moved(context: AttentionContext, device: torch.device) -> AttentionContext:
    """A context for blocks on another device, where everything that layers share is recomputed."""

    def to(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.to(device)

    rotary = context.rotary
    return replace(
        context,
        slopes=to(context.slopes),
        documents=to(context.documents),
        prefix=to(context.prefix),
        rotary=None if rotary is None else (rotary[0].to(device), rotary[1].to(device)),
        _made={name: made for name, made in context._made.items() if name == "backend"} | {"device": device},
    )


class LayersOf:
    """The network's view of one of transformers' caches."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        if getattr(cache, "is_compileable", False):
            raise self._refusal()
        self.length = int(cache.get_seq_length())

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, each (batch, seq, kv_heads, head_dim); returns all so far."""
        keys, values = self.cache.update(key.transpose(1, 2), value.transpose(1, 2), layer)
        if keys.shape[2] != self.length + key.shape[1]:
            raise self._refusal()
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _refusal(self) -> ValueError:
        return ValueError(
            f"{_CACHE_NAME}: {type(self.cache).__name__} does not hold all tokens and nothing else. "
            "Use a DynamicCache."
        )


class MPTFoundryForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An MPT language model; weights have the names of published MPTs, and `lm_head` if it is not tied."""

    config_class = MPTFoundryConfig  # type: ignore[assignment]
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CheckpointedBlock"]  # type: ignore[assignment]  # noqa: RUF012
    _skip_keys_device_placement = [*_CACHE_NAMES]  # type: ignore[assignment]  # noqa: RUF012
    accepts_loss_kwargs = True  # transformers' Trainer tells forward its num_items_in_batch
    _supports_cache_class = True
    _supports_quantized_cache = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, config: MPTFoundryConfig) -> None:
        super().__init__(config)
        network = config.network_config()
        # from_pretrained creates everything on meta first, for any value of the config.
        is_loading = torch.empty(0).is_meta
        device = None if is_loading or config.init_device == "cpu" else config.init_device
        self.transformer = Transformer(network, device, CheckpointedBlock)
        self.lm_head = nn.Linear(network.d_model, network.vocab_size, bias=False, device=device)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' method; also respects `init_device` if no `device_map` is given."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        is_placed = kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None
        if not is_placed and model.config.init_device not in ("cpu", "meta"):
            model.to(model.config.init_device)
        return loaded

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        sequence_id: torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache: Any = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict each next token.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, keys), 0 where padded, left or right.
            inputs_embeds: (batch, seq, d_model), in place of ``input_ids``.
            sequence_id: (batch, seq), changes where a new document begins; documents don't attend to each
                other.
            prefix_mask: (batch, seq), tokens that attend to each other bidirectionally; for prefix_lm.
            labels: (batch, seq) int64, aligned with ``input_ids``; -100 for tokens that are not in the loss.
                In training the output has only the loss, without logits.
            past_key_values, cache: A transformers cache with the earlier tokens.
            use_cache: Return a cache. Default: the config's value, but never in training or with documents.
            output_attentions: Return each layer's attention weights, (batch, n_heads, seq, keys).
            output_hidden_states: Return each block's input, and the last norm's output.
            return_dict: False for a tuple.
            logits_to_keep: Logits of this many last tokens, or of the tokens at these positions; 0: of all.
            num_items_in_batch: The divisor of the summed losses, such as the number of labels in all passes
                of gradient accumulation. Default: the number of labels in this pass.

        Raises:
            ValueError: The arguments don't fit each other or the model.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids, inputs_embeds: exactly one of them is needed.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and sequence_id is None
        given = _rename_cache({"past_key_values": past_key_values, "cache": cache})[_CACHE_NAME]
        opened = self._opened_cache(given, use_cache)
        past = 0 if opened is None else opened.length
        mask = _only_if_padded(attention_mask, past + tokens.shape[1])
        prefix = None if prefix_mask is None else F.pad(prefix_mask.bool(), (past, 0))  # (batch, keys)
        with self._noted(output_hidden_states, output_attentions) as (hidden, kept):
            x = self.transformer(tokens, number_documents(mask, sequence_id, opened), prefix, opened)
        loss, logits = self._predict(x, labels, logits_to_keep, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if hidden is None else (*hidden, x),
            attentions=None if kept is None else tuple(kept.weights),
            **{_CACHE_NAME: None if opened is None else opened.cache},
        )
        as_dict = _returns_dict(self.config) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _opened_cache(self, given: Any, use_cache: bool) -> LayersOf | None:
        """The given cache, or a new one if the pass returns a cache."""
        if given is None and not use_cache:
            return None
        if self.training and any(block.gradient_checkpointing for block in self.transformer.blocks):
            raise ValueError(
                f"use_cache, {_CACHE_NAME}: gradient checkpointing computes the blocks twice, which a cache "
                "would notice. Use use_cache=False."
            )
        return LayersOf(DynamicCache() if given is None else given)

    @contextmanager
    def _noted(
        self, hidden_states: bool | None, attentions: bool | None
    ) -> Iterator[tuple[list[Any] | None, WeightsKept | None]]:
        """Record each block's input and attention weights while the network runs."""
        hidden: list[Any] | None = None
        if self.config.output_hidden_states if hidden_states is None else hidden_states:
            hidden = []
        kept = None
        if self.config.output_attentions if attentions is None else attentions:
            kept = WeightsKept()

        def note(block: nn.Module, arguments: tuple[torch.Tensor, AttentionContext]) -> None:
            if hidden is not None:
                hidden.append(arguments[0])
            if kept is not None:
                arguments[1]._made["backend"] = kept

        wanted = self.transformer.blocks if hidden is not None or kept is not None else ()
        hooks = [block.register_forward_pre_hook(note) for block in wanted]
        try:
            yield hidden, kept
        finally:
            for hook in hooks:
                hook.remove()

    def _predict(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> tuple[Any, Any]:
        """The loss if there are labels, and the logits, except in training with labels.

        Logits of all tokens take more memory than the rest of a training step.
        """
        network = self.transformer.config
        if network.logit_scale is not None:
            x = x * network.logit_factor
        softcap = network.final_logit_softcapping

        def logits_of(x: torch.Tensor) -> torch.Tensor:
            logits = self.lm_head(x)
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            return None, logits_of(x[:, kept])
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        head = self.lm_head
        is_plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter
        if is_plain and head.weight.device == x.device:
            loss = linear_cross_entropy(x.flatten(0, 1), head.weight, targets.to(x.device), softcap)[0]
        else:  # an adapter, a quantized layer or weight, or a matrix on another device
            logits = logits_of(x).flatten(0, 1)
            loss = mean_cross_entropy(logits, targets.to(logits.device))[0]
        if num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=loss.device)
            loss = loss * (targets != IGNORED).sum().to(loss.device) / items
        return loss, None if self.training else logits_of(x[:, kept])

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' method; it takes a cache under both names."""
        return super().generate(*args, **_rename_cache(kwargs))

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' method; also trims or extends `prefix_mask` to the tokens of the pass."""
        inputs = super().prepare_inputs_for_generation(*args, **_rename_cache(kwargs))
        inputs = _rename_cache(inputs, "past_key_values")  # PEFT's prompts look for a cache by this name
        inputs.pop("cache_position", None)  # the cache knows its length
        prefix, cache = inputs.get("prefix_mask"), inputs.get("past_key_values")
        if prefix is not None:
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            past = 0 if cache is None else int(cache.get_seq_length())
            prefix = F.pad(prefix, (0, max(0, past + tokens.shape[1] - prefix.shape[1])))[:, past:]
            inputs["prefix_mask"] = prefix if prefix.any() else None
        return inputs

    def get_input_embeddings(self) -> nn.Module:
        """`transformer.wte`."""
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace `transformer.wte`."""
        self.transformer.wte = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """`lm_head`."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace `lm_head`."""
        self.lm_head = new_embeddings  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights that were not loaded, with the config's scheme and torch's seed."""
        place = next((name for name, other in self.named_modules() if other is module), None)
        if place is None:  # created by a resize
            place = "transformer.wte" if isinstance(module, nn.Embedding) else "lm_head"
        for name, parameter in module.named_parameters(recurse=False):
            if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):
                seed = int(torch.randint(2**31, (), device="cpu"))
                initialize_parameter(parameter, f"{place}.{name}", self.transformer.config, seed)


def _rename_cache(arguments: Mapping[str, Any], name: str = _CACHE_NAME) -> dict[str, Any]:
    """Arguments in which the cache, if any, has this name; raises ValueError if there are two caches."""
    caches = [arguments[each] for each in _CACHE_NAMES if arguments.get(each) is not None]
    if len(caches) > 1:
        raise ValueError(f"{', '.join(_CACHE_NAMES)}: two names of one argument. Give one of them.")
    others = {key: value for key, value in arguments.items() if key not in _CACHE_NAMES}
    is_named = any(each in arguments for each in _CACHE_NAMES)
    return {**others, name: caches[0] if caches else None} if is_named else others


def _returns_dict(config: PretrainedConfig) -> bool:
    """Whether the config asks for dict outputs; `torchscript` is a key of transformers 4."""
    return bool(config.return_dict) and not getattr(config, "torchscript", False)


def _only_if_padded(attention_mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """A mask (batch, keys) as bool; None if it masks nothing, because backends are faster without one."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != keys:
        raise ValueError(
            f"attention_mask: its shape is {tuple(attention_mask.shape)}, it must be (batch, {keys}), "
            "the tokens in the cache included."
        )
    mask = attention_mask.bool()
    is_traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return mask if is_traced or not mask.all() else None
