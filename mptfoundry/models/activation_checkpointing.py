"""Activation checkpointing: parts of blocks are recomputed in backward, or their activations kept by the CPU.

It works on the network itself, before any sharding, so it is the same with FSDP, with DDP and on one device.
What FSDP does around a block's forward stays outside: weights are gathered once for recomputation and
backward.
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

# What a part of a block is called in it; the block itself has no name.
MODULES = {"block": ("",), "attention": ("attn",), "mlp": ("ffn",), "norm": ("norm_1", "norm_2")}


def checkpoint_activations(
    network: Any, parts: Mapping[str, Iterable[int]], *, recompute: bool = True, offload: bool = False
) -> None:
    """Change how parts of `network.transformer.blocks` keep their activations; the numbers stay the same.

    Args:
        network: The network; its parameters may still be on the meta device.
        parts: `block`, `attention`, `mlp`, `norm` -> numbers of blocks.
        recompute: Keep only the inputs, and run forward again in backward, with the same dropout.
        offload: Keep what is kept in the CPU's memory, weights excepted.
    """
    for part, blocks in parts.items():
        for number in blocks:
            for name in MODULES[part]:
                module = network.transformer.blocks[number].get_submodule(name)
                module.recomputes, module.offloads = recompute, offload
                module.__class__ = _checkpointed(module.__class__)


class Checkpointed(nn.Module):
    """Comes before a module's own class: its forward, with less kept for backward."""

    recomputes: bool
    offloads: bool

    def forward(self, *args: Any) -> Any:
        """What the module's own class returns."""
        forward = super().forward
        with _offloading(self) if self.offloads else nullcontext():
            if self.recomputes:
                return checkpoint(forward, *args, use_reentrant=False)
            return forward(*args)


@cache
def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    # As FSDP2 does it: names, state and `isinstance` stay as they are, and a copy is a copy.
    return type(f"Checkpointed{cls.__name__}", (Checkpointed, cls), {})


def _offloading(module: nn.Module) -> saved_tensors_hooks:
    """Keeps what autograd saves in the CPU's memory, pinned where it comes from a GPU; weights stay."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    offload = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight else offload.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else offload.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
