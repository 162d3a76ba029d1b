"""The `optimizer` and `scheduler` sections, each a class for each `name`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mptfoundry import plugins
from mptfoundry.config.engine.durations import Duration, parse_duration
from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, where_set
from mptfoundry.config.engine.signatures import Own, with_own_keys

# Weights leave every number format long before it.
LARGEST_RATE = 1000
_LIMITS = {
    "lr": Limits(0, LARGEST_RATE, text=" is negative. Use a positive number, such as 1e-4."),
    "weight_decay": Limits(0, LARGEST_RATE),
}
# So many neighbours in a row of a matrix share a scale, where LION's momentum is stored in 8 bits.
MOMENTUM_GROUP = 64
_EPS = Limits(above=0, most=LARGEST_RATE, text=" is not positive. Use a small positive number, such as 1e-8.")
_FACTOR = Limits(0, LARGEST_RATE)


@dataclass(frozen=True, kw_only=True)
class ParamGroupConfig(Section):
    """Parameters with their own settings; keys that are not given are as in the optimizer.

    Attributes:
        param_str_match: Regular expression to search for in parameter names, such as `norm|bias`; a parameter
            belongs to the first group that matches.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: Decay rates of the moving averages.
        eps: Added to the denominator; AdamW only.
    """

    param_str_match: str
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None

    limits: ClassVar = {**_LIMITS, "eps": _EPS}

    def rules(self) -> Rules:
        yield _betas(self)


@dataclass(frozen=True, kw_only=True)
class _AnyOptimizerConfig(Section):
    """What all optimizers have.

    Attributes:
        name: The optimizer.
        lr: Learning rate at the top of the schedule.
        betas: Decay rates of the moving averages of the gradient and of its square.
        weight_decay: Each step shrinks the weights by the fraction `weight_decay * lr / initial lr`.
        disable_grad: Regular expressions; parameters whose names match any of them are frozen.
        param_groups: Parameters with their own settings.
        fused: Update weights and state in one pass over the memory: LION by a Triton kernel on a GPU and by
            compiled C++ on a CPU, AdamW by PyTorch's kernel. The numbers are the plain step's within
            rounding, so with `auto` a run keeps the step that it began with. A new run is fused on a GPU that
            can, and not on a CPU.
        bf16_weights: With `precision: amp_bf16` on one GPU without FSDP, keep a bfloat16 copy of each matrix
            next to its float32 weight, instead of casting the weight in each microbatch. The numbers are the
            same bit for bit, and checkpoints hold the float32 weights. `auto` is true if LION is fused, which
            then writes the copies in its pass.
    """

    name: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    disable_grad: tuple[str, ...] = ()
    param_groups: tuple[ParamGroupConfig, ...] = ()
    fused: bool | Literal["auto"] = "auto"
    bf16_weights: bool | Literal["auto"] = "auto"

    limits: ClassVar = _LIMITS

    def rules(self) -> Rules:
        yield _betas(self)


@dataclass(frozen=True, kw_only=True)
class DecoupledLionWConfig(_AnyOptimizerConfig):
    """LION (https://arxiv.org/abs/2302.06675) with weight decay decoupled from the learning rate.

    Attributes:
        lr: Learning rate at the top of the schedule; for LION, 3 to 10 times smaller than for AdamW.
        betas: Weights of the old momentum, first in the update, then in the next momentum.
        momentum_dtype: How the momentum is stored. With `bfloat16` it takes half the memory, with `int8` a
            quarter: 64 numbers of a row share a scale. A step still computes in float32, and rounds the new
            momentum to nearest.
    """

    name: Literal["decoupled_lionw"] = "decoupled_lionw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    momentum_dtype: Literal["float32", "bfloat16", "int8"] = "float32"

    def rules(self) -> Rules:
        yield from super().rules()
        yield _of_lion(self, "")
        yield where_set(self, "param_groups", DecoupledLionWConfig._groups)

    def _groups(self) -> Iterator[Problem]:
        for index, group in enumerate(self.param_groups):
            yield from _of_lion(group, f"param_groups[{index}].")
            if group.eps is not None:
                yield f"param_groups[{index}].eps", "decoupled_lionw has none. Remove it."


@dataclass(frozen=True, kw_only=True)
class DecoupledAdamWConfig(_AnyOptimizerConfig):
    """AdamW (https://arxiv.org/abs/1711.05101) with weight decay decoupled from the learning rate.

    Attributes:
        eps: Added to the denominator.
        amsgrad: Divide by the largest second moment so far.
    """

    name: Literal["decoupled_adamw"] = "decoupled_adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-5
    eps: float = 1e-8
    amsgrad: bool = False

    limits: ClassVar = {**_LIMITS, "eps": _EPS}


@dataclass(frozen=True, kw_only=True)
class OwnOptimizerConfig(Section):
    """An optimizer of your own, a class in `plugins.optimizers`, with the arguments of its signature.

    Attributes:
        name: Its name in the table.
        disable_grad: Regular expressions; parameters whose names match any of them are frozen.
        param_groups: Parameters with their own settings.
    """

    name: str
    disable_grad: tuple[str, ...] = ()
    param_groups: tuple[ParamGroupConfig, ...] = ()


OptimizerConfig = (
    DecoupledLionWConfig
    | DecoupledAdamWConfig
    | Annotated[
        OwnOptimizerConfig, Own("the name of an own one", plugins.optimizers, OwnOptimizerConfig, supplied=1)
    ]
)


# Keys of our optimizers that say how a step is made.
_StepKey = Literal["fused", "bf16_weights", "momentum_dtype"]


def choice_of(optimizer: OptimizerConfig, key: _StepKey) -> bool | str:
    """The value of a key; false of an optimizer without it, and of your own, whatever its arguments are."""
    return False if isinstance(optimizer, OwnOptimizerConfig) else getattr(optimizer, key, False)


@dataclass(frozen=True, kw_only=True)
class GradientClippingConfig(Section):
    """Gradients that are too large are reduced before each step.

    Attributes:
        clipping_type: `norm` scales all gradients so that their norm is at most the threshold; `value` clamps
            every element to [-threshold, threshold].
        clipping_threshold: The threshold.
    """

    clipping_type: Literal["norm", "value"]
    clipping_threshold: float

    limits: ClassVar = {"clipping_threshold": Limits(above=0, text=" is not positive. Use a number above 0.")}


@dataclass(frozen=True, kw_only=True)
class AlgorithmsConfig(Section):
    """Composer's algorithms by name.

    Attributes:
        gradient_clipping: Clip gradients. Default: only measure their norm, which is always logged.
    """

    gradient_clipping: GradientClippingConfig | None = None

    @classmethod
    def alternatives(cls) -> list[type]:
        """This section, with a key for each of the user's own algorithms."""
        return [with_own_keys(cls, plugins.algorithms)]


@dataclass(frozen=True, kw_only=True)
class _AnyScheduleConfig(Section):
    """What all schedules have.

    Attributes:
        name: The schedule.
        t_warmup: Length of the warmup.
        t_max: End of the schedule.
        scale_warmup: Only `false`: mptfoundry does not scale the length of a run.
    """

    name: str
    t_warmup: Duration
    t_max: Duration = "1dur"
    scale_warmup: Literal[False] = False

    def after_warmup(self, lr: float) -> str:
        """What the learning rate does after the warmup, in words; `lr` is the optimizer's."""
        raise NotImplementedError

    def _at_the_end(self, lr: float) -> str:
        return f"{lr:g} at {'the end' if self.t_max == '1dur' else self.t_max}"


@dataclass(frozen=True, kw_only=True)
class ConstantWithWarmupConfig(_AnyScheduleConfig):
    """Linear warmup, then a constant learning rate.

    Attributes:
        alpha: Factor on the learning rate after warmup.
    """

    name: Literal["constant_with_warmup"] = "constant_with_warmup"
    alpha: float = 1.0

    limits: ClassVar = {"alpha": _FACTOR}

    def after_warmup(self, lr: float) -> str:
        return f"then {lr * self.alpha:g}"


@dataclass(frozen=True, kw_only=True)
class CosineWithWarmupConfig(_AnyScheduleConfig):
    """Linear warmup, then decay along half a cosine.

    Attributes:
        alpha_f: Factor on the learning rate at the end.
    """

    name: Literal["cosine_with_warmup"] = "cosine_with_warmup"
    alpha_f: float = 0.0

    limits: ClassVar = {"alpha_f": _FACTOR}

    def after_warmup(self, lr: float) -> str:
        return f"then along a cosine to {self._at_the_end(lr * self.alpha_f)}"


@dataclass(frozen=True, kw_only=True)
class LinearDecayWithWarmupConfig(_AnyScheduleConfig):
    """Linear warmup, then linear decay.

    Attributes:
        alpha_i: Factor on the learning rate after warmup.
        alpha_f: Factor on the learning rate at the end.
    """

    name: Literal["linear_decay_with_warmup"] = "linear_decay_with_warmup"
    alpha_i: float = 1.0
    alpha_f: float = 0.0

    limits: ClassVar = {"alpha_i": _FACTOR, "alpha_f": _FACTOR}

    def after_warmup(self, lr: float) -> str:
        return f"then along a line to {self._at_the_end(lr * self.alpha_f)}"


@dataclass(frozen=True, kw_only=True)
class InvSqrtWithWarmupConfig(_AnyScheduleConfig):
    """Linear warmup, decay as 1 / sqrt(time), and linear cooldown at the end.

    No length may be a fraction of the run (`dur`), because the schedule is for runs that are extended.

    Attributes:
        t_scale: How slowly the inverse square root decays: it is 1 / sqrt(2) this long after warmup.
        t_cooldown: Length of the linear cooldown.
        alpha_f_decay: Factor on the learning rate that the inverse square root approaches.
        alpha_f_cooldown: Factor on the learning rate at the end.
    """

    name: Literal["inv_sqrt_with_warmup"] = "inv_sqrt_with_warmup"
    t_scale: Duration
    t_cooldown: Duration
    alpha_f_decay: float = 0.0
    alpha_f_cooldown: float = 0.0

    limits: ClassVar = {"alpha_f_decay": _FACTOR, "alpha_f_cooldown": _FACTOR}

    def rules(self) -> Rules:
        yield from map(self._no_fraction, ("t_warmup", "t_scale", "t_cooldown"))
        yield self._scale()
        yield self._decays()

    def after_warmup(self, lr: float) -> str:
        last = self._at_the_end(lr * self.alpha_f_cooldown)
        slope = f"falling as 1 / sqrt(time) on the scale of {self.t_scale}"
        return f"{slope}, in the last {self.t_cooldown} to {last}"

    def _no_fraction(self, name: str) -> Iterator[Problem]:
        length = getattr(self, name)
        if parse_duration(length)[1] == "dur":
            yield name, f"{length} is a fraction of the run. Use batches or tokens."

    def _scale(self) -> Iterator[Problem]:
        if parse_duration(self.t_scale)[0] == 0:
            yield "t_scale", f"{self.t_scale} is not positive. Use 1ba or more."

    def _decays(self) -> Iterator[Problem]:
        if self.alpha_f_decay < self.alpha_f_cooldown:
            yield (
                "alpha_f_cooldown",
                f"{self.alpha_f_cooldown} is above alpha_f_decay: {self.alpha_f_decay}. The learning rate "
                "has to fall.",
            )


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig(_AnyScheduleConfig):
    """Linear warmup, a constant learning rate, and decay at the end (https://arxiv.org/abs/2404.06395).

    Attributes:
        t_decay: Length of the decay.
        alpha_f: Factor on the learning rate at the end.
        decay: Shape of the decay: a line, half a cosine, or 1 - sqrt(fraction of the decay that has passed).
    """

    name: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    t_decay: Duration = "0.1dur"
    alpha_f: float = 0.0
    decay: Literal["linear", "cosine", "sqrt"] = "linear"

    limits: ClassVar = {"alpha_f": _FACTOR}

    def after_warmup(self, lr: float) -> str:
        last = self._at_the_end(lr * self.alpha_f)
        return f"level, in the last {self.t_decay} falling ({self.decay}) to {last}"


@dataclass(frozen=True, kw_only=True)
class OwnScheduleConfig(Section):
    """A schedule of your own, a class or function in `plugins.schedulers`, with its arguments.

    Attributes:
        name: Its name in the table.
    """

    name: str


SchedulerConfig = (
    ConstantWithWarmupConfig
    | CosineWithWarmupConfig
    | LinearDecayWithWarmupConfig
    | InvSqrtWithWarmupConfig
    | WarmupStableDecayConfig
    | Annotated[OwnScheduleConfig, Own("the name of an own one", plugins.schedulers, OwnScheduleConfig)]
)


def _of_lion(section: ParamGroupConfig | _AnyOptimizerConfig, prefix: str) -> Iterator[Problem]:
    """A step divides by the highest learning rate, and takes the share `weight_decay` of every weight."""
    if section.lr == 0:
        yield f"{prefix}lr", f"{section.lr} is not positive. Use a number above 0."
    if section.weight_decay is not None and section.weight_decay >= 1:
        text = "Use 0 or more and less than 1: the share of every weight that a step takes at full rate."
        yield f"{prefix}weight_decay", f"{section.weight_decay}. {text}"


def _betas(section: ParamGroupConfig | _AnyOptimizerConfig) -> Iterator[Problem]:
    if not all(0 <= beta < 1 for beta in section.betas or ()):
        yield "betas", f"{list(section.betas or ())}. Use two numbers of 0 or more and less than 1."
