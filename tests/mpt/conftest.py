"""Triton's kernels on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .interpreter import patch_interpreter


@pytest.fixture
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run: on a GPU, or without one by the interpreter, made quicker."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    from mptfoundry.mpt.attention_kernels import forward_kernel

    if not isinstance(forward_kernel, interpreter.InterpretedFunction):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1, and there is no GPU")
    if (3, 6) <= _numbers(triton) < (3, 7) and _numbers(np) >= (2, 4):
        pytest.skip(f"Triton {triton.__version__}'s interpreter crashes with numpy {np.__version__}")
    patch_interpreter(monkeypatch.setattr)


def _numbers(package: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])
