"""Show what is in an example store: counts, lengths, what was left out, and samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mptfoundry.data.examples.chat import CHATML
from mptfoundry.data.examples.finetuning import columns_not_read, first_of
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.records.records import counted
from mptfoundry.data.views.shards_preview import shorten
from mptfoundry.tokenizer import count_ids, default_template

LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"
BARS = 10
BAR_WIDTH = 40


def preview_examples(
    store: ExampleStore, tokenizer: Any, *, max_seq_len: int, samples: int = 3, color: bool = False
) -> str:
    """Describe a store and decode evenly spaced examples.

    Args:
        store: The store of one stream.
        tokenizer: The tokenizer used to build the store.
        max_seq_len: Maximum tokens in an example.
        samples: How many examples to show.
        color: Whether to show tokens in the loss in green. If False, they are between ⟦ and ⟧.
    """
    counts, tokens, trained = store.meta["counts"], int(store.lengths.sum()), int(store.trained.sum())
    kept = len(store)
    blocks = [
        f"{counted(kept, 'example')} of {counted(counts['records'], 'record')}; {counted(tokens, 'token')}, "
        f"of which {trained:,} are in the loss ({trained / max(tokens, 1):.1%})",
        "\n".join(_left_out(store, max_seq_len)),
        histogram(store.lengths),
    ]
    for number in sorted({round(at) for at in np.linspace(0, kept - 1, min(samples, kept))}):
        ids, marks = store[number]
        said = f"{counted(len(ids), 'token')}, {store.trained[number]:,} in the loss"
        head = f"example {number:,} of {kept:,}: {said}"
        blocks.append(f"{head}\n{show_trained(ids, marks, tokenizer, color=color)}")
    if counts["chats"] and (note := split_marks(tokenizer)):
        blocks.append(note)
    return "\n\n".join(blocks)


def split_marks(tokenizer: Any) -> str:
    """Explain what to do about chat template markers, such as `<|im_start|>`, that are several tokens each.

    Returns an empty string if there are none.
    """
    template = default_template(tokenizer) or CHATML
    sizes = {
        mark: len(tokenizer(mark, add_special_tokens=False)["input_ids"])
        for mark in dict.fromkeys(re.findall(r"<\|[\w-]+\|>", template))
    }
    split = {mark: size for mark, size in sizes.items() if size > 1}
    if not split:
        return ""
    names = ", ".join(f"{mark} ({size} tokens)" for mark, size in split.items())
    return (
        f"note: the chat template writes {names}, of which this tokenizer has no token of its own. Make each "
        f"of them one token: tokenizer.add_tokens({[*split]}, special_tokens=True), "
        "tokenizer.save_pretrained(FOLDER), then tokenizer.name: FOLDER and a vocab_size of "
        f"{count_ids(tokenizer) + len(split)} or more."
    )


def show_trained(ids: np.ndarray, trained: np.ndarray, tokenizer: Any, *, color: bool = False) -> str:
    """Decode an example and mark the tokens in the loss; long runs are cut in the middle."""
    before, after = (LEARNED, PLAIN) if color else ("⟦", "⟧")
    pieces = []
    for is_trained, run in groupby(
        zip(ids.tolist(), trained.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        pieces.append(f"{before}{shorten(text)}{after}" if is_trained else shorten(text))
    return "".join(pieces)


def histogram(lengths: Sequence[int] | np.ndarray) -> str:
    """Draw a histogram of example lengths in tokens, one bar per line."""
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


def _left_out(store: ExampleStore, max_seq_len: int) -> list[str]:
    counts = store.meta["counts"]
    records = max(1, counts["records"])

    def share(number: int) -> str:
        return f"{number:,} ({number / records:.1%})"

    lines = [f"cut at max_seq_len, {max_seq_len:,}: {share(counts['cut'])}"]
    lines += [f"dropped: {share(counts['dropped'])}"]
    lines += first_of(counts["drops"], counts["dropped"])
    lines += [f"bad records: {share(counts['bad'])}", *first_of(counts["problems"], counts["bad"])]
    if counts["doubles"]:
        lines.append(f"records of two forms, of which one is read: {share(counts['doubles'])}")
        lines += first_of(counts["choices"], counts["doubles"])
    if counts["ignored"]:
        lines.append(f"columns not looked at: {columns_not_read(store)}")
    return lines
