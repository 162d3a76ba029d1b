"""The GPUs that a process may use, as nvidia-smi describes them, and what is published about each kind.

torch is not imported and CUDA is not started. Memory is in bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

# nvidia-smi takes many seconds on a machine of eight GPUs without persistence mode.
SMI_TIMEOUT_SECONDS = 30
DRIVER = Path("/proc/driver/nvidia")
NO_DRIVER = "no GPU found: neither nvidia-smi nor /proc/driver/nvidia names one"
PCI = Path("/sys/bus/pci/devices")
DEVICE_FILES = Path("/dev")


class Kind(NamedTuple):
    """What is published about GPUs of a kind.

    Attributes:
        pattern: A regular expression for the name that nvidia-smi and torch print.
        gib: Memory, for machines where nvidia-smi doesn't say it.
        capability: Compute capability.
        tflops: Dense bf16 with float32 accumulation, without sparsity; None if it has no bf16, or if no
            public document gives the number.
        source: The document with the number.
    """

    pattern: str
    gib: int
    capability: tuple[int, int]
    tflops: float | None
    source: str


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, white paper, table 2"
_RTX_PRO = "NVIDIA RTX Blackwell PRO GPU Architecture, white paper"
_ADA = "NVIDIA Ada GPU Architecture, white paper, table 2"
# The first match counts. "Halved" marks a document that gives the number with sparsity only.
KINDS: tuple[Kind, ...] = (
    Kind(r"\bGB300\b", 268, (10, 3), 2500, "nvidia.com/data-center/gb300-nvl72: 360 PF for 72 GPUs, halved"),
    Kind(r"\bB300\b", 268, (10, 3), 2250, "nvidia.com/data-center/hgx: HGX B300, 36 PF for 8 GPUs, halved"),
    Kind(r"\bGB200\b", 184, (10, 0), 2500, "nvidia.com/data-center/gb200-nvl72: 360 PF for 72 GPUs, halved"),
    Kind(r"\bB200\b", 179, (10, 0), 2250, "nvidia.com/data-center/hgx: HGX B200, 36 PF for 8 GPUs, halved"),
    Kind(r"\bGH200 144G", 140, (9, 0), 989.4, "GH200 Superchip data sheet: 1,979, halved"),
    Kind(r"\bGH200\b", 95, (9, 0), 989.4, "GH200 Superchip data sheet: 1,979, halved"),
    Kind(r"\bH200 NVL", 140, (9, 0), 835.5, "nvidia.com/data-center/h200: 1,671, halved"),
    Kind(r"\bH200\b", 140, (9, 0), 989.4, "nvidia.com/data-center/h200: 1,979, halved"),
    Kind(r"\bH100.*NVL", 93, (9, 0), 835.5, "nvidia.com/data-center/h100: 1,671, halved"),
    Kind(r"\bH100.*PCIe", 80, (9, 0), 756, _HOPPER),
    Kind(r"\bH100\b", 80, (9, 0), 989.4, _HOPPER),
    Kind(r"\bA100.*40\s?GB", 40, (8, 0), 312, "NVIDIA A100 Tensor Core GPU data sheet"),
    Kind(r"\bA100\b", 80, (8, 0), 312, "NVIDIA A100 Tensor Core GPU data sheet"),
    Kind(r"\bA30\b", 24, (8, 0), 165, "NVIDIA A30 Tensor Core GPU data sheet"),
    Kind(r"\bA10\b", 22, (8, 6), 125, "NVIDIA A10 Tensor Core GPU data sheet"),
    Kind(r"\bL40S\b", 45, (8, 9), 362.05, "NVIDIA L40S data sheet"),
    Kind(r"\bL4\b", 22, (8, 9), 121, "NVIDIA L4 Tensor Core GPU data sheet: 242, halved"),
    Kind(r"\bRTX 3090 Ti", 24, (8, 6), None, "no public number"),
    Kind(r"\bRTX 3090\b", 24, (8, 6), 71, "NVIDIA Ampere GA102 GPU Architecture, white paper, appendix A"),
    Kind(r"\bRTX 4090 D", 24, (8, 9), None, "no public number"),
    Kind(r"\bRTX 4090\b", 24, (8, 9), 165.2, _ADA),
    Kind(r"\bRTX 6000 Ada\b", 48, (8, 9), 364.25, "RTX 6000 Ada data sheet: 728.5 in fp16, halved"),
    Kind(r"\bRTX 5090 D", 32, (12, 0), None, "no public number"),
    Kind(r"\bRTX 5090\b", 32, (12, 0), 209.5, "NVIDIA RTX Blackwell GPU Architecture, white paper, table 3"),
    Kind(
        r"\bRTX PRO 6000.*Max-Q", 95, (12, 0), 438.9, "NVIDIA RTX Blackwell PRO GPU Architecture, white paper"
    ),
    Kind(r"\bRTX PRO 6000.*Server", 95, (12, 0), None, "no public number in bf16"),
    Kind(r"\bRTX PRO 6000\b", 95, (12, 0), 503.8, _RTX_PRO),
    Kind(r"\bV100.*32\s?GB", 32, (7, 0), None, "no bf16: NVIDIA Tesla V100 GPU Architecture, white paper"),
    Kind(r"\bV100\b", 16, (7, 0), None, "no bf16: NVIDIA Tesla V100 GPU Architecture, white paper"),
    Kind(r"\bT4\b", 15, (7, 5), None, "no bf16: NVIDIA Turing GPU Architecture, white paper"),
)


@dataclass(frozen=True)
class GPU:
    """A GPU, or a MIG slice of one.

    Attributes:
        name: As nvidia-smi and torch print it.
        memory: Bytes; None if unknown.
        capability: Compute capability, such as (9, 0); None if unknown.
        driver: The version of the machine's driver, such as `580.95.05`; None if unknown.
        uuid: Its identifier in CUDA_VISIBLE_DEVICES, empty if unknown.
        profile: Of a MIG slice, such as `1g.10gb`.
        has_mig: Whether it is cut into slices; then only these compute.
    """

    name: str
    memory: int | None = None
    capability: tuple[int, int] | None = None
    driver: str | None = None
    uuid: str = ""
    profile: str = ""
    has_mig: bool = False

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s; None if unknown, as for a MIG slice."""
        kind = kind_of(self.name)
        return None if kind is None or kind.tflops is None or self.profile else kind.tflops * 1e12

    @property
    def has_bf16(self) -> bool | None:
        """Whether it multiplies in bf16 at full speed; None if unknown."""
        return None if self.capability is None else self.capability >= (8, 0)


# What a user may call a GPU, and the name by which it is found in the table.
SHORT_NAMES = {
    "gb300": "NVIDIA GB300",
    "b300": "NVIDIA B300",
    "gb200": "NVIDIA GB200",
    "b200": "NVIDIA B200",
    "gh200": "NVIDIA GH200",
    "h200": "NVIDIA H200",
    "h200-nvl": "NVIDIA H200 NVL",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-nvl": "NVIDIA H100 NVL",
    "h100-pcie": "NVIDIA H100 PCIe",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "a30": "NVIDIA A30",
    "a10": "NVIDIA A10",
    "l40s": "NVIDIA L40S",
    "l4": "NVIDIA L4",
    "rtx-3090": "NVIDIA GeForce RTX 3090",
    "rtx-4090": "NVIDIA GeForce RTX 4090",
    "rtx-5090": "NVIDIA GeForce RTX 5090",
    "rtx-6000-ada": "NVIDIA RTX 6000 Ada Generation",
    "rtx-pro-6000": "NVIDIA RTX PRO 6000 Blackwell",
    "v100-32gb": "Tesla V100-SXM2-32GB",
    "v100": "Tesla V100-SXM2-16GB",
    "t4": "Tesla T4",
}
_OTHER_NAMES = {"a100": "a100-80gb", "h100-80gb": "h100", "h100-sxm": "h100", "h200-sxm": "h200"}


def full_name(gpu: str) -> str:
    """The name in the table of a GPU that a user calls `h100` or `NVIDIA H100 80GB HBM3`."""
    short = re.sub(r"[\s_]+", "-", gpu.strip().lower())
    return SHORT_NAMES.get(_OTHER_NAMES.get(short, short), gpu)


def short_name(name: str) -> str | None:
    """What a user calls the GPU of this full name; None if the table has none of its kind."""
    kind = kind_of(name)
    return next((short for short, full in SHORT_NAMES.items() if kind and kind_of(full) == kind), None)


class Visible(NamedTuple):
    """The GPUs that a process may use.

    Attributes:
        gpus: In the order of nvidia-smi, or of CUDA_VISIBLE_DEVICES.
        found: How they were detected, or why there are none.
        trouble: Why the machine's GPUs can't be used, although it has some.
        is_ordered: Whether CUDA counts them in this order. If GPUs differ, it puts the fastest first unless
            CUDA_DEVICE_ORDER is PCI_BUS_ID, so a number may mean another GPU than nvidia-smi's.
    """

    gpus: tuple[GPU, ...]
    found: str
    trouble: str | None = None
    is_ordered: bool = True


def kind_of(name: str) -> Kind | None:
    """What is published about the GPU of this name; None if it is not in the table."""
    return next((kind for kind in KINDS if re.search(kind.pattern, name, re.IGNORECASE)), None)


def visible_gpus(environ: Mapping[str, str] = os.environ) -> Visible:
    """The GPUs that this process may use, after CUDA_VISIBLE_DEVICES."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    is_hidden = chosen is not None and chosen.strip() in {"", "-1"}
    gpus, how, trouble = _machine_gpus()
    if not gpus:
        return Visible((), how, None if is_hidden else trouble)
    return _visible_of(gpus, how, environ)


def _visible_of(gpus: list[GPU], how: str, environ: Mapping[str, str]) -> Visible:
    """Those of this machine's GPUs that the process may use."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    is_ordered = len({gpu.name for gpu in gpus}) == 1 or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    visible = Visible(tuple(gpus), f"found by {how}", is_ordered=is_ordered)
    return _with_slices(visible) if chosen is None else _chosen(chosen, gpus, visible)


def _chosen(chosen: str, gpus: list[GPU], all_gpus: Visible) -> Visible:
    """The GPUs that CUDA_VISIBLE_DEVICES names."""
    words = [word for word in chosen.replace(" ", "").split(",") if word]
    visible = tuple(_chosen_gpus(gpus, words))
    if not visible:
        return Visible((), f"CUDA_VISIBLE_DEVICES={chosen!r} hides the {len(gpus)} GPUs of this machine")
    is_ordered = all_gpus.is_ordered or not any(word.isdigit() for word in words)
    found = f"{all_gpus.found}, chosen by CUDA_VISIBLE_DEVICES={chosen}"
    return _with_slices(Visible(visible, found, is_ordered=is_ordered))


def _chosen_gpus(gpus: list[GPU], words: list[str]) -> Iterator[GPU]:
    """The GPUs that the words of CUDA_VISIBLE_DEVICES name; CUDA ignores what follows an invalid word."""
    named = [*gpus, *(part for gpu in gpus if gpu.has_mig for part in _slices(gpu))]
    has_uuids = any(gpu.uuid for gpu in gpus)
    for word in words:
        if word.isdigit():
            if int(word) >= len(gpus):
                return
            yield gpus[int(word)]
        elif has_uuids:
            match = next((gpu for gpu in named if gpu.uuid.startswith(word)), None)
            if match is None:
                return
            yield match
        elif word.startswith(("GPU-", "MIG-")):
            yield gpus[0]
        else:
            return


def _with_slices(visible: Visible) -> Visible:
    """A process uses one MIG slice at most: the first, where the first GPU is cut into slices."""
    parts = [part for gpu in visible.gpus for part in (_slices(gpu) if gpu.has_mig else [gpu])]
    if not parts:
        trouble = f"the {visible.gpus[0].name} is in MIG mode and has no slices"
        return visible._replace(gpus=(), found=trouble, trouble=trouble)
    if parts[0].profile:
        return visible._replace(gpus=(parts[0],), found=f"{visible.found}; a process uses one MIG slice")
    return visible._replace(gpus=tuple(part for part in parts if not part.profile))


def _slices(gpu: GPU) -> list[GPU]:
    """The MIG slices of a GPU, from `nvidia-smi -L`."""
    listing, _ = _nvidia_smi("-L")
    slices, is_inside = [], False
    for line in (listing or "").splitlines():
        if line.startswith("GPU "):
            is_inside = bool(gpu.uuid) and gpu.uuid in line
        match = re.search(r"MIG\s+(\S+)\s+Device.*UUID:\s*([^)]+)\)", line)
        if is_inside and match is not None:
            size = re.search(r"(\d+)gb", match[1])
            slices.append(
                replace(
                    gpu,
                    name=f"{gpu.name} MIG {match[1]}",
                    memory=int(size[1]) * 10**9 if size else None,
                    uuid=match[2],
                    profile=match[1],
                    has_mig=False,
                )
            )
    return slices


def _machine_gpus() -> tuple[list[GPU], str, str | None]:
    """All GPUs of this machine; how they were detected or why there are none; and what is wrong with them."""
    found = _gpus_of_smi() if shutil.which("nvidia-smi") else None
    if found is not None:
        return found
    return _driver_gpus() if DRIVER.is_dir() else ([], NO_DRIVER, None)


def _gpus_of_smi() -> tuple[list[GPU], str, str | None] | None:
    """The same from nvidia-smi; None if it can't be started or hangs."""
    query = "name,memory.total,driver_version,uuid"
    answer, error = _nvidia_smi(f"--query-gpu={query},compute_cap,mig.mode.current", *_AS_CSV)
    if answer is None and "not a valid field" in error:  # drivers before 510
        answer, error = _nvidia_smi(f"--query-gpu={query}", *_AS_CSV)
    if answer is not None:
        gpus = [_gpu_of(line) for line in answer.splitlines() if line.count(",") >= 3]
        return gpus, "nvidia-smi" if gpus else "no GPU found: nvidia-smi lists none", None
    if error and "no devices were found" not in error.lower():
        found = f"no GPU can be used: nvidia-smi says: {error}"
        return [], found, f"nvidia-smi says: {error}" if _has_nvidia_hardware() else None
    if error:
        return [], f"no GPU found: nvidia-smi says: {error}", None
    return None


_AS_CSV = ("--format=csv,noheader,nounits",)


def _nvidia_smi(*words: str) -> tuple[str | None, str]:
    """What nvidia-smi prints, or None and its error; the error is empty if it can't be started or hangs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=SMI_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None, ""
    if done.returncode == 0 and not done.stdout.startswith("No devices"):
        return done.stdout, ""
    lines = [line.strip() for line in f"{done.stderr}\n{done.stdout}".splitlines() if line.strip()]
    wrong = [line for line in lines if line.count(",") < 3] or [f"exit code {done.returncode}"]
    return None, wrong[0].rstrip(".")


def _gpu_of(line: str) -> GPU:
    name, memory, driver, uuid, *rest = (None if "[" in cell else cell.strip() for cell in line.split(","))
    capability, mig = rest if len(rest) == 2 else (None, None)
    gpu = GPU(
        name=name or "NVIDIA GPU",
        memory=int(memory) * 2**20 if memory and memory.isdigit() else None,
        capability=_capability_of(capability or ""),
        driver=driver,
        uuid=uuid or "",
        has_mig=mig == "Enabled",
    )
    return _completed(gpu)


def _completed(gpu: GPU) -> GPU:
    """Take what nvidia-smi doesn't say from the table of kinds."""
    kind = kind_of(gpu.name)
    if kind is None:
        return gpu
    return replace(gpu, memory=gpu.memory or kind.gib * 2**30, capability=gpu.capability or kind.capability)


def _capability_of(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _driver_gpus() -> tuple[list[GPU], str, str | None]:
    """The GPUs that the driver lists, for containers without nvidia-smi. One without a device file is not in
    this container."""
    version = DRIVER / "version"
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", version.read_text()) if version.is_file() else None
    gpus, hidden = [], 0
    for path in sorted((DRIVER / "gpus").glob("*/information")):
        lines = path.read_text(errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if (DEVICE_FILES / f"nvidia{facts.get('Device Minor', '0')}").exists():
            name = facts.get("Model", "NVIDIA GPU")
            driver = match[1] if match else None
            gpus.append(_completed(GPU(name, driver=driver, uuid=facts.get("GPU UUID", ""))))
        else:
            hidden += 1
    if hidden and not gpus:
        found = f"no GPU found: the machine has {hidden}, and this container none (docker run --gpus all)"
        return [], found, None
    return gpus, str(DRIVER) if gpus else NO_DRIVER, None


def _has_nvidia_hardware() -> bool:
    """Whether an NVIDIA GPU is on the PCI bus: images with a driver also run on machines without one."""
    for device in PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False
