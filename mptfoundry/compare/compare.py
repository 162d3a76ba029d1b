"""`mptfoundry compare A B ...`: two or more runs, or two or more evaluations.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mptfoundry.compare.evaluations import (
    Evaluation,
    differing_settings,
    find_evaluation,
    read_evaluation,
    refuse_incomparable,
    shared_labels,
)
from mptfoundry.compare.runs import compare_runs, read_run
from mptfoundry.compare.tables import differences, number, short_names, table
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.run.metrics import NAME

if TYPE_CHECKING:
    from mptfoundry.config.verbs import CompareConfig


@dataclass(frozen=True)
class Comparison:
    """A comparison as text, and what is significantly worse than in the first evaluation."""

    text: str
    worse: tuple[str, ...] = ()


def compare(options: CompareConfig) -> Comparison:
    """Compare the runs, or the evaluations, that the options name.

    Raises:
        DataError: A place is neither, or they are not comparable.
        ConfigError: An option has no effect on them.
    """
    paths = [Path(place).expanduser() for place in options.places]
    kinds = {path: _kind(path) for path in paths}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path} is {kind}" for path, kind in kinds.items())
        raise DataError(f"{listed}: compare runs with runs and evaluations with evaluations.")
    names = short_names(paths)
    if kinds[paths[0]] == "a run":
        for key in ("examples", "fail_if"):
            if getattr(options, key):
                raise ConfigError(f"{key}: is for evaluations, and {paths[0]} is a run. Remove it.")
        runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
        return Comparison(compare_runs(runs, options.picture))
    if options.picture is not None:
        raise ConfigError(f"picture: is for runs, and {paths[0]} is an evaluation. Remove it.")
    found = [(find_evaluation(path), name) for path, name in zip(paths, names, strict=True)]
    evaluations = [read_evaluation(path, name) for path, name in found if path is not None]
    return compare_evaluations(evaluations, options)


def _kind(path: Path) -> str:
    if (path / NAME).is_file():
        return "a run"
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder. Name a run, or an evaluation's eval.json.")
    if find_evaluation(path) is None:
        raise DataError(
            f"{path}: is neither a run (a folder with {NAME}) nor an evaluation (a folder with eval.json)."
        )
    return "an evaluation"


def compare_evaluations(evaluations: Sequence[Evaluation], options: CompareConfig) -> Comparison:
    """Compare each evaluation with the first one."""
    from mptfoundry.compare.answers_table import flipped, pair, paired_tables

    first, *others = evaluations
    for other in others:
        refuse_incomparable(first, other)
    names = [each.name for each in evaluations]
    text = differences(differing_settings(evaluations), names)
    blocks = [f"What differs in their settings:\n{text}" if text else "Their settings are the same."]
    blocks += _notes(evaluations, options)
    if losses := _losses(evaluations):
        blocks.append(losses)
    worse = []
    for other in others:
        if shared_labels(first, other):
            paired = pair(first, other, options.seed)
            blocks.append(paired_tables(first, other, paired))
            worse += [f"{other.name}: {label}" for label in paired.worse]
            if options.examples:
                blocks.append(flipped(first, other, options.examples))
    return Comparison("\n\n".join(blocks), tuple(worse))


def _notes(evaluations: Sequence[Evaluation], options: CompareConfig) -> list[str]:
    """What a reader must know: limits, and tasks that only some have answered."""
    notes, first = [], evaluations[0]
    limit = first.settings.get("limit", -1)
    if limit != -1:
        notes.append(f"note: limited: only the first {limit} documents of each task were evaluated.")
    batches = first.options.get("eval_subset_num_batches", -1)
    if first.losses and batches != -1:
        notes.append(f"note: limited: losses are over the first {batches} batches.")
    for other in evaluations[1:]:
        apart = [
            (first, set(first.answers) - set(other.answers)),
            (other, set(other.answers) - set(first.answers)),
        ]
        if options.fail_if == "worse" and (apart[0][1] or not first.answers):
            lacking = ", ".join(sorted(apart[0][1])) or "answers to tasks"
            raise DataError(f"fail_if: {other.name} lacks {lacking}, so that it can't be judged.")
        for each, labels in apart:
            if labels:
                notes.append(f"note: only {each.name} has {', '.join(sorted(labels))}; left out.")
    return ["\n".join(notes)] if notes else []


def _losses(evaluations: Sequence[Evaluation]) -> str:
    """A table of the losses on labelled loaders; there are no intervals, because only sums are kept."""
    first = evaluations[0]
    rows = []
    for label, metrics in first.losses.items():
        for metric in (name for name in metrics if name not in ("tokens", "LanguagePerplexity")):
            values = [each.losses.get(label, {}).get(metric) for each in evaluations]
            rows.append((f"{label} {metric}", *map(number, values)))
    names = [each.name for each in evaluations]
    return f"held-out text (one number each, so no interval)\n{table(['', *names], rows)}" if rows else ""
