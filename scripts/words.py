"""A script's command-line words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def given_words(head: str | None) -> list[str]:
    """The command line without the script's name; `--help` prints the script's head and ends it."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print((head or "").strip())
        sys.exit(0)
    return words


def tell(options: Mapping[str, str], **row: Any) -> None:
    """Print a result as a line of JSON if `lines=true` is given, as `scripts/gpu.py` does."""
    if options.get("lines") == "true":
        print(json.dumps(row, default=str), flush=True)
