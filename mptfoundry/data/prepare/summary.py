"""The result of a preparation, as numbers and as a short table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WITHOUT = "without ending"
RECORDS_AS_TEXT = (".csv", ".tsv", ".json")


@dataclass(frozen=True)
class SplitSummary:
    """One finished split. Counts are the same as in `ShardMeta`; sizes are in bytes."""

    split: str
    folder: Path
    documents: int
    samples: int
    tokens: int
    bytes: int
    dropped_tokens: int
    shards: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id, including EOS."""
        return self.bytes / (self.tokens + self.dropped_tokens)


@dataclass(frozen=True)
class PrepareSummary:
    """The result of `prepare`; `str()` formats it as a short table.

    Attributes:
        splits: The splits, the main split first.
        seconds: Time this call took.
        encoded_tokens: Tokens this call encoded; fewer than all if it resumed an earlier call.
        skipped: Number of skipped items, by reason.
        problems: Messages of the first inputs that could not be read.
        plain_text: Number of files read as one document each, by extension.
        borders: Description of the special tokens around each document.
        was_finished: Whether everything was already finished.
    """

    splits: tuple[SplitSummary, ...]
    seconds: float
    encoded_tokens: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    problems: Sequence[str] = ()
    plain_text: Mapping[str, int] = field(default_factory=dict)
    borders: str = ""
    was_finished: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Throughput of this call, including startup."""
        return self.encoded_tokens / self.seconds

    def __str__(self) -> str:
        head = ("split", "documents", "samples", "tokens", "bytes/token", "dropped", "shards", "folder")
        rows = [
            (
                s.split,
                f"{s.documents:,}",
                f"{s.samples:,}",
                f"{s.tokens:,}",
                f"{s.bytes_per_token:.2f}",
                f"{s.dropped_tokens:,}",
                f"{s.shards:,}",
                str(s.folder),
            )
            for s in self.splits
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place in (0, 7) else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        if self.was_finished:
            lines.append("It was finished already; nothing was done.")
        else:
            lines.append(f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s")
        lines += [self.borders] * bool(self.borders)
        lines += self._plain_text_in_words()
        lines += [f"left out: {count:,} x {reason}" for reason, count in sorted(self.skipped.items())]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def _plain_text_in_words(self) -> list[str]:
        if not self.plain_text:
            return []
        counts = sorted(self.plain_text.items(), key=lambda item: (-item[1], item[0] == "", item[0]))
        lines = [f"read as plain text: {', '.join(f'{n:,} x {ending or WITHOUT}' for ending, n in counts)}"]
        if tables := [ending for ending in RECORDS_AS_TEXT if ending in self.plain_text]:
            lines.append(
                f"  one {' or '.join(tables)} file is one document here, with all its commas and braces. For "
                "one document of each record, write the records as JSON Lines, as a JSON array or as Parquet"
            )
        return lines
