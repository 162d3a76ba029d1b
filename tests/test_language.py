"""The language is the field's: words that no engineer of PyTorch would say aloud stay away."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "mptfoundry").rglob("*.py")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES if path.name != "CHANGELOG.md"}
# Each with what to say instead.
WORDS = {
    r"\banew\b": "again",
    r"\bwith leave\b": "when allowed",
    r"\bmend": "fix",
    r"\bbeside\b": "with, next to, except",
    r"\bgo(es)? on\b": "continue",
    r"\btold apart\b": "distinguished",
    r"\blies there\b": "is there",
    r"\bis meant\b": "is intended",
    r"(?<!there )\bis no \w+\b": "is not a",
    r"\bcopies x shards\b": "replicas x shards",
    r"\b[Dd]ealer\b": "sampler",
    r"\blog_sum\b": "lse",
    r"\blearned (tokens|parameters)\b": "tokens in the loss, trainable parameters",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_are_the_fields(word: str) -> None:
    found = [
        f"{name}: {match[0]}"
        for name, text in TEXTS.items()
        for match in re.finditer(word, text, re.IGNORECASE)
    ]
    assert not found, f"say {WORDS[word]!r}"
