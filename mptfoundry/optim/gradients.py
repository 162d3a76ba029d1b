"""The norm of all gradients together, and functions that make gradients smaller; without Composer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

# Avoids division by zero; PyTorch's clip_grad_norm_ uses the same value.
EPSILON = 1e-6


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-d float32; a shard of a DTensor counts once."""
    if not gradients:
        return torch.zeros(())
    groups: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, tuple(gradient.placements)) if isinstance(gradient, DTensor) else ()
        groups.setdefault(layout, []).append(local_part(gradient))
    squares = []
    for layout, shards in groups.items():
        parts = [shard for shard in shards if shard.numel()] or [shards[0].new_zeros(1)]
        is_mixed = len({part.dtype for part in parts}) > 1
        norms = _mixed_norms(parts) if is_mixed else torch._foreach_norm(parts, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        if layout:
            _add_other_shards(square, *layout)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _mixed_norms(parts: Sequence[Tensor]) -> list[Tensor]:
    """Norms in float32; each dtype has a call of its own, since PyTorch has no quick one for several."""
    norms: dict[int, Tensor] = {}
    for dtype in {part.dtype for part in parts}:
        some = [part for part in parts if part.dtype == dtype]
        norms |= zip(map(id, some), torch._foreach_norm(some, 2, dtype=torch.float32), strict=True)
    return [norms[id(part)] for part in parts]


def _add_other_shards(square: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(square, group=mesh.get_group(dimension))


def scale_to_norm(gradients: Sequence[Tensor], norm: Tensor, threshold: float) -> None:
    """Scale gradients, with this norm (0-d), in place by `threshold / norm` where that is below 1."""
    scale = scale_for_norm(norm, threshold)
    if scale.device.type == "cpu" and scale == 1:
        return
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], scale)


def scale_for_norm(norm: Tensor, threshold: float) -> Tensor:
    """What to multiply gradients with this norm by, so that it is at most `threshold`; 0-d, at most 1."""
    return (threshold / (norm + EPSILON)).clamp(max=1.0)


def clamp(parameters: Iterable[Tensor], threshold: float) -> None:
    """Clamp every element of the parameters' gradients to [-threshold, threshold], in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).clamp_(-threshold, threshold)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the whole tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
