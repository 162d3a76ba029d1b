"""Tests that take long: `make soak` runs them, `make test` does not."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("MPTFOUNDRY_SOAK") == "1" else ["test_*.py"]
