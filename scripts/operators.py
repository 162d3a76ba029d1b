"""What the operators of a training step move and compute, and which part of the step they belong to."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = (
    "matrix products",
    "attention",
    "elementwise and norms",
    "casts and copies",
    "loss",
    "clipping",
    "optimizer",
)
# Position of the first factor among the arguments.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
_PRODUCTS |= {"aten::mm.out": 0, "aten::mm.dtype": 0, "aten::mm.dtype_out": 0}
_PRODUCTS |= {"aten::addmm.out": 1, "aten::addmm.dtype": 1, "aten::addmm.dtype_out": 1}
COPIES = ("aten::_to_copy", "aten::copy_", "aten::clone", "prims::convert_element_type")
# They allocate or look at a tensor, but launch no kernel. Other views are known by their schema.
_NO_KERNEL = (
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::detach",
    "aten::empty_like",
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::lift_fresh",
    "aten::scalar_tensor",
    "aten::promote_types",
    "prim::device",
)
# They write a few rows or numbers of a large tensor, or read a few of it: the size of their result counts.
_PICKS = ("aten::embedding", "aten::gather", "aten::index.Tensor", "aten::index_select")
_PUTS = ("aten::index_put_", "aten::scatter_add_", "aten::scatter_.src", "aten::scatter_.value")
# They write without reading what was there.
_FILLS = (
    *("aten::copy_", "aten::zero_", "aten::fill_.Scalar", "aten::fill_.Tensor"),
    *("aten::mm.out", "aten::mm.dtype_out"),
)
# Their kernels write an argument of this name without reading it.
_WRITTEN = {"mptfoundry_optim::lion_step": "copy"}
# Their kernels read an input of wide rows several times: for the maximum, the sum and the result.
_READ_AGAIN = {"aten::_log_softmax": 2, "aten::log_softmax.int_out": 2, "aten::native_layer_norm_backward": 1}
_READ_AGAIN |= {"mptfoundry_mpt::cross_entropy": 1}


@dataclass(frozen=True)
class Operator:
    """An operator that ran, or a kernel that was launched.

    Attributes:
        part: One of `PARTS`.
        name: Such as `aten::mm`.
        bytes: Read and written.
        flops: Of matrix products and attention; 0 for others.
        moments: Before and after it, if it is timed.
    """

    part: str
    name: str
    bytes: int
    flops: int = 0
    moments: tuple[Any, Any] | None = None


class Recorder(TorchDispatchMode):
    """Notes each operator that launches a kernel.

    Args:
        moment: This moment, before and after each operator; None: they are not timed.

    Attributes:
        phase: `forward`, `backward`, `clipping` or `optimizer`; the program that runs the step sets it.
        operators: In the order in which they ran.
    """

    def __init__(self, moment: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.phase = "forward"
        self.operators: list[Operator] = []
        self._moment = moment
        self._paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions may run under this mode, which sees what they call."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        started_at = self._moment() if self._moment else None
        out = func(*args, **kwargs)
        moments = (started_at, self._moment()) if self._moment else None
        name = func.name()
        if self._paused or func.is_view or name in _NO_KERNEL or name.startswith("profiler::"):
            return out
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        moved = bytes_of(name, inputs, outputs, _tensors(_mutated(func, args, kwargs)))
        moved -= sum(map(_size, _tensors(_argument(func, args, kwargs, _WRITTEN.get(name)))))
        flops = flops_of(name, [tuple(tensor.shape) for tensor in (*inputs, *outputs)])
        part = part_of(name, self.phase, is_loss=_is_called_by("mpt/loss.py"))
        self.operators.append(Operator(part, name, moved, flops, moments))
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing inside, because it is noted as something else."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def launch(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Note a launch of a Triton kernel by the bytes of its tensors: those that it reads, and writes."""
        if self._paused:
            return
        reads, writes = accesses(kernel)
        moved = 0
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                moved += _size(value) * ((name in reads) + (name in writes))
        name = f"triton::{kernel.fn.__name__}"
        self.operators.append(Operator(part_of(name, self.phase), name, moved))


def part_of(name: str, phase: str, *, is_loss: bool = False) -> str:
    """The part of a step that an operator belongs to."""
    if phase in ("clipping", "optimizer"):
        return phase
    if name in _PRODUCTS:
        return "matrix products"
    if "attention" in name:
        return "attention"
    if is_loss:
        return "loss"
    return "casts and copies" if name in COPIES else "elementwise and norms"


def flops_of(name: str, shapes: list[tuple[int, ...]]) -> int:
    """FLOPs of a matrix product or of causal attention, from the shapes of what it takes and gives; 0 else.

    Causal attention computes half of all pairs; its backward computes five products where forward has two.
    """
    if name in _PRODUCTS:
        first, second = shapes[_PRODUCTS[name] :][:2]
        return 2 * math.prod(first) * second[-1]
    is_backward = name.endswith("_backward")
    if name.endswith(("::attention", "::attention_backward")):
        batch, seq, heads, head_dim = shapes[0] if is_backward else shapes[-3]
    elif "scaled_dot_product" in name:
        batch, heads, seq, head_dim = shapes[0]
    else:
        return 0
    return 2 * batch * heads * seq * seq * head_dim * (5 if is_backward else 2) // 2


def bytes_of(
    name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], written: list[torch.Tensor]
) -> int:
    """Bytes that an operator reads and writes.

    Args:
        name: The operator's name.
        inputs: All tensors among its arguments.
        outputs: The tensors that it returns.
        written: Those of its arguments that it changes.
    """
    known = {id(tensor) for tensor in inputs}
    new = sum(_size(tensor) for tensor in outputs if id(tensor) not in known)
    changed = sum(map(_size, written))
    if name in _PICKS:
        return 2 * new
    if name in _PUTS:
        return 3 * min(map(_size, inputs))
    read = sum(map(_size, inputs)) - (changed if name in _FILLS else 0)
    again = _READ_AGAIN.get(name, 0) * _size(inputs[0]) if inputs else 0
    return read + again + new + changed


def accesses(kernel: Any) -> tuple[set[str], set[str]]:
    """The arguments of a Triton kernel that its code reads from, and those that it writes to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    origins = {name: {name} for name in kernel.arg_names}

    def names_in(node: ast.AST) -> set[str]:
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return set().union(*(origins.get(name, set()) for name in names))

    for _ in range(3):  # a pointer made of a pointer made of a pointer
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AugAssign)) and not _loads(node.value):
                for target in [node.target] if isinstance(node, ast.AugAssign) else node.targets:
                    if isinstance(target, ast.Name):
                        origins[target.id] = origins.get(target.id, set()) | names_in(node.value)
    reads: set[str] = set()
    writes: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr == "load":
                reads |= names_in(node.args[0])
            elif node.func.attr == "store" or node.func.attr.startswith("atomic_"):
                writes |= names_in(node.args[0])
    return reads, writes


def _loads(node: ast.AST) -> bool:
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr == "load" for call in calls)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator changes, by its schema."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return found


def _argument(func: Any, args: Any, kwargs: dict[str, Any], name: str | None) -> Any:
    """The value of an operator's argument; None if it has none of this name."""
    names = [argument.name for argument in func._schema.arguments] if name else []
    return args[names.index(name)] if name in names[: len(args)] else kwargs.get(name or "")


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; an expanded one is as large as what is stored of it."""
    size = tensor.numel() * tensor.element_size()
    return size if tensor.is_contiguous() else min(size, tensor.untyped_storage().nbytes())


def _is_called_by(path: str) -> bool:
    """Whether a function of this file is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(path):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
