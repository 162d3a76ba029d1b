"""Bytes per parameter that a step of LION reads and writes on the pretended GPU, plain and in one pass.

For each it prints the bytes of all operators, and how many there are for each parameter.
"""

from __future__ import annotations

import json
from typing import Any

import machine
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

machine.pretend()

from mptfoundry.optim import lion, lion_fused  # noqa: E402

SHAPES = ((4096, 4096), (12288, 4096), (4096,))


class Traffic(TorchDispatchMode):
    """Bytes of what operators read and write, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        arguments = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in arguments if argument.is_write]
        is_view = any(each.alias_info is not None and not each.is_write for each in func._schema.arguments)
        if not is_view and func.namespace not in ("prim", "profiler"):
            made = [] if written else out
            self.bytes += sum(size(value) for value in (args, kwargs, written, made))
            self.operators += 1
        return out


def size(values: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def measure(kind: Any, scale: bool) -> dict[str, float]:
    """A step with the state of an earlier one."""
    with machine.FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES]
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer = kind(params, lr=1e-4, weight_decay=1e-5)
        optimizer.step()
        if scale:
            optimizer.gradient_scale = torch.empty((), device="cuda")
        with Traffic() as traffic:
            optimizer.step()
    numbers = sum(param.numel() for param in params)
    return {"bytes": round(traffic.bytes / numbers, 3), "operators": traffic.operators / len(SHAPES)}


results = {"plain": measure(lion.DecoupledLionW, False)}
results |= {
    f"fused{', clipped' * clips}": measure(lion_fused.DecoupledLionW, clips) for clips in (False, True)
}
print(json.dumps(results))
