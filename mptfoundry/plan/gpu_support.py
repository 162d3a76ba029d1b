"""Whether the installed torch has code for this machine's GPUs and works with their driver.

Before torch is imported, its version.py and the table of install sets answer; afterwards torch itself does.
What is not known is not refused.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mptfoundry.errors import ConfigError
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.gpus import GPU
from mptfoundry.ranks import local_rank


class InstallSet(NamedTuple):
    """A set of versions that the project installs.

    Attributes:
        name: As in `make install SET=NAME`.
        cuda: The CUDA of its torch on PyPI, for x86.
        architectures: What this build has code for: `torch._C._cuda_getArchFlags()`.
        driver: The lowest driver that works.
    """

    name: str
    cuda: str
    architectures: tuple[str, ...]
    driver: str


# The lowest driver for each major version of CUDA ("minor version compatibility"): table 2 of NVIDIA's CUDA
# Toolkit release notes, docs.nvidia.com/cuda/cuda-toolkit-release-notes; 525.60.13 came with CUDA 12.0.
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580"}
# The preferred one first.
SETS = (
    InstallSet("current", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), DRIVERS[13]),
    InstallSet(
        "composer-pins",
        "12.6",
        ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
        DRIVERS[12],
    ),
)


class TorchBuild(NamedTuple):
    """An installed torch.

    Attributes:
        version: Such as `2.14.1+cu130`.
        cuda: Such as `13.0`; None if it is built without CUDA.
        architectures: What it has code for, such as `sm_90`; None if unknown.
    """

    version: str
    cuda: str | None
    architectures: tuple[str, ...] | None

    @property
    def title(self) -> str:
        """Its version and CUDA, for an error."""
        return f"{self.version.partition('+')[0]} (CUDA {self.cuda})"


AskTorch = Callable[[], TorchBuild | None]


def installed_torch() -> TorchBuild | None:
    """The installed torch, from its version.py; None if there is none, or if it is built for other GPUs."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    version, cuda, hip = (_assigned(name, text) for name in ("__version__", "cuda", "hip"))
    if version is None or hip is not None:
        return None
    # Other builds, such as those of NVIDIA's containers or for ARM, may have code for other GPUs.
    is_official = re.fullmatch(r"\d+\.\d+\.\d+\+cu\d+", version) and platform.machine() == "x86_64"
    known = next((each.architectures for each in SETS if each.cuda == cuda), None)
    return TorchBuild(version, cuda, known if is_official else None)


def imported_torch() -> TorchBuild | None:
    """The installed torch as it describes itself; None if it is built for other GPUs. CUDA is not started."""
    import torch

    if torch.version.hip is not None:
        return None
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None
    return TorchBuild(torch.__version__, torch.version.cuda, tuple(flags.split()) if flags else None)


def refuse_unsupported(device: Device, torch: AskTorch | None = None) -> None:
    """Raise ConfigError if torch can't compute on the GPUs of this machine; see `gpu_problem`."""
    if problem := gpu_problem(device, torch):
        error = ConfigError("{}: {}".format(*problem))
        error.of_this_machine = local_rank() == 0
        raise error


def gpu_problem(device: Device, torch: AskTorch | None = None) -> tuple[str, str] | None:
    """Why torch can't compute on the GPUs of a run on this machine.

    `torch` returns the torch that will compute, by default the installed one; asked only if there are GPUs.

    Returns:
        What is wrong, `driver` or `torch`, and why with what to do; None if nothing is known to be wrong.
    """
    if device.trouble is not None:
        return "driver", f"{device.trouble}. Repair it, or set CUDA_VISIBLE_DEVICES= to compute on the CPU."
    return _problem_of_gpus(device, (torch or installed_torch)()) if device.gpus else None


def _problem_of_gpus(device: Device, torch: TorchBuild | None) -> tuple[str, str] | None:
    if torch is None:
        return None
    problems = {gpu: _problem_of(gpu, torch) for gpu in device.gpus}
    working = [gpu for gpu, problem in problems.items() if problem is None]
    if len(working) == len(problems) or (working and not device.is_ordered):
        return None
    key, text = next(problem for problem in problems.values() if problem is not None)
    advice = _advice(key, device.gpus, torch)
    if working:
        names = " and ".join(dict.fromkeys(gpu.name for gpu in working))
        advice += f" Or use only the {names}: CUDA_VISIBLE_DEVICES."
    return key, f"{text} {advice}"


def describe_gpus(device: Device) -> list[str]:
    """The GPUs of this machine and the install sets that work with each, one line for each GPU."""
    lines = []
    for number, gpu in enumerate(device.gpus):
        memory = f"{gpu.memory / GIB:.1f} GiB" if gpu.memory else "memory unknown"
        capability = ".".join(map(str, gpu.capability)) if gpu.capability else "unknown"
        peak = f"{gpu.peak_flops / 1e12:g} TFLOP/s in bf16" if gpu.peak_flops else "peak unknown"
        if gpu.has_bf16 is False:
            peak = "no bf16"
        _, ready = sets_for([gpu])
        sets = " or ".join(each.name for each in ready) or "none"
        lines.append(
            f"GPU {number}: {gpu.name}, {memory}, compute capability {capability}, {peak}, "
            f"driver {gpu.driver or 'unknown'}; install sets that work: {sets}"
        )
    if not device.is_ordered:
        lines.append("The GPUs differ: with CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA counts them in this order")
    return lines


def runs_on(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures runs on a GPU of this compute capability.

    Machine code (`sm_86`) runs on GPUs of its major version whose minor version is not smaller, but with the
    suffix `a` on no other; PTX (`compute_90`) is compiled for any later GPU.
    """
    major, minor = capability
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        code = int(match[2]), int(match[3])
        if match[4] == "a":
            fits = code == capability
        elif match[1] == "compute" and not match[4]:
            fits = code <= capability
        else:
            fits = code[0] == major and code[1] <= minor
        if fits:
            return True
    return False


def sets_for(gpus: Iterable[GPU]) -> tuple[list[InstallSet], list[InstallSet]]:
    """The install sets that have code for all of the GPUs, and those of them that work with their driver."""
    gpus = tuple(gpus)
    able = [
        each
        for each in SETS
        if all(gpu.capability is None or runs_on(each.architectures, gpu.capability) for gpu in gpus)
    ]
    ready = [each for each in able if all(_is_new_enough(gpu.driver, each.driver) for gpu in gpus)]
    return able, ready


def _problem_of(gpu: GPU, torch: TorchBuild) -> tuple[str, str] | None:
    if torch.cuda is None:
        cpu = "To compute on the CPU, set CUDA_VISIBLE_DEVICES=."
        return "torch", f"version {torch.version} can't use the {gpu.name}: it is built without CUDA. {cpu}"
    if gpu.capability and torch.architectures and not runs_on(torch.architectures, gpu.capability):
        capability = ".".join(map(str, gpu.capability))
        return (
            "torch",
            f"version {torch.title} has no code for the {gpu.name} (compute capability {capability}).",
        )
    major = int(torch.cuda.partition(".")[0])
    lowest = DRIVERS.get(major)
    if lowest is None or _is_new_enough(gpu.driver, lowest) or (_cuda_of_driver() or 0) >= major:
        return None
    return "driver", f"{gpu.driver} is too old for torch {torch.title}, which needs {lowest} or newer."


def _advice(key: str, gpus: tuple[GPU, ...], torch: TorchBuild) -> str:
    able, ready = sets_for(gpus)
    if not able:
        kind = "all of these GPUs" if len({gpu.capability for gpu in gpus}) > 1 else "this GPU"
        return f"None of the project's install sets has code for {kind}."
    best = (ready or able)[0]
    install = f"nstall the set {best.name} (make install SET={best.name}, or the pip command that "
    install += f"mptfoundry doctor install={best.name} prints)"
    if ready:
        return f"Update the driver, or i{install}." if key == "driver" else f"I{install}."
    update = f"Update the driver to {best.driver} or newer"
    return f"{update}." if best.cuda == torch.cuda else f"{update}, and i{install}."


def _is_new_enough(driver: str | None, lowest: str) -> bool:
    """Whether a driver's version is not below another; unknown ones are."""
    return driver is None or _numbers(driver) >= _numbers(lowest)


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def _cuda_of_driver() -> int | None:
    """The CUDA major version of the driver's library: NVIDIA's package for forward compatibility replaces it
    with a newer one than the kernel's driver. None if it can't be loaded."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000


def _assigned(name: str, text: str) -> str | None:
    match = re.search(rf"^{name}\s*(?::[^=]+)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None
