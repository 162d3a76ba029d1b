"""Runs side by side: what differs in their configs, and their losses at equal tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptfoundry.compare.tables import differences, number, table
from mptfoundry.config.load import load_saved_config, to_yaml, values_by_key
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.files import whole_or_absent
from mptfoundry.run.metrics import FEWEST_POINTS, NAME, mean_at_the_end, read_rows, smooth

# Every run has its own, so they are not worth a row.
_OWN_KEYS = ("run_name", "save_folder")
_LOSSES = ("LanguageCrossEntropy", "loss")
# Losses before this share of the shortest run may lie above the picture.
_SHARE_OF_THE_FALL = 0.1

Point = tuple[int, float]


@dataclass(frozen=True)
class Run:
    """What a run's folder says about it.

    Attributes:
        name: Short name.
        config: Its resolved config by key; None if its `config.yaml` is missing or damaged.
        losses: (tokens, loss) of each step.
        held_out: label -> metric -> (tokens, value) of each evaluation.
        tokenizer: The content of its tokenizer; None if there is none.
    """

    name: str
    config: dict[str, Any] | None
    losses: list[Point]
    held_out: dict[str, dict[str, list[Point]]]
    tokenizer: bytes | None


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder, of a run that is finished or not.

    Raises:
        DataError: It has no steps yet.
    """
    losses: list[Point] = []
    held_out: dict[str, dict[str, list[Point]]] = {}
    for row in read_rows(folder / NAME):
        if "loss" in row:
            losses.append((row["tokens"], math.nan if row["loss"] is None else row["loss"]))
        elif "eval" in row and row.get("tokens") is not None:
            for label, metrics in row["eval"].items():
                for metric, value in metrics.items():
                    if value is not None:
                        held_out.setdefault(label, {}).setdefault(metric, []).append((row["tokens"], value))
    if not losses:
        raise DataError(f"{folder / NAME}: has no steps, so there is nothing to compare. Train first.")
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    content = tokenizer.read_bytes() if tokenizer.is_file() else None
    return Run(name, _config_of(folder / "config.yaml"), losses, held_out, content)


def _config_of(path: Path) -> dict[str, Any] | None:
    try:
        # A run's loggers may refer to environment variables that are missing here.
        values = values_by_key(to_yaml(load_saved_config(path, ["loggers=null"])))
    except ConfigError:
        try:
            values = values_by_key(path.read_text(encoding="utf-8"))  # written by another version
        except Exception:  # from YAML, OmegaConf or the file system
            return None
    return {key: value for key, value in values.items() if key not in _OWN_KEYS}


def compare_runs(runs: Sequence[Run], picture: str | None) -> str:
    """Describe the runs in tables, and draw their losses into `picture`."""
    names = [run.name for run in runs]
    notes = [f"note: {run.name} has no config.yaml that can be read." for run in runs if run.config is None]
    configs = [run.config for run in runs if run.config is not None]
    is_one_tokenizer = len({run.tokenizer for run in runs}) == 1
    blocks = []
    if len(configs) == len(runs):
        text = differences(configs, names)
        blocks.append(f"What differs in their configs:\n{text}" if text else "Their configs are the same.")
        if any(_of_evaluation(each) != _of_evaluation(configs[0]) for each in configs):
            notes.append("note: their eval_loader differs; held-out losses may be of other texts.")
    if not is_one_tokenizer:
        notes.append(
            "note: their tokenizers differ, so losses per token can't be compared; bits_per_byte is shown."
        )
    curves = _curves(runs, is_one_tokenizer)
    if not curves:
        raise DataError(
            "the runs have different tokenizers and no bits_per_byte of a held-out text, so that nothing in "
            "them can be compared. Evaluate both on the same text with mptfoundry eval."
        )
    blocks.append(_table(runs, curves))
    if picture is not None:
        draw(names, curves, Path(picture))
        notes.append(f"picture: {picture}")
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _of_evaluation(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.startswith("eval_loader.")}


def _curves(runs: Sequence[Run], is_one_tokenizer: bool) -> dict[str, list[list[Point]]]:
    """Title -> each run's points: the training loss, and one curve for each label of an evaluation."""
    curves = {"loss": [run.losses for run in runs]} if is_one_tokenizer else {}
    for label in dict.fromkeys(label for run in runs for label in run.held_out):
        metrics = list(dict.fromkeys(metric for run in runs for metric in run.held_out.get(label, ())))
        losses = [metric for metric in _LOSSES if metric in metrics]
        if "bits_per_byte" in metrics and not is_one_tokenizer:
            metric = "bits_per_byte"
        elif losses and not is_one_tokenizer:
            continue
        else:
            metric = losses[0] if losses else metrics[0]
        title = f"eval {label}" if metric in _LOSSES else f"{label} {metric}"
        curves[title] = [run.held_out.get(label, {}).get(metric, []) for run in runs]
    return curves


def _table(runs: Sequence[Run], curves: dict[str, list[list[Point]]]) -> str:
    """The last values of each run; where one trained longer, also those at equal tokens."""
    ends = [run.losses[-1][0] for run in runs]
    head, columns = ["", "tokens"], [[run.name for run in runs], [f"{end:,}" for end in ends]]
    for title, points in curves.items():
        head.append(title)
        columns.append([number(_last(title, each)) for each in points])
    if len(set(ends)) > 1:
        for title, points in curves.items():
            tokens = min(ends) if title == "loss" else _last_common(points)
            if tokens is None:
                continue
            head.append(f"{title} at {tokens:,}")
            columns.append([number(_last(title, _until(each, tokens))) for each in points])
    rows = list(zip(*columns, strict=True))
    lines = [table(head, rows), "(loss: the mean over the last 5 % of the steps)" if "loss" in curves else ""]
    if len(set(ends)) > 1:
        lines.append("(at N: after as many tokens as all of them have, or were evaluated at)")
    return "\n".join(line for line in lines if line)


def _until(points: Sequence[Point], tokens: int) -> list[Point]:
    return [point for point in points if point[0] <= tokens]


def _last(title: str, points: Sequence[Point]) -> float | None:
    if title == "loss":
        return mean_at_the_end([value for _, value in points])
    return points[-1][1] if points else None


def _last_common(points: Sequence[Sequence[Point]]) -> int | None:
    """The last number of tokens after which all runs were evaluated."""
    common = set.intersection(*({tokens for tokens, _ in each} for each in points))
    return max(common, default=None)


def draw(names: Sequence[str], curves: dict[str, list[list[Point]]], path: Path) -> None:
    """Plot each curve over tokens, a panel for each and a colour for each run, as a picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    heights = [2.0 if title == "loss" else 1.0 for title in curves]
    figure = Figure(figsize=(9, 2 + 2 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (title, points) in zip(panels, curves.items(), strict=True):
        for place, (name, each) in enumerate(zip(names, points, strict=True)):
            tokens, values = [tokens for tokens, _ in each], [value for _, value in each]
            if title == "loss" and len(values) >= FEWEST_POINTS:
                axes.plot(tokens, smooth(values), color=f"C{place}", linewidth=1, label=name)
            else:
                axes.plot(
                    tokens, values, color=f"C{place}", linewidth=1, marker="o", markersize=3, label=name
                )
        axes.set_ylabel("loss, smoothed" if title == "loss" else title)
        axes.grid(True, color="0.9")
        axes.margins(x=0.01)
        _leave_out_the_fall(axes, points)
    panels[0].legend()
    panels[-1].set_xlabel("tokens")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    with whole_or_absent(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix[1:])


def _leave_out_the_fall(axes: Any, points: Sequence[Sequence[Point]]) -> None:
    """Limit a panel to what follows the steep fall at the beginning, which hides differences at the end."""
    shortest = min((each[-1][0] for each in points if each), default=0)
    later = [
        value
        for line in axes.get_lines()
        for tokens, value in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if tokens >= _SHARE_OF_THE_FALL * shortest and not math.isnan(value)
    ]
    if later and max(later) > min(later):
        margin = 0.05 * (max(later) - min(later))
        axes.set_ylim(min(later) - margin, max(later) + margin)
