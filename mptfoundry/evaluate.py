"""Evaluate a finished model: its loss on labelled held-out text, and its answers to in-context tasks.

Every token and every document counts once, whatever the batch size and the number of ranks (see
evals/token_loss.py and tasks/).
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
from composer.core.precision import get_precision_context
from composer.utils import collect_env, dist
from composer.utils.parallelism import FSDP2Config

from mptfoundry import build, plugins
from mptfoundry.architecture.of_run import read_run
from mptfoundry.checkpoints.reading import network_of, open_model, outline_of, tokenizer_of
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.starting import StartingWeights
from mptfoundry.config.data import LoaderConfig
from mptfoundry.config.load import load_saved_config
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.data.loading import LoaderContext
from mptfoundry.errors import AnotherModelError, ConfigError
from mptfoundry.files import whole_or_absent
from mptfoundry.loaders import build_evaluators
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.sharding import start_on_the_cpu
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.plan.devices import Device, cpu_name, detect_device
from mptfoundry.plan.gpu_support import imported_torch, refuse_unsupported
from mptfoundry.plan.packages import refuse_missing_packages
from mptfoundry.plan.plan import COMPUTE_DTYPE, choose_precision, choose_workers, precision_problem
from mptfoundry.ranks import rank, say, world_size
from mptfoundry.tasks.evaluation import Model, TaskPlan, evaluate_tasks, plan_tasks
from mptfoundry.tokenizer import check_tokenizer, load_tokenizer

EVAL_BATCH_SIZE = 8
# Warnings Composer raises about things we do on purpose: a smaller last batch, no optimizer.
EXPECTED_WARNINGS = (
    "Cannot split (tensor|list) of length",
    "No optimizer was specified",
    "FSDP2 Config/APIs are experimental",
)

Results = dict[str, dict[str, float]]


def evaluate(options: EvalConfig) -> Results:
    """Measure a model's loss on labelled loaders, or its accuracy in tasks, or both.

    Returns:
        label -> metric -> value; `LanguageCrossEntropy` in nats per token. Also written to a file, see
        `EvalConfig.out`.

    Raises:
        ConfigError, DataError, CheckpointError: Something the options name is missing or doesn't fit.
    """
    device, precision = _set_up(options)
    source = _open(options)
    tokenizer: Any = load_tokenizer(options.tokenizer) if options.tokenizer else tokenizer_of(source)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {options.model} has none. Name the one it was trained with.")
    check_tokenizer(tokenizer, source.config.vocab_size)
    max_seq_len = options.length_for(source.config.max_seq_len)
    plan = None
    if options.icl_tasks is not None or options.public_tasks:
        plan = plan_tasks(
            options, source, tokenizer, max_seq_len=max_seq_len, device=device.name, precision=precision
        )
    evaluators = []
    if plan is None or options.eval_loaders or options.is_of_long_context:
        evaluators = _evaluators(options, source, tokenizer, device)
    is_sharded = world_size() > 1 and _was_sharded(source)
    composer_model = _model(options, source, device, tokenizer, precision, is_sharded=is_sharded)
    trainer = Trainer(
        model=composer_model,
        parallelism_config={"fsdp": FSDP2Config()} if is_sharded else None,
        eval_dataloader=evaluators,
        eval_subset_num_batches=options.eval_subset_num_batches,
        device=device.kind,
        precision=precision,
        loggers=build.build_loggers(options, _results_file(options, source, plan).parent),
        seed=options.seed,
        progress_bar=sys.stderr.isatty(),
        python_log_level="warning",
        dist_timeout=options.dist_timeout,
    )
    results: Results = {}
    if evaluators and not options.is_of_long_context:
        results = _losses(trainer)
    if plan is not None:
        network: Any = composer_model.model.eval()
        with get_precision_context(precision):
            model = Model(network, tokenizer, is_sharded=is_sharded)
            scores = evaluate_tasks(model, plan, batch_size=_batch_size(options))
        trainer.logger.log_metrics(logged_scores(scores))
        results |= scores
    buckets: dict[str, Any] = {}
    if options.is_of_long_context:
        with get_precision_context(precision):
            more, buckets = _long_context(composer_model, tokenizer, evaluators, options, is_sharded)
        results |= more
    trainer.close()
    if rank() == 0:
        _write(results, options, source, plan, buckets)
    return results


def _set_up(options: EvalConfig) -> tuple[Device, str]:
    """Let all ranks meet; returns the device and the precision."""
    device = detect_device()
    refuse_unsupported(device, imported_torch)
    precision = choose_precision(device)[0] if options.precision == "auto" else options.precision
    if problem := precision_problem(precision, device):
        raise ConfigError(f"precision: {problem}")
    warnings.filterwarnings("ignore", message="|".join(EXPECTED_WARNINGS))
    collect_env.get_cpu_model = cpu_name  # Composer's own sleeps for a second to measure the clock
    refuse_missing_packages(options)
    if world_size() > 1:
        dist.initialize_dist(device.kind, timeout=options.dist_timeout)
    if options.code_paths:
        build.compare_code(options.code_paths, plugins.hashes)
    return device, precision


def _open(options: EvalConfig) -> ModelSource:
    try:
        return open_model(options.model, base=options.base, verify=options.verify)
    except AnotherModelError as error:
        raise AnotherModelError(
            f"{error} Evaluate others with lm-evaluation-harness: "
            f"lm_eval --model hf --model_args pretrained={options.model} --tasks ..."
        ) from error


def _long_context(
    model: ComposerMPT, tokenizer: Any, evaluators: list[Any], options: EvalConfig, is_sharded: bool
) -> tuple[Results, dict[str, Any]]:
    from mptfoundry.evals.long_context import evaluate_long_context

    datasets = {each.label: each.dataloader.dataloader.dataset for each in evaluators}
    return evaluate_long_context(
        model.model.eval(),
        tokenizer,
        datasets,
        options,
        batch_size=_batch_size(options),
        is_sharded=is_sharded,
    )


def results_table(results: Results) -> str:
    """Format the results as tables, one row per label and one table per set of metrics."""
    tables: dict[tuple[str, ...], Results] = {}
    for label, metrics in results.items():
        tables.setdefault(tuple(metrics), {})[label] = metrics
    width = max(len("label"), *(len(label) for label in results))
    blocks = []
    for names, rows in tables.items():
        lines = ["  ".join([f"{'label':{width}}", *names])]
        for label, metrics in rows.items():
            cells = (f"{_short(metrics[name]):>{len(name)}}" for name in names)
            lines.append("  ".join([f"{label:{width}}", *cells]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.4f}"


def logged_scores(scores: Results) -> dict[str, float]:
    """The scores of tasks by the names that llm-foundry gives them in loggers."""
    return {
        f"{'icl/metrics' if label == 'eval_gauntlet' else 'metrics'}/{label}/{name}": value
        for label, metrics in scores.items()
        for name, value in metrics.items()
    }


def _losses(trainer: Trainer) -> Results:
    trainer.eval()
    return {
        label: {name: float(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
    }


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
    own = _own_metrics(options, source)
    if not is_sharded:
        return build.compose(network_of(source, dtype=torch.float32, **chosen), tokenizer, own=own)
    network = outline_of(source, **chosen)
    model = build.compose(network, tokenizer, own=own)
    model.start_from(StartingWeights(source, network, seed=options.seed))
    if device.kind == "cpu":
        start_on_the_cpu(network)
    return model


def _own_metrics(options: EvalConfig, source: ModelSource) -> dict[str, Any]:
    """The metrics of the user's own that the command names, or the model's run if its code ran."""
    named = options.eval_metrics
    if not named and options.code_paths and source.run_folder is not None:
        named = read_run(source.run_folder).get("eval_metrics") or {}
    if not named:
        return {}
    if isinstance(source.config, HeadConfig):
        raise ConfigError("eval_metrics: are only for language models, not for classifiers. Remove them.")
    return build.own_metrics({name: kwargs for name, kwargs in named.items() if name in plugins.metrics})


def _loaders(options: EvalConfig, source: ModelSource) -> dict[str, LoaderConfig]:
    """Return the loaders that the command names, or those of the run that the model came from."""
    if options.eval_loaders:
        return options.eval_loaders
    if source.run_folder is not None:
        # Evaluation uses no loggers, and their settings may refer to environment variables missing here.
        config = load_saved_config(source.run_folder / "config.yaml", ["loggers=null"])
        if config.eval_loaders:
            return config.eval_loaders
    raise ConfigError(
        f"eval_loader: is not given, and {options.model} belongs to no run that has one. "
        "Say what to evaluate on: eval_loader.name=text eval_loader.dataset.local=SHARDS "
        "eval_loader.dataset.split=val."
    )


def _evaluators(options: EvalConfig, source: ModelSource, tokenizer: Any, device: Device) -> list[Evaluator]:
    loaders = _loaders(options, source)
    context = LoaderContext(
        model=source.config,
        tokenizer=tokenizer,
        max_seq_len=options.sample_length_for(source.config.max_seq_len),
        device_batch_size=_batch_size(options),
        seed=options.seed,
        num_workers=0,
        is_training=False,
        where="eval_loader",
        allow_code=options.allow_code,
    )
    workers = {label: _workers(loader, device) for label, loader in loaders.items()}
    return build_evaluators(loaders, context, workers)


def _batch_size(options: EvalConfig) -> int:
    wanted = options.device_eval_batch_size
    return EVAL_BATCH_SIZE if wanted == "auto" else wanted


def _workers(loader: LoaderConfig, device: Device) -> int:
    return choose_workers(device)[0] if loader.num_workers == "auto" else loader.num_workers


def _results_file(options: EvalConfig, source: ModelSource, plan: TaskPlan | None) -> Path:
    if plan is not None:
        return plan.results
    folder = source.path if source.path.is_dir() else source.path.parent
    return Path(options.out) if options.out else folder / "eval.json"


def _write(
    results: Results, options: EvalConfig, source: ModelSource, plan: TaskPlan | None, buckets: dict[str, Any]
) -> None:
    out = _results_file(options, source, plan)
    # Arguments of loggers may be secrets.
    settings = {**asdict(options), "loggers": list(options.loggers)}
    if options.code_paths:
        settings["code_hashes"] = {path: plugins.hashes[path] for path in options.code_paths}
    content: dict[str, Any] = {"model": str(source.path), "results": results, "options": settings}
    if plan is not None:
        content["settings"] = plan.settings
    with whole_or_absent(out, overwrite=True) as path:
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
    if plan is not None:
        say(f"results: {out}")
    if buckets:
        from mptfoundry.evals.positions import draw_positions

        picture, trained = out.with_suffix(".positions.png"), source.config.max_seq_len
        draw_positions(buckets, trained, options.length_for(trained), picture)
        say(f"picture: {picture}")
