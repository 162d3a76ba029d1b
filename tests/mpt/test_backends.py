from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mptfoundry.mpt import backends
from mptfoundry.mpt.attention import BACKENDS
from mptfoundry.mpt.backends import choose_backend, why_not
from mptfoundry.mpt.config import AttnConfig, MPTConfig


def config(head_dim: int = 64, **attention: object) -> MPTConfig:
    attn_config = AttnConfig(**{"alibi": True, **attention})  # type: ignore[arg-type]
    return MPTConfig(n_heads=4, n_layers=1, head_dim=head_dim, attn_config=attn_config)


@pytest.fixture(autouse=True)
def both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_FLASH_IS_MISSING", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_choice_has_its_backend_and_its_rule() -> None:
    assert set(BACKENDS) == set(backends.BACKENDS) == {"torch", "triton", "flash"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_auto_takes_our_own_kernels_on_a_gpu(dtype: str) -> None:
    assert choose_backend(config(), "cuda", dtype) == ("triton", f"serves this model in {dtype} on cuda")


def test_auto_says_why_it_does_not_take_the_faster_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(config(), "cuda", "float64") == (
        "torch",
        "serves this model in float64 on cuda; not triton: its kernels compute in bfloat16, float16 and "
        "float32, not in float64; not flash: it computes in bfloat16 and float16, not in float64",
    )
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert choose_backend(config(), "cuda", "bfloat16") == (
        "flash",
        "serves this model in bfloat16 on cuda; not triton: the package triton is not installed; "
        "on Linux torch brings it",
    )


def test_auto_takes_torch_on_a_gpu_older_than_ampere() -> None:
    needs = "it needs a GPU of compute capability 8.0 or newer, and this one has 7.0"
    assert choose_backend(config(), "cuda", "float16", (7, 0)) == (
        "torch",
        f"serves this model in float16 on cuda; not triton: {needs}; not flash: {needs}",
    )
    assert choose_backend(config(), "cuda", "float16", (8, 0))[0] == "triton"
    with pytest.raises(ValueError, match=r"triton can't be used: it needs a GPU.*7\.5\. Use auto or torch;"):
        choose_backend(config(attn_impl="triton"), "cuda", "float32", (7, 5))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_takes_torch_where_there_is_no_nvidia_gpu(device: str) -> None:
    assert choose_backend(config(), device, "float32") == (
        "torch",
        f"serves this model in float32 on {device}",
    )


def test_what_is_asked_for_is_taken_or_refused_with_what_can_serve() -> None:
    assert choose_backend(config(attn_impl="torch"), "cuda", "bfloat16") == ("torch", "asked for")
    assert choose_backend(config(attn_impl="flash"), "cuda", "bfloat16") == ("flash", "asked for")
    with pytest.raises(ValueError) as caught:
        choose_backend(config(attn_impl="flash", prefix_lm=True), "cuda", "bfloat16")
    assert str(caught.value) == (
        "attn_config.attn_impl: flash can't be used: it has no prefix-LM. "
        "Use auto or torch or triton; all give the same mathematics."
    )


@pytest.mark.parametrize(
    ("name", "model", "dtype", "reason"),
    [
        ("flash", config(), "float32", "it computes in bfloat16 and float16, not in float32"),
        ("flash", config(head_dim=264), "float16", "head_dim is 264, it takes multiples of 8 up to 256"),
        ("flash", config(head_dim=20), "float16", "head_dim is 20, it takes multiples of 8 up to 256"),
        (
            "flash",
            config(attn_logit_softcapping=5.0, attn_pdrop=0.1),
            "float16",
            "it has no dropout (attn_pdrop) together with attn_logit_softcapping",
        ),
        ("flash", config(attn_logit_softcapping=5.0, sliding_window_size=4), "float16", None),
        ("triton", config(head_dim=8), "bfloat16", "head_dim is 8, its kernels are for 16 to 256"),
        ("triton", config(head_dim=264), "bfloat16", "head_dim is 264, its kernels are for 16 to 256"),
        ("triton", config(head_dim=20, prefix_lm=True, attn_pdrop=0.1), "bfloat16", None),
        ("torch", config(head_dim=264), "float64", None),
    ],
)
def test_a_backend_says_what_it_cannot_compute(
    name: str, model: MPTConfig, dtype: str, reason: str | None
) -> None:
    assert why_not(name, model, "cuda", dtype) == reason


def test_triton_runs_on_a_cpu_only_where_its_interpreter_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "it needs a GPU, or on a CPU Triton's slow interpreter (TRITON_INTERPRET=1)"
    assert why_not("triton", config(), "cpu", "float32") == reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("triton", config(), "cpu", "float32") is None
    wrong = why_not("triton", config(), "cpu", "bfloat16")
    assert wrong == "Triton's interpreter is right in float32 alone, not in bfloat16"
    assert choose_backend(config(), "cpu", "float32")[0] == "torch"


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        (None, "the package flash-attn is not installed"),
        ("2.5.9.post1", "flash-attn 2.5.9.post1 is too old; it takes 2.6.2 or newer"),
        ("2.6.2", None),
        ("2.10.0+cu126", None),
    ],
)
def test_flash_attn_is_found_by_its_release(
    installed: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = why_no_flash_on_a_gpu()
    assert found == reason if reason is None else str(found).startswith(reason)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed" in (why_no_flash_on_a_gpu() or "")


def why_no_flash_on_a_gpu() -> str | None:
    """What a fresh interpreter's backends.py says, which looks for packages when it is imported."""
    spec = importlib.util.spec_from_file_location("mptfoundry.mpt.fresh_backends", backends.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.why_not_here("flash", "cuda", "bfloat16")


def test_the_choice_needs_the_standard_library_alone() -> None:
    """A bare interpreter: no torch, no triton."""
    root = Path(backends.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from mptfoundry.mpt.backends import *; from mptfoundry.mpt.config import MPTConfig\n"
        "print(choose_backend(MPTConfig(), 'cuda', 'bfloat16')[0])"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=600).stdout == "torch\n"
