"""The `optimizer` and `scheduler` sections, each a class for each `name`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mptfoundry.config.durations import Duration, parse_duration


@dataclass(frozen=True, kw_only=True)
class ParamGroupConfig:
    """Parameters with settings of their own; what is not given is as in the optimizer.

    Attributes:
        param_str_match: Regular expression searched for in the parameters' names, such as `norm|bias`; a
            parameter belongs to the first group that matches.
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


@dataclass(frozen=True, kw_only=True)
class DecoupledLionWConfig:
    """LION (https://arxiv.org/abs/2302.06675) with weight decay apart from the learning rate's size.

    Attributes:
        name: The optimizer.
        lr: Learning rate at the top of the schedule; LION's is 3 to 10 times smaller than AdamW's.
        betas: Weight of the old momentum in the update, and in the next momentum.
        weight_decay: A step shrinks weights by `weight_decay * lr / initial lr`.
        disable_grad: Regular expressions; parameters whose names match any of them stay as they are.
        param_groups: Parameters with settings of their own.
    """

    name: Literal["decoupled_lionw"] = "decoupled_lionw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    disable_grad: tuple[str, ...] = ()
    param_groups: tuple[ParamGroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.betas, self.weight_decay)
        _check_patterns(self.disable_grad, self.param_groups)
        for index, group in enumerate(self.param_groups):
            if group.eps is not None:
                raise ValueError(f"param_groups[{index}].eps: decoupled_lionw has none. Remove it.")


@dataclass(frozen=True, kw_only=True)
class DecoupledAdamWConfig:
    """AdamW (https://arxiv.org/abs/1711.05101) with weight decay apart from the learning rate's size.

    Attributes:
        name: The optimizer.
        lr: Learning rate at the top of the schedule.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: A step shrinks weights by `weight_decay * lr / initial lr`.
        amsgrad: Divide by the largest second moment so far.
        disable_grad: Regular expressions; parameters whose names match any of them stay as they are.
        param_groups: Parameters with settings of their own.
    """

    name: Literal["decoupled_adamw"] = "decoupled_adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    amsgrad: bool = False
    disable_grad: tuple[str, ...] = ()
    param_groups: tuple[ParamGroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.betas, self.weight_decay)
        _check_patterns(self.disable_grad, self.param_groups)
        if self.eps <= 0:
            raise ValueError(f"eps: {self.eps} is not positive. Use a small positive number, such as 1e-8.")


OptimizerConfig = DecoupledLionWConfig | DecoupledAdamWConfig


@dataclass(frozen=True, kw_only=True)
class ConstantWithWarmupConfig:
    """The learning rate rises linearly, then stays.

    Attributes:
        name: The schedule.
        t_warmup: Length of the rise.
        alpha: Factor on the learning rate after it.
        t_max: End of the schedule.
        scale_warmup: Only `false`: runs here are never scaled.
    """

    name: Literal["constant_with_warmup"] = "constant_with_warmup"
    t_warmup: Duration
    alpha: float = 1.0
    t_max: Duration = "1dur"
    scale_warmup: Literal[False] = False


@dataclass(frozen=True, kw_only=True)
class CosineWithWarmupConfig:
    """The learning rate rises linearly, then falls along half a cosine.

    Attributes:
        name: The schedule.
        t_warmup: Length of the rise.
        t_max: End of the fall.
        alpha_f: Factor on the learning rate at the end.
        scale_warmup: Only `false`: runs here are never scaled.
    """

    name: Literal["cosine_with_warmup"] = "cosine_with_warmup"
    t_warmup: Duration
    t_max: Duration = "1dur"
    alpha_f: float = 0.0
    scale_warmup: Literal[False] = False


@dataclass(frozen=True, kw_only=True)
class LinearDecayWithWarmupConfig:
    """The learning rate rises linearly, then falls linearly.

    Attributes:
        name: The schedule.
        t_warmup: Length of the rise.
        alpha_i: Factor on the learning rate at the top.
        alpha_f: Factor on the learning rate at the end.
        t_max: End of the fall.
        scale_warmup: Only `false`: runs here are never scaled.
    """

    name: Literal["linear_decay_with_warmup"] = "linear_decay_with_warmup"
    t_warmup: Duration
    alpha_i: float = 1.0
    alpha_f: float = 0.0
    t_max: Duration = "1dur"
    scale_warmup: Literal[False] = False


@dataclass(frozen=True, kw_only=True)
class InvSqrtWithWarmupConfig:
    """The learning rate rises linearly, falls as 1 / sqrt(time), and falls linearly at the end.

    No length may be a share of the run (`dur`), since the schedule is made for runs that go on.

    Attributes:
        name: The schedule.
        t_warmup: Length of the rise.
        t_scale: How slowly the inverse square root falls: after this time beyond the rise it is 1 / sqrt(2).
        t_cooldown: Length of the linear fall at the end.
        t_max: End of the schedule.
        alpha_f_decay: Factor on the learning rate that the inverse square root tends to.
        alpha_f_cooldown: Factor on the learning rate at the end.
    """

    name: Literal["inv_sqrt_with_warmup"] = "inv_sqrt_with_warmup"
    t_warmup: Duration
    t_scale: Duration
    t_cooldown: Duration
    t_max: Duration = "1dur"
    alpha_f_decay: float = 0.0
    alpha_f_cooldown: float = 0.0

    def __post_init__(self) -> None:
        for name in ("t_warmup", "t_scale", "t_cooldown"):
            if parse_duration(getattr(self, name))[1] == "dur":
                raise ValueError(
                    f"{name}: {getattr(self, name)} is a share of the run. Use batches or tokens."
                )
        if self.alpha_f_decay < self.alpha_f_cooldown:
            raise ValueError(
                f"alpha_f_cooldown: {self.alpha_f_cooldown} is above alpha_f_decay: {self.alpha_f_decay}. "
                "The learning rate has to fall."
            )


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig:
    """The learning rate rises linearly, stays, and falls at the end (https://arxiv.org/abs/2404.06395).

    Attributes:
        name: The schedule.
        t_warmup: Length of the rise.
        t_decay: Length of the fall.
        t_max: End of the fall.
        alpha_f: Factor on the learning rate at the end.
        decay: Form of the fall: a line, or 1 - sqrt(time since it began).
    """

    name: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    t_warmup: Duration
    t_decay: Duration = "0.1dur"
    t_max: Duration = "1dur"
    alpha_f: float = 0.0
    decay: Literal["linear", "one_minus_sqrt"] = "linear"


SchedulerConfig = (
    ConstantWithWarmupConfig
    | CosineWithWarmupConfig
    | LinearDecayWithWarmupConfig
    | InvSqrtWithWarmupConfig
    | WarmupStableDecayConfig
)


def _check_rates(lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    if lr < 0:
        raise ValueError(f"lr: {lr} is negative. Use a positive number, such as 1e-4.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: {list(betas)}. Use two numbers of 0 or more and less than 1.")
    if weight_decay < 0:
        raise ValueError(f"weight_decay: {weight_decay} is negative. Use 0 or more.")


def _check_patterns(disable_grad: tuple[str, ...], groups: tuple[ParamGroupConfig, ...]) -> None:
    patterns = [("disable_grad", pattern) for pattern in disable_grad]
    patterns += [(f"param_groups[{i}].param_str_match", g.param_str_match) for i, g in enumerate(groups)]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}: '{pattern}' is no regular expression: {error}.") from None
