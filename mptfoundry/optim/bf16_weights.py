"""bfloat16 copies of the blocks' matrices, for training under bfloat16 autocast on one device.

Autocast casts each float32 weight once for each microbatch, and each of its gradients back. Here a matrix has
a copy in bfloat16 that stays in memory and that forward uses. The parameters stay float32: the optimizer
updates them, and checkpoints hold them. Products and gradients are bit for bit those of autocast.

A copy is a leaf of autograd's graph, and its gradient becomes the parameter's: the gradient of a single
microbatch stays in bfloat16 where the optimizer and clipping read that; those of several are summed in
float32.

A copy is made again when its weight has changed: PyTorch counts the changes of a tensor (`_version`). A fused
LION writes weight and copy together. After a step of any other optimizer all copies are made again, because
not all of PyTorch's fused kernels count.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mptfoundry.mpt.linear import Linear
from mptfoundry.mpt.norm import compute_dtype

STALE = -1


@dataclass
class Copy:
    """A weight in bfloat16.

    Attributes:
        tensor: Of the weight's shape, on its device.
        version: The weight's `_version` of which it is a copy, or `STALE`.
    """

    tensor: Tensor
    version: int = STALE


def use_bf16_weights(network: Any, optimizer: torch.optim.Optimizer, *, bf16_gradients: bool) -> None:
    """Give the matrices of a network's blocks copies in bfloat16, from the next forward pass on.

    Args:
        network: With its blocks in `transformer.blocks`; it may still move to another device.
        optimizer: Of this network. If it has `bf16_copies`, it writes the copies in its step.
        bf16_gradients: The gradient of a single microbatch stays in bfloat16. This needs `Tensor.grad_dtype`
            of PyTorch, and an optimizer and clipping that compute with it in float32.
    """
    layers = [layer for layer in network.transformer.blocks.modules() if isinstance(layer, Linear)]
    copies: dict[Tensor, Copy] = {}
    network.register_forward_pre_hook(lambda *_: _refresh(layers, copies, bf16_gradients))
    if hasattr(optimizer, "bf16_copies"):
        optimizer.bf16_copies = copies
    else:
        optimizer.register_step_post_hook(lambda *_: _mark_stale(copies))


def _refresh(layers: list[Linear], copies: dict[Tensor, Copy], bf16_gradients: bool) -> None:
    """Bring all copies to the values of their weights; nothing waits for the device."""
    if compute_dtype(layers[0].weight) != torch.bfloat16:
        return
    stale = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            weight, copy = layer.weight, copies.get(layer.weight)
            if copy is None or copy.tensor.device != weight.device:
                copies[weight] = copy = Copy(_make_copy(layer, bf16_gradients))
            if copy.version != weight._version:
                stale.append((copy, weight))
        if stale:
            torch._foreach_copy_([copy.tensor for copy, _ in stale], [weight for _, weight in stale])
    for copy, weight in stale:
        copy.version = weight._version


def _mark_stale(copies: dict[Tensor, Copy]) -> None:
    for copy in copies.values():
        copy.version = STALE


def _make_copy(layer: Linear, bf16_gradients: bool) -> Tensor:
    """An empty copy of the layer's weight; its gradients become the weight's."""
    copy = torch.empty_like(layer.weight, dtype=torch.bfloat16).requires_grad_(layer.weight.requires_grad)
    layer.compute_weight = copy
    if copy.requires_grad:
        if bf16_gradients:
            layer.weight.grad_dtype = None  # any
        # The copy belongs to the layer, so it must not keep the layer in memory.
        copy.register_post_accumulate_grad_hook(partial(_hand_over, weakref.ref(layer), bf16_gradients))
    return copy


def _hand_over(owner: weakref.ref[nn.Linear], bf16_gradients: bool, copy: Tensor) -> None:
    """Add the gradient of a microbatch to that of the weight."""
    layer = owner()
    assert layer is not None and copy.grad is not None
    weight, gradient, copy.grad = layer.weight, copy.grad, None
    if weight.grad is not None:
        weight.grad = weight.grad.float().add_(gradient)
    else:
        weight.grad = gradient if bf16_gradients else gradient.float()
