"""A run's report in one picture and one page: `report.png` and `report.md` in its folder.

Both are made from `metrics.jsonl` alone, so they can be made at any time: at the end, while the run trains,
or after a crash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from mptfoundry.checkpoints.checkpoint import newest_first
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import DataError, first_line
from mptfoundry.files import writing_into
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.run.metrics import FEWEST_POINTS, mean_at_the_end, smooth
from mptfoundry.run.metrics_file import NAME, Row, read_rows

PICTURE = "report.png"
PAGE = "report.md"
TRACKERS = "trackers.json"
# The evaluation metric that compares with the training loss: for a language model, and for a model with a
# head.
EVAL_LOSSES = ("LanguageCrossEntropy", "loss")
# Rows of a table of evaluations, columns of one of tasks, and curves that a legend names.
MOST_EVALUATIONS, MOST_COLUMNS, MOST_LABELS = 50, 8, 12
GAUNTLET = "eval_gauntlet"


def read_trackers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the ids and pages of a run's trackers, `{"wandb": {"id": ..., "url": ...}}`; empty without any.

    Raises:
        DataError: The file is damaged.
    """
    file = folder / TRACKERS
    try:
        return {name: dict(entry) for name, entry in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: can't be read ({first_line(error)}). Remove it to begin new runs in the trackers."
        ) from error


def write_report(run_folder: str | Path, *, facts: Mapping[str, str] | None = None) -> Path:
    """Write `report.png` and `report.md` for a run, finished or not, and return the page's path.

    Args:
        run_folder: The folder that holds `metrics.jsonl`.
        facts: More rows for the page's table, shown first, such as the model and its parameters.

    Raises:
        DataError: The folder has no metrics yet.
        ConfigError: The folder can't be written to.
    """
    folder = Path(run_folder)
    source, page = folder / NAME, folder / PAGE
    rows = list(read_rows(source)) if source.exists() else []
    batches = [row for row in rows if "loss" in row and row.get("seconds") is not None]
    if not batches:
        raise DataError(f"{source}: no batch has been recorded, so there is nothing to report. Train first.")
    evaluations = [row for row in rows if "eval" in row and row.get("tokens") is not None]
    with writing_into(folder):
        draw(batches, evaluations, folder / PICTURE)
        page.write_text(describe(folder, batches, evaluations, facts or {}))
    return page


def report_if_possible(run_folder: str | Path, *, facts: Mapping[str, str] | None = None) -> str:
    """Write the report, or say why there is none. An error here never ends training."""
    try:
        return f"report: {write_report(run_folder, facts=facts)}"
    except Exception as error:  # includes errors of the plotting library
        return f"report: left out ({first_line(error)})"


def describe(
    folder: Path, batches: Sequence[Row], evaluations: Sequence[Row], facts: Mapping[str, str]
) -> str:
    """Return the page as Markdown, from the rows of at least one batch and of any evaluations."""
    first, last = batches[0], batches[-1]
    losses = _column(batches, "loss")
    table = {
        **facts,
        "steps": f"{last['batch']:,}",
        "samples": f"{last['samples']:,}" if "samples" in last else "",
        "tokens": f"{last['tokens']:,}",
        "loss": f"{_number(first['loss'])} at first, {_number(mean_at_the_end(losses))} at the end "
        "(the mean of the last 5 % of the steps)",
        "training time": f"{timedelta(seconds=round(last['seconds']))}, evaluations not included",
        "time per step": f"{last['seconds'] / last['batch']:.3g} s",
        "tokens per second": _median(batches, "tokens_per_second", "{:,.0f}"),
        "tokens per second, foretold": _median(batches, "foretold_tokens_per_second", "{:,.0f}"),
        "MFU": _median(batches, "mfu", "{:.1%}"),
        "peak memory": f"{peak / 2**30:.2f} GiB" if (peak := last.get("peak_memory_bytes")) else "",
    }
    lines = [f"# {folder.resolve().name}", "", f"![loss, learning rate, speed, gradients]({PICTURE})", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items() if value)]
    lines += [*_evaluations(evaluations), *(_task_table(evaluations) if _has_tasks(evaluations) else [])]
    lines += ["", "## Where everything lies", "", "| | |", "|---|---|"]
    lines += [f"| {what} | `{where}` |" for what, where in _places(folder).items()]
    return "\n".join(lines) + "\n"


def draw(batches: Sequence[Row], evaluations: Sequence[Row], path: Path) -> None:
    """Plot loss, evaluations, tasks, learning rate, tokens/s and gradient norm over tokens, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    heights = [3, *([2] if _has_tasks(evaluations) else []), 1, 1, 1]
    figure = Figure(figsize=(9, 7 + sum(heights) / 2), layout="constrained")
    loss, *of_tasks, lr, speed, norm = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in of_tasks:
        _draw_scores(axes, evaluations)
    tokens, losses = [row["tokens"] for row in batches], _column(batches, "loss")
    # The loss of a short run isn't smoothed.
    is_short = len(batches) < FEWEST_POINTS
    style: dict[str, Any] = {"linewidth": 0.8, **({"marker": ".", "markersize": 6} if is_short else {})}
    loss.plot(tokens, losses, color="C0" if is_short else "0.8", label="loss", **style)
    if not is_short:
        loss.plot(tokens, smooth(losses), color="C0", label="loss, smoothed")
    for number, (label, points) in enumerate(eval_losses(evaluations).items(), start=1):
        line = {"marker": "o", "markersize": 4, "linewidth": 0.8, "color": f"C{number}"}
        loss.plot(*zip(*points, strict=True), **line, label=f"eval {label}")
    loss.legend()
    for axes, name in ((lr, "lr"), (speed, "tokens_per_second"), (norm, "grad_norm")):
        axes.plot(tokens, _column(batches, name), color="C0", **style)
    has_head = any("loss" in metrics for row in evaluations for metrics in row["eval"].values())
    titles = ["loss" if has_head else "loss, nats per token", *["accuracy" for _ in of_tasks]]
    titles += ["learning rate", "tokens/s", "gradient norm"]
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set_ylabel(title)
        axes.grid(True, color="0.9")
        axes.margins(x=0.01)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    norms = [value for value in _column(batches, "grad_norm") if value > 0]
    if norms and max(norms) > 10 * min(norms):  # over a smaller range a log axis has hardly any round ticks
        _use_log_scale(norm)
    norm.set_xlabel("tokens")
    norm.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=110)


def _use_log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _evaluations(evaluations: Sequence[Row]) -> list[str]:
    """Return a table of each label's evaluations: all of them, or an evenly spaced subset."""
    by_label: dict[str, list[Row]] = {}
    for row in evaluations:
        for label, metrics in row["eval"].items():
            if "stderr" not in metrics and label != GAUNTLET:
                by_label.setdefault(label, []).append({"batch": row["batch"], **metrics})
    lines: list[str] = []
    for label, evaluated in by_label.items():
        names = [name for name in evaluated[-1] if name != "batch"]
        lines += ["", f"## Evaluation: {label}", "", f"| batch | {' | '.join(names)} |"]
        lines += ["|" + "---|" * (len(names) + 1)]
        count = min(len(evaluated), MOST_EVALUATIONS)
        shown = [evaluated[round(place * (len(evaluated) - 1) / max(1, count - 1))] for place in range(count)]
        for row in shown:
            lines.append(f"| {row['batch']} | {' | '.join(_number(row.get(name)) for name in names)} |")
        if count < len(evaluated):
            lines += ["", f"{count} of {len(evaluated):,} evaluations; all of them are in `{NAME}`."]
    return lines


def _has_tasks(evaluations: Sequence[Row]) -> bool:
    """Whether some are of in-context tasks: those have standard errors."""
    return any("stderr" in metrics for row in evaluations for metrics in row["eval"].values())


def task_scores(evaluations: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the `score` of each task and of each average of a gauntlet, with its `batch`, `tokens` and,
    for a task, its `stderr`. The categories of a task are left out.
    """
    scores: dict[str, list[Row]] = {}
    for row in evaluations:
        for label, metrics in row["eval"].items():
            now = {"batch": row["batch"], "tokens": row["tokens"]}
            if label == GAUNTLET:
                for name, score in metrics.items():
                    scores.setdefault(f"{GAUNTLET}: {name}", []).append({**now, "score": score})
            elif "stderr" in metrics and label.rpartition("/")[0] not in row["eval"]:
                score = next((value for name, value in metrics.items() if "Accuracy" in name), None)
                scores.setdefault(label, []).append({**now, "score": score, "stderr": metrics["stderr"]})
    return scores


def _draw_scores(axes: Any, evaluations: Sequence[Row]) -> None:
    scores = task_scores(evaluations)
    for label, points in scores.items():
        is_average = label.startswith(GAUNTLET)
        style = {"marker": "o", "markersize": 3, "linewidth": 2 if is_average else 0.8}
        values = [math.nan if point["score"] is None else point["score"] for point in points]
        axes.plot([point["tokens"] for point in points], values, label=label, **style)
    if len(scores) <= MOST_LABELS:
        axes.legend(fontsize="small")


def _task_table(evaluations: Sequence[Row]) -> list[str]:
    """Return a table of the tasks' scores, with an evenly spaced subset of the evaluations as columns."""
    scores = task_scores(evaluations)
    batches = sorted({point["batch"] for points in scores.values() for point in points})
    count = min(len(batches), MOST_COLUMNS)
    shown = [batches[round(place * (len(batches) - 1) / max(1, count - 1))] for place in range(count)]
    lines = ["", "## In-context tasks", "", f"| accuracy after batch | {' | '.join(map(str, shown))} |"]
    lines += ["|" + "---|" * (count + 1)]
    for label, points in scores.items():
        by_batch = {point["batch"]: point for point in points}
        lines += [f"| {label} | {' | '.join(_with_error(by_batch.get(batch)) for batch in shown)} |"]
    if count < len(batches):
        lines += ["", f"{count} of {len(batches):,} evaluations; all of them are in `{NAME}`."]
    return lines


def _with_error(point: Row | None) -> str:
    if point is None or point["score"] is None:
        return ""
    error = point.get("stderr")
    return f"{point['score']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _places(folder: Path) -> dict[str, str]:
    """Return which parts of a run exist, and where."""
    checkpoints = newest_first(folder)
    places = {
        "the resolved configuration": folder / "config.yaml",
        "every batch and evaluation": folder / NAME,
        "the picture": folder / PICTURE,
        "the tokenizer": folder / "tokenizer",
        **({"the last checkpoint": checkpoints[0].path} if checkpoints else {}),
    }
    found = {what: str(path.resolve()) for what, path in places.items() if path.exists()}
    if (folder / TRACKERS).is_file():
        found |= {name: entry["url"] for name, entry in read_trackers(folder).items() if entry.get("url")}
    return found


def eval_losses(evaluations: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return each label's losses after so many tokens, whatever the model's task."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in evaluations:
        for label, metrics in row["eval"].items():
            losses = [metrics[name] for name in EVAL_LOSSES if metrics.get(name) is not None]
            if losses:
                points.setdefault(label, []).append((row["tokens"], losses[0]))
    return points


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _median(rows: Sequence[Row], name: str, form: str) -> str:
    values = sorted(row[name] for row in rows if row.get(name) is not None)
    return form.format(values[len(values) // 2]) if values else ""


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "not finite"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"


def facts_of(config: TrainConfig, dataset: Any) -> dict[str, str]:
    """Return rows for the report's table; a dataset for finetuning knows the examples of its streams."""
    sources = config.train_loader.dataset.sources
    stores = getattr(dataset, "stores", [None] * len(sources))
    data = [_stream(*each) for each in zip(sources.items(), stores, strict=True)]
    return {
        "model": config.model.name,
        "parameters": f"{count_parameters(config.model):,}",
        "base": config.model.pretrained_model_name_or_path or config.load_path or "",
        "data": "; ".join(data),
    }


def _stream(named: tuple[str, Any], store: Any) -> str:
    """Describe a stream: its location, its share of the mix, and what its examples contain."""
    name, source = named
    places = [getattr(source, key, None) for key in ("hf_name", "local", "remote", "place")]
    words = [str(place) for place in places if place][:1]
    shares = {key: getattr(source, key, None) for key in ("proportion", "repeat", "choose")}
    words += [f"{key} {value:g}" for key, value in shares.items() if value is not None]
    if store is not None:
        tokens, in_loss = int(store.lengths.sum()), int(store.trained.sum())
        words.append(f"{len(store):,} examples of {tokens:,} tokens, {in_loss:,} of them in the loss")
    return f"{name}: {', '.join(words)}"
