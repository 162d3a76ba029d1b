"""peft's adapters in a network: their initial values and their checkpoints.

peft replaces a matrix with a module that holds it as `base_layer` next to `lora_A` and `lora_B`. The rest of
the network doesn't change: FSDP wraps its blocks as before. A checkpoint holds only the adapters and a
fingerprint of the base; a resumed run reads the base's weights again.
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
    """Returns a parameter's initial value, whole or the rows (start, stop)."""

    def __call__(self, name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None, /) -> Tensor:
        """The value on the CPU, in any dtype."""


def add_adapters(
    network: nn.Module,
    options: Mapping[str, Any],
    *,
    targets: tuple[str, ...],
    fingerprint: Tensor,
    seed: int,
) -> None:
    """Add adapters to a network, in place; afterwards only they are trainable.

    Args:
        network: If its parameters are on the meta device, so are the adapters.
        options: Options of peft's `LoraConfig`.
        targets: Names of the modules that get an adapter.
        fingerprint: (32,) uint8, of the base's weights.
        seed: For `lora_A`; `lora_B` is zero, so that the network's output is the base's at first.

    Raises:
        ConfigError: peft can't be imported.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"model.peft_config: peft can't be imported ({error}). Install it, or a version that fits "
            "transformers: pip install --upgrade peft."
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
    """Whether a parameter of this name belongs to an adapter."""
    return ADAPTER in name


def draw_adapter(name: str, shape: tuple[int, ...], seed: int, rows: tuple[int, int] | None = None) -> Tensor:
    """peft's initial values: `lora_A` (r, in) uniform within 1 / sqrt(in), `lora_B` zero."""
    bound = 0.0 if ".lora_B." in name else 1 / math.sqrt(shape[1])
    return draw_numbers(("uniform", (-bound, bound)), name, shape, seed, rows)


def with_adapters(first_value: FirstValue, seed: int) -> FirstValue:
    """Initial values of a network with adapters; `first_value` returns those of the base."""

    def value(name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None) -> Tensor:
        if is_adapter(name):
            return draw_adapter(name, shape, seed, rows)
        return first_value(name.replace(BASE, "."), shape, rows)

    return value


def keep_adapters_alone(model: nn.Module) -> None:
    """Exclude the base from the model's state dicts, both when saving and when loading."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and not _is_kept(name)]:
            del state[name]

    def not_missed(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if _is_kept(name)]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(not_missed)


def _is_kept(name: str) -> bool:
    return is_adapter(name) or name.endswith(FINGERPRINT)
