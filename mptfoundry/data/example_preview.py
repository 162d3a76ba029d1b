"""What a store of examples holds, for people: counts, lengths, what was left out, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mptfoundry.data.examples import ExampleStore
from mptfoundry.data.preview import shorten

LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"
BARS = 10
BAR_WIDTH = 40


def preview_examples(
    store: ExampleStore, tokenizer: Any, *, max_seq_len: int, samples: int = 3, color: bool = False
) -> str:
    """Describe a store and decode some of its examples, evenly spread.

    Args:
        store: Of one stream.
        tokenizer: That made it.
        max_seq_len: The most tokens of an example.
        samples: How many to show.
        color: Learned tokens are green; otherwise they stand between ⟦ and ⟧.
    """
    counts, tokens, learned = store.meta["counts"], int(store.lengths.sum()), int(store.learned.sum())
    kept = len(store)
    blocks = [
        f"{kept:,} examples of {counts['records']:,} records; {tokens:,} tokens, of which {learned:,} are "
        f"learned ({learned / max(tokens, 1):.1%})",
        "\n".join(_left_out(counts, max_seq_len)),
        histogram(store.lengths),
    ]
    for number in sorted({round(at) for at in np.linspace(0, kept - 1, min(samples, kept))}):
        ids, marks = store[number]
        head = f"example {number:,} of {kept:,}: {len(ids):,} tokens, {store.learned[number]:,} learned"
        blocks.append(f"{head}\n{show_learned(ids, marks, tokenizer, color=color)}")
    return "\n\n".join(blocks)


def show_learned(ids: np.ndarray, learned: np.ndarray, tokenizer: Any, *, color: bool = False) -> str:
    """An example as text, what is learned marked; long stretches are cut in the middle."""
    before, after = (LEARNED, PLAIN) if color else ("⟦", "⟧")
    pieces = []
    for is_learned, run in groupby(
        zip(ids.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        pieces.append(f"{before}{shorten(text)}{after}" if is_learned else shorten(text))
    return "".join(pieces)


def histogram(lengths: Sequence[int] | np.ndarray) -> str:
    """How many examples have which length in tokens, a bar a line."""
    if not len(lengths):
        return "no examples"
    step = max(1, -(-int(max(lengths)) // BARS))
    heights = np.bincount((np.asarray(lengths) - 1) // step, minlength=1)
    width, most = len(f"{step * len(heights):,}"), heights.max()
    lines = ["tokens of an example"]
    for bar, height in enumerate(heights):
        first, last = bar * step + 1, (bar + 1) * step
        drawn = "█" * max(round(BAR_WIDTH * height / most), int(height > 0))
        lines.append(f"  {first:>{width},} to {last:>{width},}  {drawn} {height:,}".rstrip())
    return "\n".join(lines)


def _left_out(counts: Mapping[str, Any], max_seq_len: int) -> list[str]:
    records = max(1, counts["records"])

    def share(number: int) -> str:
        return f"{number:,} ({number / records:.1%})"

    lines = [f"cut at max_seq_len, {max_seq_len:,}: {share(counts['cut'])}"]
    lines += [f"dropped, since nothing to learn is left: {share(counts['dropped'])}"]
    lines += [f"  {line}" for line in counts["drops"]]
    lines += [f"bad records: {share(counts['bad'])}", *(f"  {line}" for line in counts["problems"])]
    if counts["ignored"]:
        lines.append(f"columns not looked at: {', '.join(counts['ignored'])}")
    return lines
