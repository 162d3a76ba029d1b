"""A machine with one H200 that computes nothing, for programs that `conftest.start` starts.

Tensors on `cuda` are fake: they have a shape, a dtype and a device, but no data. Every operator, the autograd
engine and Composer run as on a GPU, so devices, dtypes, bytes, synchronizations and graph breaks can be seen.
Import this before mptfoundry.
"""

from __future__ import annotations

import collections
import traceback
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
MEMORY = 143_771 * 2**20


class _H200:
    name = "NVIDIA H200"
    major, minor = 9, 0
    total_memory = MEMORY
    multi_processor_count = 132
    regs_per_multiprocessor = 65_536
    max_threads_per_multi_processor = 2048
    warp_size = 32
    L2_cache_size = 60 * 2**20


_NOTHING = torch.zeros(16, dtype=torch.uint8)
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: _H200(),
    "get_device_name": lambda device=None: _H200.name,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "empty_cache": lambda: None,
    "memory_stats": lambda *args: collections.defaultdict(int),
    "memory_allocated": lambda *args: 0,
    "memory_reserved": lambda *args: 0,
    "max_memory_allocated": lambda *args: 0,
    "reset_peak_memory_stats": lambda *args: None,
    "mem_get_info": lambda *args: (MEMORY, MEMORY),
    "get_rng_state": lambda *args: _NOTHING,
    "set_rng_state": lambda *args: None,
    "get_rng_state_all": lambda: [_NOTHING],
    "set_rng_state_all": lambda states: None,
    "default_generators": (torch.Generator(),),
}


def pretend() -> None:
    """Make torch believe in the GPU."""
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    fake_tensor.init_gpu_context = lambda device: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)


def move(network: torch.nn.Module) -> torch.nn.Module:
    """Give a network on `meta` parameters and buffers on the GPU; call it in a FakeTensorMode."""
    made: dict[int, Any] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and old.device.type != "cuda":
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                        is_parameter = table is module._parameters
                        made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
                    table[name] = made[id(old)]
    return network


_READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero")
_FINDS = (
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::bincount",
)
_KEEPS = ("aten::_to_copy", "aten::detach", "aten::clone", "aten::select.int", "aten::view")


class Device(TorchDispatchMode):
    """Runs operators on CUDA tensors without data, and records where the program waits for the device.

    Attributes:
        waits: How often, by what for and the function that waits, such as `read a number:
            mptfoundry/run/step_guard.py after_train_batch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        leaves = tree_leaves((args, kwargs))
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = kwargs.get("device") or next(
            (leaf for leaf in leaves if isinstance(leaf, torch.device)), None
        )
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if not (is_fake or to_gpu):
            return func(*args, **kwargs)
        if is_fake and name in _READS:
            self.note("read a number")
            return _value_of(args[0], name)
        if name in _FINDS:
            self.note(f"count for {name.partition('::')[2]}")
        if name == "aten::_to_copy" and not kwargs.get("non_blocking"):
            self._note_copy(args[0], target)
        value = None
        if name in _KEEPS and args[0].numel() == 1:
            value = getattr(args[0], "value", None) if isinstance(args[0], FakeTensor) else args[0].item()
        args, kwargs = tree_map(self._without_data, (args, kwargs))
        with self.mode:
            out = func(*args, **kwargs)
        if value is not None:
            out.value = value
        return out

    def _note_copy(self, source: torch.Tensor, target: Any) -> None:
        if target is None:
            return
        there = torch.device(target).type
        if there != source.device.type:
            self.note("copy to the device" if there == "cuda" else "copy from the device")

    def _without_data(self, leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            leaf.constant = None
            return leaf
        return self.mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def note(self, what: str) -> None:
        """Record that the program waits here."""
        for frame in reversed(traceback.extract_stack()):
            path = frame.filename
            if "/composer/" in path or path.startswith(f"{ROOT}/mptfoundry/"):
                shown = "composer/" + path.split("/composer/")[-1] if "/composer/" in path else path
                self.waits[f"{what}: {shown.removeprefix(f'{ROOT}/')} {frame.name}"] += 1
                return
        self.waits[f"{what}: elsewhere"] += 1

    def __enter__(self) -> Device:
        tensor = torch.tensor

        def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            # What torch does: a tensor on the CPU, and a copy that waits.
            made = tensor(data, *args, **kwargs)
            return made if device is None else made.to(device)

        def to_list(fake: torch.Tensor) -> Any:
            self.note("read a number")
            return torch.zeros(fake.shape, device="cpu").double().numpy().tolist()

        torch.tensor = make  # type: ignore[assignment]
        FakeTensor.tolist = to_list  # type: ignore[assignment]
        torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment]
        torch.Tensor.record_stream = lambda self, *args, **kwargs: None  # type: ignore[assignment]
        torch.cuda.synchronize = lambda *args: self.note("synchronize")  # type: ignore[assignment]
        return super().__enter__()


def _value_of(tensor: torch.Tensor, name: str) -> Any:
    if name in ("aten::equal", "aten::is_nonzero"):
        return True
    if (value := getattr(tensor, "value", None)) is not None:
        return value
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1
