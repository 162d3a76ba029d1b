"""Evaluate a finished model: `evaluate(options)` measures its loss on labelled held-out text.

Every token counts once, whatever the batch size and the number of ranks (see evals/token_loss.py).
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Evaluator
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from mptfoundry import build
from mptfoundry.architecture.of_run import read_run
from mptfoundry.checkpoints.reading import network_of, open_model, outline_of, tokenizer_of
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.starting import StartingWeights
from mptfoundry.config.data import LoaderConfig
from mptfoundry.config.load import load_train_config
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.data.loading import LoaderContext
from mptfoundry.errors import ConfigError
from mptfoundry.files import whole_or_absent
from mptfoundry.loaders import build_evaluators
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.sharding import start_on_the_cpu
from mptfoundry.plan.devices import Device, detect_device
from mptfoundry.plan.plan import COMPUTE_DTYPE, choose_precision, choose_workers, precision_problem
from mptfoundry.tokenizer import check_tokenizer, load_tokenizer

EVAL_BATCH_SIZE = 8
# Warnings Composer raises about things we do on purpose: a smaller last batch, no optimizer.
EXPECTED_WARNINGS = ("Cannot split (tensor|list) of length", "No optimizer was specified")

Results = dict[str, dict[str, float]]


def evaluate(options: EvalConfig) -> Results:
    """Measure loss, perplexity and bits per byte of a model on each of its labelled loaders.

    Returns:
        label -> metric -> value; `LanguageCrossEntropy` in nats per token. Also written to `options.out`.

    Raises:
        ConfigError, DataError, CheckpointError: Something the options name is missing or doesn't fit.
    """
    device = detect_device()
    precision = choose_precision(device)[0] if options.precision == "auto" else options.precision
    if problem := precision_problem(precision, device):
        raise ConfigError(f"precision: {problem}")
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    if dist.get_world_size() > 1:
        dist.initialize_dist(device.kind, timeout=options.dist_timeout)
    source = open_model(options.model, base=options.base, verify=options.verify)
    tokenizer: Any = load_tokenizer(options.tokenizer) if options.tokenizer else tokenizer_of(source)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {options.model} has none. Name the one it was trained with.")
    check_tokenizer(tokenizer, source.config.vocab_size)
    evaluators = _evaluators(options, source, tokenizer, device)
    is_sharded = dist.get_world_size() > 1 and _was_sharded(source)
    trainer = Trainer(
        model=_model(options, source, device, tokenizer, precision, is_sharded=is_sharded),
        parallelism_config={"fsdp": FSDP2Config()} if is_sharded else None,
        eval_dataloader=evaluators,
        eval_subset_num_batches=options.eval_subset_num_batches,
        device=device.kind,
        precision=precision,
        seed=options.seed,
        progress_bar=sys.stderr.isatty(),
        python_log_level="warning",
        dist_timeout=options.dist_timeout,
    )
    trainer.eval()
    results = {
        label: {name: float(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
    }
    trainer.close()
    if dist.get_global_rank() == 0:
        _write(results, options, source)
    return results


def results_table(results: Results) -> str:
    """Format the results as a table, one row per label."""
    names = list(next(iter(results.values())))
    width = max(len("label"), *(len(label) for label in results))
    lines = ["  ".join([f"{'label':{width}}", *names])]
    for label, metrics in results.items():
        cells = (f"{_short(metrics[name]):>{len(name)}}" for name in names)
        lines.append("  ".join([f"{label:{width}}", *cells]))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4f}"


def _was_sharded(source: ModelSource) -> bool:
    """Whether the model's run sharded it: then it may not fit on one device."""
    return source.run_folder is not None and read_run(source.run_folder).get("fsdp_config") is not None


def _model(
    options: EvalConfig,
    source: ModelSource,
    device: Device,
    tokenizer: Any,
    precision: str,
    *,
    is_sharded: bool,
) -> ComposerMPT:
    """Build the model with its weights, or as an outline for which each rank later reads its shards."""
    chosen: dict[str, Any] = {
        "device": device.torch_type,
        "compute_dtype": getattr(torch, COMPUTE_DTYPE[precision]),
        "attn_impl": options.attn_impl,
    }
    if not is_sharded:
        return build.compose(network_of(source, dtype=torch.float32, **chosen), tokenizer)
    network = outline_of(source, **chosen)
    model = build.compose(network, tokenizer)
    model.start_from(StartingWeights(source, network, seed=options.seed))
    if device.kind == "cpu":
        start_on_the_cpu(network)
    return model


def _loaders(options: EvalConfig, source: ModelSource) -> dict[str, LoaderConfig]:
    """Return the loaders that the command names, or those of the run that the model came from."""
    if options.eval_loaders:
        return options.eval_loaders
    if source.run_folder is not None:
        # Evaluation uses no loggers, and their settings may refer to environment variables missing here.
        words = ["code_paths=[]", "allow_code=true", "loggers=null"]
        config, _ = load_train_config(source.run_folder / "config.yaml", words)
        if config.eval_loaders:
            return config.eval_loaders
    raise ConfigError(
        f"eval_loader: is not given, and {options.model} belongs to no run that has one. "
        "Say what to evaluate on: eval_loader.name=text eval_loader.dataset.local=SHARDS "
        "eval_loader.dataset.split=val."
    )


def _evaluators(options: EvalConfig, source: ModelSource, tokenizer: Any, device: Device) -> list[Evaluator]:
    loaders, batch_size = _loaders(options, source), options.device_eval_batch_size
    context = LoaderContext(
        model=source.config,
        tokenizer=tokenizer,
        max_seq_len=options.max_seq_len or source.config.max_seq_len,
        device_batch_size=EVAL_BATCH_SIZE if batch_size == "auto" else batch_size,
        seed=options.seed,
        num_workers=0,
        is_training=False,
        where="eval_loader",
        allow_code=options.allow_code,
    )
    workers = {label: _workers(loader, device) for label, loader in loaders.items()}
    return build_evaluators(loaders, context, workers)


def _workers(loader: LoaderConfig, device: Device) -> int:
    return choose_workers(device)[0] if loader.num_workers == "auto" else loader.num_workers


def _write(results: Results, options: EvalConfig, source: ModelSource) -> None:
    folder = source.path if source.path.is_dir() else source.path.parent
    out = Path(options.out) if options.out else folder / "eval.json"
    content: dict[str, Any] = {"model": str(source.path), "results": results, "options": asdict(options)}
    with whole_or_absent(out, overwrite=True) as path:
        path.write_text(json.dumps(content, indent=2) + "\n")
