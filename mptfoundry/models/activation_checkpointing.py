"""Activation checkpointing and offloading for parts of blocks.

It is applied before sharding, so it works the same with FSDP, with DDP and on one device. FSDP's hooks stay
outside: weights are gathered once for recomputation and backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# The attribute names of a block's parts; the block itself has none.
MODULES = {"block": ("",), "attention": ("attn",), "mlp": ("ffn",), "norm": ("norm_1", "norm_2")}


def checkpoint_activations(
    network: Any, parts: Mapping[str, Iterable[int]], *, recompute: bool = True, offload: bool = False
) -> None:
    """Change how parts of `network.transformer.blocks` save activations; results don't change.

    Args:
        network: The network; its parameters may still be on the meta device.
        parts: Maps `block`, `attention`, `mlp` or `norm` to indices of blocks.
        recompute: Save only the inputs, and run forward again in backward, with the same dropout.
        offload: Save tensors in CPU memory, except weights.
    """
    for part, blocks in parts.items():
        for number in blocks:
            for name in MODULES[part]:
                module = network.transformer.blocks[number].get_submodule(name)
                module.recomputes, module.offloads = recompute, offload
                module.__class__ = _checkpointed(module.__class__)


class Checkpointed(nn.Module):
    """A mixin in front of a module's own class: its forward saves less for backward."""

    recomputes: bool
    offloads: bool

    def forward(self, *args: Any) -> Any:
        """The result of the module's own forward."""
        forward = super().forward
        with _offloading(self) if self.offloads else nullcontext():
            if self.recomputes:
                return checkpoint(forward, *args, use_reentrant=False)
            return forward(*args)


@cache
def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    # Swap the class as FSDP2 does: names, state dicts, `isinstance` and deepcopy keep working.
    return type(f"Checkpointed{cls.__name__}", (Checkpointed, cls), {})


def _offloading(module: nn.Module) -> saved_tensors_hooks:
    """Saves autograd's tensors in CPU memory, pinned if they come from a GPU, except weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    offload = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight else offload.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else offload.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
