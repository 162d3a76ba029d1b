"""A script's command-line words."""

from __future__ import annotations

import sys


def given_words(head: str | None) -> list[str]:
    """The command line without the script's name; `--help` prints the script's head and ends it."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print((head or "").strip())
        sys.exit(0)
    return words
