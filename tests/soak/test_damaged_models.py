"""The long form of the damage that `tests/checkpoints/test_fuzz.py` does to models on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_thousands_of_damaged_models_are_refused_or_give_their_weights() -> None:
    file = Path(__file__).parents[1] / "checkpoints" / "test_fuzz.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(file)]
    environment = {**os.environ, "MPTFOUNDRY_SOAK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout
