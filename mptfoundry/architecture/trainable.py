"""Which parameters of a run are trainable: all, all except frozen patterns, or only adapters.

A pattern is a regular expression to search for in a parameter's name, such as
`transformer.blocks.0.attn.Wqkv.weight`. An adapter of a matrix (out, in) is two small matrices, `lora_A`
(r, in) and `lora_B` (out, r), whose scaled product is added to it (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mptfoundry.config.engine.schema import did_you_mean
from mptfoundry.mpt.config import Limits, MPTConfig, Problem, Rules, Section
from mptfoundry.mpt.flops import parameter_shapes

ALL_LINEAR = "all-linear"
# peft's names: a matrix becomes `Wqkv.base_layer`, with these next to it.
BASE, ADAPTER = ".base_layer.", ".lora_"
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """Train low-rank adapters; the base model's own weights stay frozen (peft's LoRA).

    Attributes:
        peft_type: The kind of adapter. Only `LORA`.
        task_type: The task of the model. Only `CAUSAL_LM`.
        r: Rank of the adapters.
        lora_alpha: The output of an adapter is multiplied by `lora_alpha / r`.
        lora_dropout: Dropout probability of an adapter's input.
        target_modules: Matrices of each block that get an adapter: `Wqkv`, `out_proj`, `up_proj`,
            `down_proj`, and `gate_proj` with `ffn_type: mptglu`; `all-linear` means all of them.
        use_rslora: Multiply by `lora_alpha / sqrt(r)` instead (https://arxiv.org/abs/2312.03732).
        bias: Only `none`: biases are not trained.
    """

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("Wqkv", "out_proj", "up_proj", "down_proj")
    use_rslora: bool = False
    bias: Literal["none"] = "none"

    limits: ClassVar = {
        "r": Limits(1),
        "lora_alpha": Limits(above=0, text=" is not positive. Use r, or twice as much."),
        "lora_dropout": Limits(0, below=1, text=" is not a probability from 0 to below 1."),
    }

    def rules(self) -> Rules:
        yield self._has_targets()

    def _has_targets(self) -> Iterator[Problem]:
        if not self.target_modules:
            yield "target_modules", f"is empty. Name a matrix, or {ALL_LINEAR}."

    @property
    def scaling(self) -> float:
        """The factor on the adapter's product."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, network: MPTConfig) -> tuple[str, ...]:
        """The matrices of a block that get an adapter.

        Raises:
            ValueError: The blocks of `network` have no matrix of this name.
        """
        modules = tuple(name.split(".")[4] for name in _matrices(network) if name.split(".")[2] == "0")
        if self.target_modules == (ALL_LINEAR,):
            return modules
        for name in self.target_modules:
            if name not in modules:
                raise ValueError(
                    f"target_modules: '{name}' is not a matrix of a block.{did_you_mean(name, modules)} "
                    f"Allowed: {', '.join(modules)}, or {ALL_LINEAR} alone."
                )
        return tuple(name for name in modules if name in self.target_modules)

    def target_problems(self, network: MPTConfig) -> Iterator[Problem]:
        """The problem of `target_modules` with this network, if there is one."""
        try:
            self.targets(network)
        except ValueError as error:
            yield "peft_config.target_modules", str(error).removeprefix("target_modules: ")

    def adapter_shapes(self, network: MPTConfig) -> Shapes:
        """Names and shapes of the adapters in a network."""
        targets, shapes = self.targets(network), Shapes()
        for name, (outputs, inputs) in _matrices(network).items():
            module = name.removesuffix(".weight")
            if module.split(".")[-1] in targets:
                shapes[f"{module}{_A}"] = (self.r, inputs)
                shapes[f"{module}{_B}"] = (outputs, self.r)
        return shapes


@dataclass(frozen=True)
class Trainable:
    """How many parameters of a run are trainable.

    Attributes:
        parameters: The trainable parameters, adapters included.
        frozen: Parameters that the optimizer does not change.
        adapters: Trainable parameters that belong to adapters.
        trains_output: Whether the matrix that computes the logits is trainable.
    """

    parameters: int
    frozen: int
    adapters: int
    trains_output: bool

    @property
    def extra_flops_per_token(self) -> int:
        """FLOPs added to those of training the whole network: 6 per adapter parameter, and -2 per frozen
        parameter, which needs no gradient.
        """
        return 6 * self.adapters - 2 * self.frozen


def names_in(network: MPTConfig, lora: LoRAConfig | None) -> Shapes:
    """Names and shapes of all parameters of a network with its adapters, as peft names them."""
    return parameter_shapes(network) if lora is None else _names_with_adapters(network, lora)


def _names_with_adapters(network: MPTConfig, lora: LoRAConfig) -> Shapes:
    adapters = lora.adapter_shapes(network)
    adapted = {name.split(ADAPTER)[0] for name in adapters}
    shapes = Shapes()
    for name, shape in parameter_shapes(network).items():
        module, _, leaf = name.rpartition(".")
        shapes[f"{module}{BASE}{leaf}" if module in adapted else name] = shape
    return shapes | adapters


def trainable_names(names: Iterable[str], lora: LoRAConfig | None, disable_grad: Sequence[str]) -> list[str]:
    """Those of the names that no `disable_grad` pattern matches; with adapters, only theirs."""
    candidates = [name for name in names if lora is None or ADAPTER in name]
    return [name for name in candidates if not any(re.search(each, name) for each in disable_grad)]


def count_trainable(network: MPTConfig, lora: LoRAConfig | None, disable_grad: Sequence[str]) -> Trainable:
    """The trainable parameters of a network whose `disable_grad` patterns are valid."""
    shapes = names_in(network, lora)
    names = trainable_names(shapes, lora, disable_grad)
    trainable = {name: math.prod(shapes[name]) for name in names}
    output = "transformer.wte.weight" if network.tie_word_embeddings else "lm_head.weight"
    return Trainable(
        parameters=sum(trainable.values()),
        frozen=sum(map(math.prod, shapes.values())) - sum(trainable.values()),
        adapters=sum(number for name, number in trainable.items() if ADAPTER in name),
        trains_output=output in trainable,
    )


def matrix_parameters(network: MPTConfig) -> int:
    """Parameters of the blocks' matrices."""
    return sum(math.prod(shape) for shape in _matrices(network).values())


def pattern_problem(pattern: str, names: Sequence[str]) -> str | None:
    """The problem with a pattern that should match some of the names, or None."""
    try:
        if any(re.search(pattern, name) for name in names):
            return None
    except re.error as error:
        return f"{pattern} is not a regular expression: {error}."
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0)
    return f"{pattern} matches no parameter. The nearest names are {', '.join(nearest)}."


def pattern_problems(
    network: MPTConfig, lora: LoRAConfig | None, disable_grad: Sequence[str], groups: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Problems with an optimizer's patterns for this network, as (key below `optimizer`, text)."""
    names = list(names_in(network, lora))
    asked = [("disable_grad", pattern) for pattern in disable_grad]
    asked += [(f"param_groups[{i}].param_str_match", pattern) for i, pattern in enumerate(groups)]
    problems = [(key, text) for key, pattern in asked if (text := pattern_problem(pattern, names))]
    yield from problems
    if problems:
        return
    free = trainable_names(names, lora, disable_grad)
    if not free:
        yield "disable_grad", "every parameter is frozen. Leave at least one trainable."
        return
    for key, pattern in asked[len(disable_grad) :]:
        left = [name for name in free if not re.search(pattern, name)]
        if left == free:
            text = "only parameters that are frozen or in a group above. Move the group up, or take it out."
            yield key, f"{pattern} matches {text}"
        free = left


def _matrices(network: MPTConfig) -> Mapping[str, tuple[int, ...]]:
    """The blocks' matrices, by name."""
    blocks = ((n, s) for n, s in parameter_shapes(network).items() if n.startswith("transformer.blocks."))
    return {name: shape for name, shape in blocks if len(shape) == 2}
