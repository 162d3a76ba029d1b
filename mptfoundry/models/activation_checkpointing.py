"""Activation checkpointing and offloading for parts of blocks.

It is applied before sharding, so it works the same with FSDP, with DDP and on one device. FSDP's hooks stay
outside: weights are gathered once for recomputation and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The attribute names of a block's parts; the block itself has none.
MODULES = {"block": ("",), "attention": ("attn",), "mlp": ("ffn",), "norm": ("norm_1", "norm_2")}


def checkpoint_activations(
    network: Any, parts: Mapping[str, Iterable[int]], *, recompute: bool = True, offload: bool = False
) -> None:
    """Change how parts of `network.transformer.blocks` save activations; results don't change.

    Args:
        network: The network; its parameters may still be on the meta device.
        parts: Maps `block`, `attention`, `mlp`, `norm` or `act_fn` to indices of blocks; `act_fn` can only be
            recomputed, not offloaded.
        recompute: Save only the inputs, and run forward again in backward, with the same dropout.
        offload: Save tensors in CPU memory, except weights.
    """
    for part, blocks in parts.items():
        for number in blocks:
            block = network.transformer.blocks[number]
            if part in OUTPUTS and recompute and not offload:
                name, mixin = OUTPUTS[part]
                module = block.get_submodule(name)
                module.__class__ = _mixed(mixin, module.__class__)
                continue
            for name in MODULES[part]:
                module = block.get_submodule(name)
                module.recomputes, module.offloads = recompute, offload
                module.__class__ = _mixed(Checkpointed, module.__class__)


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


class RecomputedNorms(nn.Module):
    """A mixin in front of a block's own class: the outputs of its norms are computed again in backward.

    A norm's input is saved for the norm itself; its output is as large, and saved for the matrix after it.
    """

    norm_1: nn.Module
    norm_2: nn.Module

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """The result of the block's own forward."""
        if torch.compiler.is_compiling():  # the compiler decides this itself
            return super().forward(x, context)
        made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        hooks = [norm.register_forward_hook(partial(_note, made)) for norm in (self.norm_1, self.norm_2)]
        try:
            with saved_tensors_hooks(partial(_pack, made), _unpack):
                return super().forward(x, context)
        finally:
            made.clear()
            for hook in hooks:
                hook.remove()


class RecomputedActFn(nn.Module):
    """A mixin in front of FFN: the output of the activation function is computed again in backward.

    Its input is saved for the function itself; its output is as large, and saved for `down_proj`. In the
    gated form this is so for the function's output and for the product with `up_proj`'s.
    """

    act: Callable[[Tensor], Tensor]
    up_proj: nn.Module
    gate_proj: nn.Module | None
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The result of FFN's own forward, from the same operators."""
        if torch.compiler.is_compiling():  # the compiler decides this itself
            return super().forward(x)
        up = self.up_proj(x)
        gate = up if self.gate_proj is None else self.gate_proj(x)
        again: Callable[[], Tensor] = partial(_again, self.act, (gate.detach(),), _autocast(x))
        made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        with saved_tensors_hooks(partial(_pack, made), _unpack):
            hidden = self.act(gate)
            if self.act is F.relu:  # its own backward needs the output, and not the input
                again = hidden.detach
            else:
                made[hidden.untyped_storage()._cdata] = hidden, again
            if self.gate_proj is not None:
                hidden = hidden * up
                made[hidden.untyped_storage()._cdata] = hidden, partial(_product, again, up.detach())
            try:
                return self.down_proj(hidden)
            finally:
                made.clear()


# The parts of which the outputs are recomputed from what their own backward needs: the module and its mixin.
OUTPUTS: dict[str, tuple[str, Any]] = {
    "norm": ("", RecomputedNorms),
    "act_fn": ("ffn", RecomputedActFn),
}


def _note(made: dict[int, Any], norm: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    """Remember how a norm's output is made. The output itself is kept so that no tensor takes its place."""
    (x,) = args
    if out.dtype == x.dtype:  # or else the matrix saves a copy of its own
        made[out.untyped_storage()._cdata] = out, partial(_again, norm, (x.detach(),), _autocast(x))


def _pack(made: dict[int, Any], tensor: Tensor) -> Any:
    if (entry := made.get(tensor.untyped_storage()._cdata)) is None:
        return tensor
    return entry[1], tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, size, stride, offset = packed
    return again().as_strided(size, stride, offset)


def _autocast(x: Tensor) -> dict[str, Any]:
    kind = x.device.type
    enabled = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "enabled": enabled, "dtype": torch.get_autocast_dtype(kind)}


def _again(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], autocast: dict[str, Any]) -> Tensor:
    with torch.no_grad(), torch.autocast(**autocast):
        return function(*inputs)


def _product(again: Callable[[], Tensor], up: Tensor) -> Tensor:
    return again() * up


@cache
def _mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    # Swap the class as FSDP2 does: names, state dicts, `isinstance` and deepcopy keep working.
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})


def _offloading(module: nn.Module) -> saved_tensors_hooks:
    """Saves autograd's tensors in CPU memory, pinned if they come from a GPU, except weights."""
    copies = (getattr(each, "compute_weight", None) for each in module.modules())
    kept = [*module.parameters(), *(copy for copy in copies if copy is not None)]
    weights = {tensor.untyped_storage().data_ptr() for tensor in kept}
    offload = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight else offload.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else offload.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
