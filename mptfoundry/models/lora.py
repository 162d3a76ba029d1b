"""peft's adapters in a network: their first values, and what a checkpoint keeps of them.

peft replaces a matrix by a module that holds it as `base_layer` next to `lora_A` and `lora_B`. The rest of
the network stays as it was: FSDP wraps its blocks as before. A checkpoint has the adapters alone, and a
fingerprint of the base, whose weights a resumed run reads again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mptfoundry.architecture.trainable import ADAPTER, BASE
from mptfoundry.checkpoints.adapters import FINGERPRINT
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.init import draw_numbers


class FirstValue(Protocol):
    """Gives a parameter's first value, whole or the rows from the first to before the last."""

    def __call__(self, name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None, /) -> Tensor:
        """On the CPU, in any number format."""


def add_adapters(
    network: nn.Module,
    options: Mapping[str, Any],
    *,
    targets: tuple[str, ...],
    fingerprint: Tensor,
    seed: int,
) -> None:
    """Put adapters into a network, in place; from then on only they are trainable.

    Args:
        network: Its parameters may be on the meta device, and so are the adapters then.
        options: Of peft's `LoraConfig`.
        targets: Names of the modules that get one.
        fingerprint: (32,) uint8, of the base's weights.
        seed: Of `lora_A`; `lora_B` is zero, so that the network still computes what its base does.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "model.peft_config: needs the package peft. Install it: pip install 'mptfoundry[peft]'."
        ) from error
    device = next(network.parameters()).device
    config = LoraConfig(**{**options, "target_modules": list(targets)})
    inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    network.register_buffer(FINGERPRINT, fingerprint)
    if device.type == "meta":
        return
    for name, module in network.named_modules():
        if is_adapter(f"{name}."):
            module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_adapter(name):
                parameter.copy_(draw_adapter(name, tuple(parameter.shape), seed))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ADAPTER in name


def draw_adapter(name: str, shape: tuple[int, ...], seed: int, rows: tuple[int, int] | None = None) -> Tensor:
    """An adapter's first value in peft: `lora_A` (r, in) uniform up to 1 / sqrt(in), `lora_B` zero."""
    bound = 0.0 if ".lora_B." in name else 1 / math.sqrt(shape[1])
    return draw_numbers(("uniform", (-bound, bound)), name, shape, seed, rows)


def with_adapters(first_value: FirstValue, seed: int) -> FirstValue:
    """First values of a network with adapters; `first_value` gives those of the base."""

    def value(name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None) -> Tensor:
        if is_adapter(name):
            return draw_adapter(name, shape, seed, rows)
        return first_value(name.replace(BASE, "."), shape, rows)

    return value


def keep_adapters_alone(model: nn.Module) -> None:
    """Leave the base out of the state dicts of a model with adapters, both in saving and in loading."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and not _is_kept(name)]:
            del state[name]

    def not_missed(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if _is_kept(name)]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(not_missed)


def _is_kept(name: str) -> bool:
    return is_adapter(name) or name.endswith(FINGERPRINT)
