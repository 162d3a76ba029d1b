from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.mpt.conftest import triton_runs

__all__ = ["triton_runs"]


@pytest.fixture
def rounds_as_a_gpu(triton_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off to bfloat16; a GPU rounds to nearest, ties to even."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(value, source, target, mode)
        return torch.from_numpy(value.copy()).bfloat16().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
