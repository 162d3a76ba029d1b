"""Show a data mix as a table and a picture: share of the run, epochs and document lengths of each stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.config.data import TextLoaderConfig
from mptfoundry.data.shards.index import ShardIndex, read_samples
from mptfoundry.data.text.streams import ShardStream, plan_streams, read_stream

MOST_TOKENS_READ = 1 << 21


@dataclass(frozen=True)
class StreamShare:
    """One stream of a mix.

    Attributes:
        name: Name of the stream.
        samples: Samples in the stream.
        tokens: Tokens in the stream.
        share: The stream's fraction of the tokens the run reads, 0 to 1.
        drawn_tokens: Tokens the run reads from the stream.
        epochs: How many times the run reads the whole stream.
        document_lengths: Tokens in each of a sample of documents, (documents,) int64; empty if unknown.
        mean_document_tokens: Mean over all documents, or None if the shards don't tell.
    """

    name: str
    samples: int
    tokens: int
    share: float
    drawn_tokens: float
    epochs: float
    document_lengths: np.ndarray
    mean_document_tokens: float | None


def describe_mix(
    loader: TextLoaderConfig, max_seq_len: int, *, total_tokens: float | None = None
) -> list[StreamShare]:
    """Compute what a run reads from each stream, and measure some of its documents.

    Args:
        loader: `train_loader`; its streams must be on this machine.
        max_seq_len: Tokens per sample.
        total_tokens: Tokens in the run. Defaults to one epoch.

    Raises:
        DataError: A stream is not on this machine or can't be read.
    """
    streams = plan_streams(loader, "train_loader")
    indexes = [read_stream(stream) for stream in streams]
    samples = np.array([index.samples for index in indexes], np.float64)
    drawn = _drawn_samples(streams, samples)
    drawn_tokens = drawn / drawn.sum() * (total_tokens if total_tokens else drawn.sum() * max_seq_len)
    rows = []
    for name, index, tokens in zip(loader.dataset.sources, indexes, drawn_tokens.tolist(), strict=True):
        meta = index.meta
        eos = meta.eos_token_id if meta else loader.dataset.eos_token_id
        has = index.samples * max_seq_len
        rows.append(
            StreamShare(
                name=name,
                samples=index.samples,
                tokens=has,
                share=tokens / float(drawn_tokens.sum()),
                drawn_tokens=tokens,
                epochs=tokens / has,
                document_lengths=_document_lengths(index, eos, max_seq_len),
                mean_document_tokens=(meta.tokens + meta.dropped_tokens) / meta.documents
                if meta and meta.documents
                else None,
            )
        )
    return rows


def mix_table(rows: Sequence[StreamShare]) -> str:
    """Format the mix as a short table."""
    width = max(6, *(len(row.name) for row in rows))
    head = ("share", "tokens read", "tokens it has", "epochs", "tokens/document")
    lines = ["  ".join((f"{'stream':{width}}", *map(str.rjust, head, (6, 16, 16, 9, 15))))]
    for row in rows:
        mean = f"{row.mean_document_tokens:,.0f}" if row.mean_document_tokens else "unknown"
        lines.append(
            f"{row.name:{width}}  {row.share:6.1%}  {row.drawn_tokens:16,.0f}  {row.tokens:16,}  "
            f"{row.epochs:9,.2f}  {mean:>15}"
        )
    return "\n".join(lines)


def draw_mix(rows: Sequence[StreamShare], path: str | Path) -> Path:
    """Draw the shares, epochs and document lengths of a mix side by side in a PNG, and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row.share)
    names = [row.name for row in rows]
    colors = [pyplot.get_cmap("tab10")(number % 10) for number in range(len(rows))]
    figure, (shares, epochs, lengths) = pyplot.subplots(
        1, 3, figsize=(13, 1.8 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    bars = shares.barh(names, [100 * row.share for row in rows], color=colors)
    labels = [f"{100 * row.share:.1f} % · {_short(row.drawn_tokens)}" for row in rows]
    shares.bar_label(bars, labels, padding=3, fontsize=9)
    shares.set(title="share of the tokens read", xlabel="%", xlim=(0, 135 * max(row.share for row in rows)))
    bars = epochs.barh(names, [row.epochs for row in rows], color=colors)
    epochs.bar_label(
        bars, [f"{row.epochs:.2f} x {_short(row.tokens)}" for row in rows], padding=3, fontsize=9
    )
    epochs.set(title="times read whole", xlabel="epochs", xlim=(0, 1.45 * max(row.epochs for row in rows)))
    _draw_lengths(lengths, rows, colors)
    for axes in (shares, epochs, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _draw_lengths(axes: Any, rows: Sequence[StreamShare], colors: Sequence[Any]) -> None:
    """Draw a box plot per stream: quartiles, median, and a line from the 5th to the 95th percentile."""
    known = [place for place, row in enumerate(rows) if row.document_lengths.size]
    axes.set(title="tokens in a document (median)", xlabel="tokens", xscale="log")
    if not known:
        axes.text(0.5, 0.5, "no borders of documents known", ha="center", transform=axes.transAxes)
        return
    for place in known:
        low, first, middle, third, high = np.percentile(rows[place].document_lengths, (5, 25, 50, 75, 95))
        axes.plot([low, high], [place, place], color=colors[place], linewidth=1.5)
        axes.barh(place, third - first, left=first, color=colors[place], height=0.6)
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color="black", linewidth=1.5)
        axes.text(high, place, f"  {middle:,.0f}", va="center", fontsize=9)
    axes.margins(x=0.15)


def _drawn_samples(streams: Sequence[ShardStream], samples: np.ndarray) -> np.ndarray:
    """Compute each stream's samples per epoch by streaming's rules: (streams,) float64."""
    arguments = [stream.arguments for stream in streams]
    if all("proportion" in argument for argument in arguments):
        proportions = np.array([argument["proportion"] for argument in arguments], np.float64)
        return proportions / proportions.sum() * samples.sum()
    return np.array(
        [
            argument.get("choose", argument.get("repeat", 1.0) * count)
            for argument, count in zip(arguments, samples, strict=True)
        ],
        np.float64,
    )


def _document_lengths(index: ShardIndex, eos_token_id: int | None, max_seq_len: int) -> np.ndarray:
    """Measure the complete documents at the start of a stream, including EOS.

    Samples are consecutive pieces of one token stream, so a document may be longer than a sample.
    """
    if eos_token_id is None:
        return np.zeros(0, np.int64)
    numbers = range(min(index.samples, max(1, MOST_TOKENS_READ // max_seq_len)))
    stored = (sample.get("tokens") for sample in read_samples(index, numbers))
    rows = [tokens for tokens in stored if isinstance(tokens, np.ndarray) and tokens.ndim == 1]
    if not rows:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(np.concatenate(rows) == eos_token_id)
    return np.diff(ends, prepend=-1)


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
