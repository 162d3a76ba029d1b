"""Report on one page what works on this machine and what does not.

Versions come from package metadata. Only flash-attn, if installed, is imported, because it may have been
compiled against another torch. The doctor changes nothing and sends one request, for the hub's front page.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from mptfoundry import __version__
from mptfoundry.config.engine.secrets import redacted
from mptfoundry.mpt.backends import choose_backend, why_not
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.plan.devices import GIB, Device, launcher_device
from mptfoundry.plan.gpu_support import describe_gpus, gpu_problem, installed_torch
from mptfoundry.plan.install_sets import PYTHONS, installed_set, pins, release, version_of
from mptfoundry.plan.plan import COMPUTE_DTYPE, choose_precision
from mptfoundry.run.leftovers import clean_now, find_leftovers, size_of

# Name on PyPI, and for optional packages what they are used for.
_PACKAGES: dict[str, str | None] = {
    "torch": None,
    "mosaicml": None,
    "mosaicml-streaming": None,
    "transformers": None,
    "tokenizers": None,
    "datasets": None,
    "omegaconf": None,
    "safetensors": None,
    "numpy": None,
    "matplotlib": "pictures of a run",
    "triton": "kernels of our own on NVIDIA GPUs; comes with torch on Linux",
    "flash-attn": "attn_impl: flash; pip install --no-build-isolation 'mptfoundry[flash]'",
    "peft": "LoRA; pip install 'mptfoundry[peft]'",
    "torchao": "matrix products in float8 on GPUs; pip install 'mptfoundry[float8]'",
    "bitsandbytes": "LoRA with 8 or 4 bits; pip install 'mptfoundry[bitsandbytes]'",
}
_HUB_TIMEOUT_SECONDS = 3.0
# Beginnings of the names of environment variables that change what a run does.
_VARIABLES = (
    "MPTFOUNDRY_ COMPOSER_ RUN_NAME CUDA_ NVIDIA_ NCCL_ GLOO_ TORCH PYTORCH_ TRITON_ OMP_ MKL_ LD_ PYTHON "
    "HF_ TRANSFORMERS_ TOKENIZERS_ WANDB_ MLFLOW_ COMET_ SLURM_ RANK WORLD_SIZE LOCAL_ NODE_RANK GROUP_RANK "
    "MASTER_ XDG_CACHE_HOME TMPDIR"
)


def doctor() -> str:
    """Return the page that `mptfoundry doctor` prints."""
    hub: list[str] = []
    asking = threading.Thread(target=lambda: hub.append(_hub()), daemon=True)
    asking.start()
    device = launcher_device()
    sections = {
        "Packages": _packages(),
        "Devices": _devices(device),
        "Attention": _attention(device),
        "Room": _room(),
    }
    asking.join(_HUB_TIMEOUT_SECONDS + 1)
    sections["Network"] = hub or [f"Hugging Face hub: no answer within {_HUB_TIMEOUT_SECONDS:g} s"]
    sections["Good to know here"] = _traps(device) or ["nothing in particular"]
    sections["Trouble"] = troubles() or ["none"]
    blocks = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()]
    return "\n\n".join([_head(), *blocks])


def environment() -> str:
    """Return the block that `mptfoundry doctor env=true` prints, as Markdown for a report of a fault."""
    device = launcher_device()
    starts = tuple(_VARIABLES.split())
    variables = redacted({name: os.environ[name] for name in sorted(os.environ) if name.startswith(starts)})
    build = installed_torch()
    versions = {name: version_of(name) for name in (*pins("current"), *_PACKAGES)}
    lines = [
        _head(),
        f"Python: {sys.executable}",
        *_set()[0],
        f"torch: {build.version}, CUDA {build.cuda or 'none'}" if build else "torch: another build, or none",
        *_devices(device),
        *_room(),
        "",
        *(f"{name}=={version}" for name, version in sorted(versions.items()) if version),
        "",
        *(f"{name}={value}" for name, value in variables.items()),
    ]
    return "\n".join(["```", *lines, "```"])


def clean() -> str:
    """Remove what dead runs left, and return the list that `mptfoundry doctor clean=true` prints."""
    leftovers, gone = clean_now()
    lines = [f"removed {each}, {leftovers[each]:,} bytes" for each in gone]
    lines += [f"{each} can't be removed" for each in leftovers if each not in gone]
    return "\n".join(lines or ["dead runs left nothing here"])


def _head() -> str:
    return f"mptfoundry {__version__}, Python {platform.python_version()}, {platform.platform()}"


def troubles() -> list[str]:
    """List what keeps a run from starting here, one sentence each; if any, the doctor exits with 1."""
    found = []
    if not any(low <= sys.version_info[:2] <= high for low, high in PYTHONS.values()):
        found.append(f"Python {platform.python_version()} is not supported. Use 3.11, 3.12, 3.13 or 3.14.")
    for name, purpose in _PACKAGES.items():
        if purpose is None and version_of(name) is None:
            found.append(f"{name} is not installed. `mptfoundry doctor install=current` prints the command.")
    if not os.access(Path.cwd(), os.W_OK):
        found.append(f"{Path.cwd()} is not writable: runs are kept there unless save_folder says otherwise.")
    if problem := gpu_problem(launcher_device()):
        found.append("{}: {}".format(*problem))
    return found


def _packages() -> list[str]:
    width = max(map(len, _PACKAGES)) + 2
    lines, tested = _set()
    for name, purpose in _PACKAGES.items():
        version = version_of(name)
        missing = "MISSING" if purpose is None else f"not installed ({purpose})"
        lines.append(f"{name:{width}}{version or missing}{_outside(name, version, tested)}")
    return lines


def _set() -> tuple[list[str], dict[str, str]]:
    """Name the tested set that is installed here and what differs from it; return its versions, too."""
    try:
        name, differences = installed_set()
    except ImportError:  # packaging is not there
        return [], {}
    tested = pins(name)
    if not differences:
        return [f"the set {name}, exactly"], tested
    differences.sort(key=lambda phrase: phrase.split()[0] not in _PACKAGES)
    some = ", ".join(differences[:5]) + (", ..." if len(differences) > 5 else "")
    return [
        f"nearest to the set {name}; {len(differences)} of its {len(tested)} packages differ: {some}"
    ], tested


def _outside(name: str, version: str | None, tested: Mapping[str, str]) -> str:
    """Say which package's declared range excludes the installed version, or return an empty string.

    Versions of the installed set, `tested`, are fine whatever Composer declares.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    if version and version.split("+")[0] == tested.get(name):
        return ""
    for owner in ("mptfoundry", "mosaicml", "mosaicml-streaming"):
        try:
            wanted = [Requirement(line) for line in metadata.requires(owner) or []]
        except metadata.PackageNotFoundError:
            continue
        for requirement in wanted:
            applies = requirement.name == name and "extra" not in str(requirement.marker or "")
            if version and applies and not requirement.specifier.contains(version, prereleases=True):
                return f"   outside what {owner} declares: {requirement.specifier}"
    return ""


def _devices(device: Device) -> list[str]:
    if device.kind == "gpu":
        return [*describe_gpus(device), device.found]
    memory = f"{device.memory / GIB:.1f} GiB" if device.memory else "unknown"
    return [f"CPU: {device.cores} cores, {memory} memory", device.found]


def _attention(device: Device) -> list[str]:
    """Report which backends can run an MPT (ALiBi, causal) here in the precision that `auto` picks."""
    if version_of("torch") is None:
        return ["nothing works without torch"]
    config = MPTConfig(attn_config=AttnConfig(alibi=True), no_bias=True)
    where = device.torch_type, COMPUTE_DTYPE[choose_precision(device)[0]], device.capability
    name, reason = choose_backend(config, *where)
    lines = [f"auto      takes {name}, which {reason}"]
    for name in ("torch", "triton", "flash"):
        trouble = why_not(name, config, *where)
        if name == "flash" and trouble is None:
            from mptfoundry.mpt.attention_flash import import_error

            trouble = import_error and f"flash-attn can't be imported: {import_error}"
        lines.append(f"{name:10}{'works' if trouble is None else f'does not work: {trouble}'}")
    return lines


def _room() -> list[str]:
    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    places = [here] if here.stat().st_dev == temporary.stat().st_dev else [here, temporary]
    lines = [f"disk: {shutil.disk_usage(place).free / GIB:.1f} GiB free in {place}" for place in places]
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        lines.append(f"shared memory: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [*lines, f"open files: {soft} for a process, {hard} on request (ulimit -n)"]


def _hub() -> str:
    """Check whether tokenizers and data sets can be downloaded by name."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"Hugging Face hub: switched off by {variable}; folders on this machine are used alone"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"Hugging Face hub: {address} answers {error.code}; name tokenizers by a folder if they fail"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"Hugging Face hub: not reachable ({reason}); name tokenizers and data by folders"
    return f"Hugging Face hub: reachable at {address}"


def _traps(device: Device) -> list[str]:
    """List surprises in the installed versions, but only those that apply to this machine."""
    numpy, triton = version_of("numpy") or "", version_of("triton") or ""
    lines = []
    if device.kind == "cpu":
        lines.append("precision: auto is fp32 here; Composer refuses amp_bf16 on a CPU.")
    if os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}:
        lines.append("TRITON_INTERPRET is set: Triton's kernels run slowly on the CPU, and wrongly in bf16.")
        if (3, 6) <= release(triton) < (3, 7) and release(numpy) >= (2, 4):
            lines.append(f"Triton {triton}'s interpreter crashes with numpy {numpy}. Use numpy below 2.4.")
    if release(triton)[:2] == (3, 3) and any(gpu.capability == (9, 0) for gpu in device.gpus):
        lines.append(
            f"attn_impl: triton is slower with Triton {triton} on GPUs of compute capability 9.0: its "
            "kernels wait for each matrix product. The install set `current` has a newer Triton."
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < GIB:
        lines.append("Shared memory is small: start the container with --shm-size=8g, or use num_workers 0.")
    if left := find_leftovers():
        lines.append(
            f"{len(left)} blocks and files of dead runs are left, {size_of(left) / 2**20:.1f} MiB. The next "
            "run removes them, and so does: mptfoundry doctor clean=true"
        )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1024:
        lines.append("Few files may be open at once; raise it for data sets of many shards: ulimit -n 4096")
    return lines
