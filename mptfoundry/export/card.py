"""The README.md of an exported folder: what the model is, what it was trained on, and how to use it.

An adapter's folder has one, too, which says how to load its base.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mptfoundry.architecture.of_run import RUN_CONFIG
from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.checkpoints.checksums import identity_of
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.places import progress_of
from mptfoundry.run.metrics import mean_at_the_end, read_rows

PICTURE = "report.png"
_NOT_SCORES = ("documents", "seconds", "tokens", "bytes", "samples")
_USE = """```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}"{trust})
ids = tokenizer("Once upon a time", return_tensors="pt")
print({result})
```"""
_CUSTOM = """The network's code lies in this folder. It needs torch and transformers; triton and flash-attn
are used where they are installed."""
_LONGER = 'For sequences longer than {max_seq_len} tokens: `from_pretrained("{name}", max_seq_len=...)`.'


def model_card(
    name: str,
    source: ModelSource,
    folder: Path,
    dtype: torch.dtype,
    license: str | None,
    origin: str | None = None,
) -> str:
    """Return the model card: header for the hub, architecture, the run's numbers, loss picture, data mix.

    Args:
        name: The model's name.
        source: The model; the card uses its run folder if it has one.
        folder: The exported folder, with its `config.json`; the run's picture is copied into it.
        dtype: The dtype of the exported weights.
        license: SPDX name; without one the card says that none was stated.
        origin: A paragraph on where the model comes from.
    """
    config = source.config
    task, kind, auto = "text-generation", "language model", "AutoModelForCausalLM"
    result = "tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0])"
    if isinstance(config, HeadConfig):
        task, kind, result = config.task, f"model ({config.architecture})", "model(**ids)"
        auto = config.architecture.replace("Mpt", "AutoModel")
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    header["tags"] = ["mpt", "mptfoundry"]
    if license is not None:
        header["license"] = license
    results = evaluation_results(source)
    if results:
        header["model-index"] = _model_index(name, task, results)
    is_custom = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != "mpt"
    trust = ", trust_remote_code=True" if is_custom else ""
    longer = (
        [] if config.has_learned_positions else [_LONGER.format(name=name, max_seq_len=config.max_seq_len)]
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"An MPT {kind} with {count_parameters(config):,} parameters: {config.n_layers} layers of "
        f"width {config.d_model}, {config.n_heads} heads, {_positions(config)}, a vocabulary of "
        f"{config.vocab_size:,} and sequences of {config.max_seq_len:,} tokens. The weights are "
        f"{str(dtype).removeprefix('torch.')}.",
        "## Use",
        *([_CUSTOM] if is_custom else []),
        _USE.format(auto=auto, name=name, trust=trust, result=result),
        *longer,
    ]
    parts += ["## Origin", origin] if origin else []
    return "\n\n".join([*parts, *_evaluation(results), *_run(source, folder), *_licence(license)]) + "\n"


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
        name: Its path, or its name on the hub.
        revision: Its commit on the hub.
        is_folder: Whether it is a Hugging Face folder; otherwise it has to be exported before others load it.
        needs_code: Whether transformers needs the code of its folder.
    """

    name: str
    revision: str | None
    is_folder: bool
    needs_code: bool


def adapter_use(base: Base, adapter: str) -> list[str]:
    """Return Python lines that load an adapter with its base in peft, after a command if one is needed."""
    folder = base.name if base.is_folder else "HF_FOLDER"
    options = f', revision="{base.revision}"' * (base.revision is not None)
    options += ", trust_remote_code=True" * base.needs_code
    command = [] if base.is_folder else [f"# at first: mptfoundry export {base.name} {folder}"]
    return [
        *command,
        f'base = AutoModelForCausalLM.from_pretrained("{folder}"{options})',
        f'model = PeftModel.from_pretrained(base, "{adapter}")',
    ]


def adapter_card(
    name: str, source: ModelSource, folder: Path, lora: LoRAConfig, base: Base, parameters: str
) -> str:
    """Return the card of an adapter in peft's format, similar to `model_card`."""
    header: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base.revision is not None:
        header["base_model"] = base.name
    header["tags"] = ["mpt", "mptfoundry", "lora"]
    use = "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *adapter_use(base, name),
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"LoRA adapters (rank {lora.r}, alpha {lora.lora_alpha:g}) on "
        f"{', '.join(lora.targets(source.config))}, with {parameters} parameters. They are not a whole "
        f"model: they belong to {base.name}.",
        "## Use",
        f"```python\n{use}\n```",
    ]
    results = _evaluation(evaluation_results(source))
    return "\n\n".join([*parts, *results, *_run(source, folder), *_licence(None)]) + "\n"


@dataclass(frozen=True)
class Result:
    """The result of an evaluation on one label.

    Attributes:
        metrics: metric -> value.
        stderr: Standard error of the first one, if it is known.
        limit: How many documents it was limited to; -1: all of them.
    """

    metrics: dict[str, float]
    stderr: float | None
    limit: int


def evaluation_results(source: ModelSource) -> dict[str, Result]:
    """Return what is known of a model's evaluations, by label.

    These are the results in `evals/` next to the model that are of the same weights, the newest of each
    label, and those of all documents before those of some. Without any, they are the in-context tasks that
    training evaluated at the checkpoint's batch.
    """
    home = source.path.parent if source.run_folder is not None or source.path.is_file() else source.path
    # The callback that exports a run in progress names a checkpoint that may not be written yet.
    files = list(home.glob("evals/*/eval.json")) if source.path.exists() else []
    identity, stored = identity_of(source.path) if files else "", []
    for file in files:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(file.read_text(encoding="utf-8"))
            settings = content["settings"]
            if settings["model"] == identity:
                limit = int(settings.get("limit", -1))
                results = {label: _result(each, limit) for label, each in content["results"].items()}
                stored.append((limit < 0, file.stat().st_mtime, results))
    merged = {k: v for *_, results in sorted(stored, key=lambda each: each[:2]) for k, v in results.items()}
    return {k: v for k, v in (merged or _in_training(source)).items() if v.metrics}


def _result(metrics: Mapping[str, Any], limit: int) -> Result:
    scores = {k: float(v) for k, v in metrics.items() if _is_score(k, v)}
    stderr = metrics.get("stderr")
    return Result(scores, None if stderr is None or math.isnan(stderr) else float(stderr), limit)


def _is_score(name: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return is_number and name not in _NOT_SCORES and "stderr" not in name


def _in_training(source: ModelSource) -> dict[str, Result]:
    """The tasks that the run evaluated at the batch of its checkpoint."""
    progress = progress_of(source.path)
    if source.run_folder is None or progress is None:
        return {}
    rows = _records(source.run_folder / "metrics.jsonl", progress[1])
    rows = [row["eval"] for row in rows if row["batch"] == progress[1] and "eval" in row]
    tasks = [row for row in rows if any("stderr" in metrics for metrics in row.values())]
    return {label: _result(metrics, -1) for row in tasks for label, metrics in row.items()}


def _evaluation(results: Mapping[str, Result]) -> list[str]:
    rows = []
    for label, result in results.items():
        for number, (name, value) in enumerate(result.metrics.items()):
            error = "" if number or result.stderr is None else f" ± {result.stderr:.4f}"
            limited = f" (the first {result.limit} documents)" if result.limit >= 0 else ""
            rows.append((f"{label}: {name}", f"{_number(value)}{error}{limited}"))
    return ["## Evaluation", _table(("", ""), rows)] if rows else []


def _model_index(name: str, task: str, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The results as the hub reads them."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    entries = []
    for label, result in results.items():
        dataset, _, config = label.partition("/")
        for metric, value in result.metrics.items():
            entries.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset,
                    dataset_name=label,
                    dataset_config=config or None,
                    dataset_args={"limit": result.limit} if result.limit >= 0 else None,
                    metric_type="accuracy" if "Accuracy" in metric else metric,
                    metric_name=metric,
                    metric_value=round(value, 6),
                )
            )
    return eval_results_to_model_index(name, entries)


def _run(source: ModelSource, folder: Path) -> list[str]:
    """Describe the run that the model came from; copies its picture into the folder."""
    if source.run_folder is None:
        return []
    return _training(source.run_folder, source.path, folder) + _data_mix(source.run_folder)


def _licence(license: str | None) -> list[str]:
    return ["## Licence", f"{license}." if license else "None was stated by whoever exported this model."]


def _positions(config: MPTConfig) -> str:
    if config.attn_config.alibi:
        return "ALiBi"
    if config.attn_config.rope:
        return "rotary positions"
    return "learned positions" if config.has_learned_positions else "no positions"


def _training(run_folder: Path, checkpoint: Path, folder: Path) -> list[str]:
    """Describe the run's metrics up to this checkpoint; its picture may also show later batches."""
    progress = progress_of(checkpoint)
    records = _records(run_folder / "metrics.jsonl", progress[1] if progress else None)
    rows = []
    if steps := [record for record in records if "loss" in record]:
        last = steps[-1]
        rows.append(("batches", f"{last['batch']:,}"))
        rows.append(("tokens", f"{last['tokens']:,}"))
        losses = [math.nan if record["loss"] is None else record["loss"] for record in steps]
        rows.append(("training loss, mean of the last 5 %", _number(mean_at_the_end(losses))))
    for label, values in _last_evaluations(records).items():
        rows += [(f"{label}: {key}", _number(value)) for key, value in values.items()]
    if not rows:
        return []
    picture = run_folder / PICTURE
    if not picture.is_file():
        return ["## Training", _table(("", ""), rows)]
    shutil.copyfile(picture, folder / PICTURE)
    return ["## Training", _table(("", ""), rows), f"![loss, learning rate, speed, gradients]({PICTURE})"]


def _records(metrics: Path, until_batch: int | None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl up to a batch."""
    rows = read_rows(metrics) if metrics.is_file() else iter(())
    return [row for row in rows if until_batch is None or row["batch"] <= until_batch]


def _last_evaluations(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for record in records:
        results = record.get("eval", {})
        if not any("stderr" in metrics for metrics in results.values()):  # those are of in-context tasks
            entries.update(results)
    return entries


def _data_mix(run_folder: Path) -> list[str]:
    """List the streams' names and shares, but not their locations, which are private."""
    run = yaml.safe_load((run_folder / RUN_CONFIG).read_text(encoding="utf-8"))
    dataset = (run.get("train_loader") or {}).get("dataset") or {}
    rows = []
    for name, stream in (dataset.get("streams") or {}).items():
        given = [
            f"{key} {stream[key]}"
            for key in ("proportion", "repeat", "choose")
            if stream.get(key) is not None
        ]
        rows.append((name, ", ".join(given) or "by its size"))
    return ["## Data", _table(("stream", "share"), rows)] if rows else []


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
