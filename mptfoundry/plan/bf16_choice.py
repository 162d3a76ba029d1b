"""Whether a run keeps its matrices in bfloat16 next to the float32 weights: `optimizer.bf16_weights`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mptfoundry import plugins
from mptfoundry.config.optim import DecoupledAdamWConfig, DecoupledLionWConfig, OwnOptimizerConfig
from mptfoundry.config.run import TrainConfig
from mptfoundry.plan.devices import Device
from mptfoundry.plan.fsdp import Sharding
from mptfoundry.plan.packages import package_problem

# The first PyTorch whose float32 tensors can have gradients in bfloat16.
TORCH = "torch>=2.10"


def choose_bf16_weights(
    config: TrainConfig,
    device: Device,
    sharding: Sharding | None,
    fused: bool,
    fits: Callable[[TrainConfig], bool],
) -> tuple[bool, str]:
    """Resolve `optimizer.bf16_weights: auto` in amp_bf16; returns the value and the reason.

    `fits` says whether a config that decides this leaves room for as large a microbatch as one without.
    """
    reason = why_not_bf16_weights(config, device, "amp_bf16", sharding)
    if reason is None and not has_bf16_gradients(config, fused):
        reason = "it pays where a fused LION writes them, and reads gradients in bfloat16"
    if reason is None and not fits(with_bf16_weights(config, fused)):
        reason = "with them the microbatch would not fit"
    return reason is None, reason or "the optimizer's step writes them; no microbatch casts weights"


def why_not_bf16_weights(
    config: TrainConfig, device: Device, precision: str, sharding: Sharding | None
) -> str | None:
    """Why a run can't have such copies of its matrices, one clause; None if it can."""
    own = config.callbacks.keys() & plugins.callbacks.keys()
    if precision != "amp_bf16":
        return f"weights are cast to bfloat16 only in amp_bf16, not in {precision}"
    if sharding is not None:
        return "FSDP casts each shard once, when it gathers the weights"
    if device.count > 1:
        return "DDP averages the gradients of float32 weights"
    if config.model.bits or config.model.peft_config is not None:
        return "the base of adapters is frozen"
    if config.model.float8_recipe:
        return "products in float8 cast the weights themselves"
    if own or plugins.algorithms or isinstance(config.optimizer, OwnOptimizerConfig):
        return "code of your own may change weights without a trace, through `.data`"
    if device.is_here and package_problem(TORCH):
        return "gradients of another dtype than the weights' need torch 2.10 or newer"
    return None


def has_bf16_gradients(config: TrainConfig, fused: bool) -> bool:
    """Whether gradients of a single microbatch can stay in bfloat16, because all that reads them computes in
    float32: a fused LION, which also clips by norm."""
    clipping = config.algorithms.gradient_clipping
    clips_in_place = clipping is not None and clipping.clipping_type != "norm"
    is_lion = isinstance(config.optimizer, DecoupledLionWConfig) and fused
    return is_lion and not clips_in_place and "optimizer_monitor" not in config.callbacks


def with_bf16_weights(config: TrainConfig, fused: bool) -> TrainConfig:
    """The config with these two decided, for the estimate of memory."""
    assert isinstance(config.optimizer, DecoupledLionWConfig | DecoupledAdamWConfig)
    return replace(config, optimizer=replace(config.optimizer, fused=fused, bf16_weights=True))
