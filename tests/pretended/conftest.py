"""Starts programs on a pretended GPU: the code path of CUDA, seen on a machine without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.pretended.starting import run_program, why_not

# `make soak` looks at everything, `make test` at some of it, in a few seconds.
LOOKS_AT_ALL = os.environ.get("MPTFOUNDRY_SOAK") == "1"


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a program of this folder with words; returns what its last line says as JSON."""
    if reason := why_not():
        pytest.skip(reason)
    return partial(run_program, tmp_path_factory.mktemp("pretended"))
