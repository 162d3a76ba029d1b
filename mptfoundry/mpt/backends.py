"""Choose a model's attention backend: the one place that plans, checks, the network and the tests ask.

All backends give the same mathematics. This module imports only the standard library, so a config is checked
at once; it looks for packages without importing them. A dtype is torch's name, such as `bfloat16`, for the
queries, keys and values, also under autocast.
"""

from __future__ import annotations

import importlib.util
import os
import re

from .config import OWN_BACKENDS, MPTConfig

# In the order in which errors suggest them.
BACKENDS = ("torch", "triton", "flash")
# `auto` takes the first of these that supports the model. Fastest first.
_PREFERENCE = {"cuda": ("triton", "flash", "torch")}
# Compute capabilities: Triton supports 8.0 and newer, and flash-attn is written for Ampere and newer.
_CAPABILITY_AT_LEAST = (8, 0)
Capability = tuple[int, int]
# The first release with a correct softcap gradient; ALiBi and the deterministic backward are older.
_FLASH_AT_LEAST = (2, 6, 2)


def choose_backend(
    config: MPTConfig, device_type: str, dtype: str, capability: Capability | None = None
) -> tuple[str, str]:
    """Choose the backend that ``attn_impl`` requests, or with ``auto`` the fastest one that can be used.

    ``device_type`` (``cpu``, ``cuda``) and ``dtype``, which attention computes in, are torch's names;
    ``capability`` is the GPU's, such as (9, 0), or None if it is not known.

    Returns:
        The backend's name and the reason, one clause.

    Raises:
        ValueError: The requested backend can't be used.
    """
    name: str = config.attn_config.attn_impl
    if name != "auto":
        return _requested(name, config, device_type, dtype, capability)
    refused: list[str] = []
    for name in _PREFERENCE.get(device_type, ("torch",)):
        reason = why_not(name, config, device_type, dtype, capability)
        if reason is None:
            break
        refused.append(f"not {name}: {reason}")
    return name, "; ".join([f"serves this model in {dtype} on {device_type}", *refused])


def _requested(
    name: str, config: MPTConfig, device_type: str, dtype: str, capability: Capability | None
) -> tuple[str, str]:
    reason = why_not(name, config, device_type, dtype, capability)
    if reason is None:
        return name, "asked for"
    raise ValueError(refusal(name, reason, config, device_type, dtype, capability))


def refusal(
    name: str,
    reason: str,
    config: MPTConfig,
    device_type: str,
    dtype: str,
    capability: Capability | None = None,
) -> str:
    """The error for a requested backend that can't be used: the key, the reason and what to use."""
    able = [other for other in BACKENDS if why_not(other, config, device_type, dtype, capability) is None]
    return (
        f"attn_config.attn_impl: {name} can't be used: {reason}. "
        f"Use {' or '.join(['auto', *able])}; all give the same mathematics."
    )


def why_not(
    name: str, config: MPTConfig, device_type: str, dtype: str, capability: Capability | None = None
) -> str | None:
    """Why the backend ``name`` can't compute this model's attention, one clause; None if it can.

    The arguments are those of `choose_backend`.
    """
    if name == "torch":
        return None
    if name not in BACKENDS:
        return _why_not_own(name, config, device_type, dtype)
    return why_not_here(name, device_type, dtype, capability) or why_never(name, config, dtype)


def _why_not_own(name: str, config: MPTConfig, device_type: str, dtype: str) -> str | None:
    if name not in OWN_BACKENDS:
        return "it is a backend of your own, and its code was not run here"
    ask = getattr(OWN_BACKENDS[name], "why_not", None)
    return None if ask is None else ask(config, device_type, dtype)


def why_not_here(name: str, device_type: str, dtype: str, capability: Capability | None = None) -> str | None:
    """What this machine lacks for the backend ``name``, for any model; None if nothing."""
    if name != "torch" and capability is not None and capability < _CAPABILITY_AT_LEAST:
        return f"it needs a GPU of compute capability 8.0 or newer, and this one has {_dotted(capability)}"
    if name == "flash":
        return "it needs a GPU" if device_type != "cuda" else _FLASH_IS_MISSING
    if name == "torch" or (device_type == "cuda" and _HAS_TRITON):
        return None
    if device_type != "cuda" and not is_interpreted():
        return "it needs a GPU, or on a CPU Triton's slow interpreter (TRITON_INTERPRET=1)"
    if not _HAS_TRITON:
        return "the package triton is not installed; on Linux torch brings it"
    return None if dtype == "float32" else f"Triton's interpreter is right in float32 alone, not in {dtype}"


def is_interpreted() -> bool:
    """Whether Triton's kernels run on a CPU, in its slow interpreter, as the environment asks."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_never(name: str, config: MPTConfig, dtype: str) -> str | None:
    """Why the backend ``name`` can't compute this model's attention on any machine; None if it can."""
    if name == "triton":
        return _why_never_triton(config, dtype)
    return _why_never_flash(config, dtype) if name == "flash" else None


def _why_never_triton(config: MPTConfig, dtype: str) -> str | None:
    if dtype not in {"bfloat16", "float16", "float32"}:
        return f"its kernels compute in bfloat16, float16 and float32, not in {dtype}"
    if not 16 <= config.d_head <= 256:
        return f"head_dim is {config.d_head}, its kernels are for 16 to 256"
    return None


def _why_never_flash(config: MPTConfig, dtype: str) -> str | None:
    attn = config.attn_config
    if dtype not in {"bfloat16", "float16"}:
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if config.d_head > 256 or config.d_head % 8:
        return f"head_dim is {config.d_head}, it takes multiples of 8 up to 256"
    if attn.prefix_lm:
        return "it has no prefix-LM"
    if attn.attn_logit_softcapping is not None and attn.attn_pdrop > 0:
        return "it has no dropout (attn_pdrop) together with attn_logit_softcapping"
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _flash_is_missing() -> str | None:
    """Check the flash-attn package itself; other packages install different modules under its name."""
    missing = "the package flash-attn is not installed (pip install --no-build-isolation flash-attn)"
    return missing if importlib.util.find_spec("flash_attn") is None else _flash_is_too_old(missing)


def _flash_is_too_old(missing: str) -> str | None:
    from importlib import metadata  # slow to import, and rarely needed

    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return missing
    if tuple(int(digits) for digits in re.findall(r"\d+", version)[:3]) < _FLASH_AT_LEAST:
        return f"flash-attn {version} is too old; it takes {_dotted(_FLASH_AT_LEAST)} or newer"
    return None


# Looked up once, so that a network's choice is cheap and compiles.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FLASH_IS_MISSING = _flash_is_missing()
