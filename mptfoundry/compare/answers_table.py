"""The tables of paired answers, and which of them are significantly worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mptfoundry.compare.evaluations import Evaluation, Line, document_texts, shared_labels
from mptfoundry.compare.paired import interval, mcnemar, resampled_means
from mptfoundry.compare.tables import table

MEAN = "mean of tasks"
_LONGEST_TEXT = 300


@dataclass
class Paired:
    """The comparison of the second evaluation's answers with the first one's.

    Attributes:
        accuracy: Rows of the table of accuracies.
        likelihood: Rows of the table of the right answers' log-likelihoods.
        worse: The labels whose interval of the difference in accuracy lies below 0.
    """

    accuracy: list[tuple[str, ...]] = field(default_factory=list)
    likelihood: list[tuple[str, ...]] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)


def pair(first: Evaluation, second: Evaluation, seed: int) -> Paired:
    """Compare the answers of two evaluations that asked the same questions."""
    paired = Paired()
    by_task: dict[str, list[np.ndarray]] = {}
    means = []
    for label in shared_labels(first, second):
        lines = _paired_lines(first, second, label)
        before, after = (np.array([float(pair[n]["correct"]) for pair in lines]) for n in (0, 1))
        by_task.setdefault(label.rpartition("/")[0], []).append(after - before)
        means.append((float(before.mean()), float(after.mean())))
        low, high = interval(resampled_means(after - before, seed))
        wins, losses = int((after > before).sum()), int((after < before).sum())
        flips = (str(wins), str(losses), str(len(lines) - wins - losses), f"{mcnemar(wins, losses):.3g}")
        paired.accuracy.append((*_row(label, len(lines), *means[-1], low, high), *flips))
        if high < 0:
            paired.worse.append(label)
        if row := _likelihood_row(label, lines, seed):
            paired.likelihood.append(row)
    if len(by_task) > 1:
        _add_mean(paired, by_task, means, seed)
    return paired


def _add_mean(
    paired: Paired, by_task: dict[str, list[np.ndarray]], means: Sequence[tuple[float, float]], seed: int
) -> None:
    """Add a row for the mean over tasks, each counting once.

    With several numbers of examples, a task's documents are drawn once for all of them.
    """
    drawn = [
        resampled_means(np.mean(each, axis=0), seed + place) for place, each in enumerate(by_task.values())
    ]
    low, high = interval(np.mean(drawn, axis=0))
    sizes = [len(each) for each in by_task.values()]
    weights = [1 / size for size in sizes for _ in range(size)]
    before, after = (
        math.fsum(w * pair[n] for w, pair in zip(weights, means, strict=True)) / len(sizes) for n in (0, 1)
    )
    documents = sum(len(each[0]) for each in by_task.values())
    paired.accuracy.append((*_row(MEAN, documents, before, after, low, high), "", "", "", ""))
    if high < 0:
        paired.worse.append(MEAN)


def _paired_lines(first: Evaluation, second: Evaluation, label: str) -> list[tuple[Line, Line]]:
    others = second.answers[label]
    return [(line, others[doc_id]) for doc_id, line in sorted(first.answers[label].items())]


def _likelihood_row(label: str, lines: Sequence[tuple[Line, Line]], seed: int) -> tuple[str, ...] | None:
    """The right answers' mean log-likelihood per token; None for generated answers."""
    values = np.array([[_gold_likelihood(line) for line in pair] for pair in lines])
    if not np.isfinite(values).all():
        return None
    before, after = values.T
    low, high = interval(resampled_means(after - before, seed))
    wins, losses = int((after > before).sum()), int((after < before).sum())
    row = _row(label, len(lines), float(before.mean()), float(after.mean()), low, high)
    return (*row, str(wins), str(losses), str(len(lines) - wins - losses))


def _gold_likelihood(line: Line) -> float:
    """The right answer's log-likelihood per token; NaN if it is not known."""
    gold = line["gold"]
    if gold is None or gold >= len(line["loglikelihoods"]) or not line["tokens"][gold]:
        return math.nan
    return line["loglikelihoods"][gold] / line["tokens"][gold]


def _row(label: str, documents: int, before: float, after: float, low: float, high: float) -> tuple[str, ...]:
    return (
        label,
        str(documents),
        f"{before:.4f}",
        f"{after:.4f}",
        f"{after - before:+.4f}",
        f"[{low:+.4f}, {high:+.4f}]",
    )


def paired_tables(first: Evaluation, second: Evaluation, paired: Paired) -> str:
    """The comparison as text."""
    head = ["", "documents", first.name, second.name, "difference", "95 % interval", "wins", "losses", "ties"]
    blocks = [f"accuracy\n{table([*head, 'McNemar p'], paired.accuracy)}"]
    if paired.likelihood:
        title = "log-likelihood of the right answer, nats per token"
        blocks.append(f"{title}\n{table(head, paired.likelihood)}")
    return "\n\n".join(blocks)


def flipped(first: Evaluation, second: Evaluation, count: int) -> str:
    """The first `count` documents of each task that one model answered rightly and the other wrongly."""
    blocks = []
    for label in shared_labels(first, second):
        pairs = [
            pair for pair in _paired_lines(first, second, label) if pair[0]["correct"] != pair[1]["correct"]
        ]
        shown = pairs[:count]
        if not shown:
            continue
        texts = document_texts(first, label.rpartition("/")[0], [line["doc_id"] for line, _ in shown])
        blocks.append(f"{label}: {len(shown)} of {len(pairs)} documents that flipped")
        for ours, theirs in shown:
            doc_id = ours["doc_id"]
            lines = [f"  document {doc_id}: {_one_line(texts.get(doc_id, ''))}".rstrip(": ")]
            if ours["gold"] is not None:
                lines.append(f"    right answer: {_one_line(ours['choices'][ours['gold']])}")
            lines += [
                f"    {name}: {_answer(line)}" for name, line in ((first.name, ours), (second.name, theirs))
            ]
            blocks.append("\n".join(lines))
    return "\n".join(blocks) if blocks else "no document flipped"


def _answer(line: Line) -> str:
    verdict, chosen = "right" if line["correct"] else "wrong", line["chosen"]
    if isinstance(chosen, str):
        return f"{verdict}, {_one_line(chosen)!r}"
    if not isinstance(chosen, int) or chosen < 0 or len(line["choices"]) < 2:
        return verdict
    return f"{verdict}, {_one_line(line['choices'][chosen])}"


def _one_line(text: str) -> str:
    """A text without line breaks, and of a long one its end."""
    short = " ".join(text.split())
    return short if len(short) <= _LONGEST_TEXT else f"...{short[3 - _LONGEST_TEXT :]}"
