"""Build objects from config and plan: one function per section, with plain tables of names.

The classes and functions of the user's own code are in the tables of plugins.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler, DecoupledAdamW
from composer.utils.parallelism import FSDP2Config

from mptfoundry import plugins
from mptfoundry.architecture.hub import locate
from mptfoundry.architecture.of_run import differing, leaves
from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.checkpoints.adapters import fingerprint
from mptfoundry.checkpoints.reading import open_model
from mptfoundry.checkpoints.source import ModelSource, expected_shapes, with_rows
from mptfoundry.checkpoints.starting import StartingWeights
from mptfoundry.config.engine import signatures
from mptfoundry.config.model import ModelConfig
from mptfoundry.config.optim import OwnOptimizerConfig, OwnScheduleConfig, choice_of
from mptfoundry.config.parallel import FSDPConfig, recomputed_parts
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import EvalConfig, Sampling
from mptfoundry.errors import ConfigError
from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.heads import ComposerHead
from mptfoundry.models.lora import add_adapters
from mptfoundry.models.quantized import quantize_blocks
from mptfoundry.models.sharding import HybridConfig, start_on_the_cpu
from mptfoundry.mpt.head_config import HeadConfig, trunk_of
from mptfoundry.mpt.heads import make_network
from mptfoundry.mpt.network import MPT
from mptfoundry.optim import schedules
from mptfoundry.optim.clipping import GradientClipping
from mptfoundry.optim.groups import parameter_groups
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.optim.schedules import BatchSize, Schedule
from mptfoundry.plan.bf16_choice import has_bf16_gradients
from mptfoundry.plan.fsdp import Sharding
from mptfoundry.plan.plan import COMPUTE_DTYPE, Plan
from mptfoundry.ranks import rank, ranks_that_differ
from mptfoundry.run.report import read_trackers
from mptfoundry.run.start import Start
from mptfoundry.tokenizer import count_ids, load_tokenizer, token_byte_lengths, vocabulary_problem

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "decoupled_lionw": DecoupledLionW,
    "decoupled_adamw": DecoupledAdamW,
}
# Keys of the section that are not options of an optimizer's class as they are.
DECIDED = ("fused", "bf16_weights", "momentum_dtype")
# Optimizers with a step in one pass; their modules are imported only where they are used.
FUSED_OPTIMIZERS = {"decoupled_lionw": "lion_fused", "decoupled_adamw": "adamw_fused"}
SCHEDULERS: dict[str, Callable[..., Schedule]] = {
    "constant_with_warmup": schedules.constant_with_warmup,
    "cosine_with_warmup": schedules.cosine_with_warmup,
    "linear_decay_with_warmup": schedules.linear_decay_with_warmup,
    "inv_sqrt_with_warmup": schedules.inv_sqrt_with_warmup,
    "warmup_stable_decay": schedules.warmup_stable_decay,
}
# `module:Class`, so that a callback is imported only if a config names it.
CALLBACKS: dict[str, str | type] = {**signatures.CALLBACKS}
# The loggers of a run, with an id that all its starts share.
TRACKERS = {
    "wandb": "mptfoundry.callbacks.trackers:WandBRun",
    "mlflow": "mptfoundry.callbacks.trackers:MLFlowRun",
    "cometml": "mptfoundry.callbacks.trackers:CometRun",
}
LOGGERS: dict[str, str | type] = {**signatures.LOGGERS}
ALGORITHMS: dict[str, str | type] = {"gradient_clipping": GradientClipping}


def compare_code(paths: Sequence[str], hashes: Mapping[str, str]) -> None:
    """Compare the files of `code_paths` of all ranks, with a collective; `hashes` are of those that ran.

    Raises:
        ConfigError: A file did not run, or a rank ran other files than rank 0.
    """
    for path in paths:
        if path not in hashes:
            why = (
                "did not run; load the config with allow_code=true" if Path(path).is_file() else "is missing"
            )
            raise ConfigError(f"code_paths: {path} {why}. Name a Python file.")
    if others := ranks_that_differ(dict(hashes)):
        raise ConfigError(
            f"code_paths: the files of rank {others[0]} are not those of rank 0 (their sha256 differ). Copy "
            "the same files to all machines."
        )


def build_tokenizer(config: TrainConfig) -> Any:
    """The run's tokenizer; ConfigError if the model's vocabulary is too small for it."""
    tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.kwargs, max_seq_len=config.max_seq_len)
    if problem := vocabulary_problem(count_ids(tokenizer), config.model.vocab_size):
        raise ConfigError(f"{config.model.vocabulary_key}: {problem}")
    return tokenizer


def open_pretrained(model: ModelConfig) -> ModelSource:
    """The model that `pretrained_model_name_or_path` names; its weights are read later.

    Raises:
        CheckpointError: It is missing or damaged.
        ConfigError: It does not match the config.
    """
    assert model.pretrained_model_name_or_path is not None
    source = open_model(locate(model.pretrained_model_name_or_path, model.revision))
    _check_trunk(source, model, model.pretrained_model_name_or_path)
    return with_rows(source, model.vocab_size)


def open_base(config: TrainConfig, checkpoint: Path) -> ModelSource | None:
    """The model of a checkpoint that is the base of adapters, or lacks the head to train.

    Otherwise this is None, and Composer loads the checkpoint as it is.

    Raises:
        CheckpointError: It is missing or damaged.
        ConfigError: It does not match the config, or `load_weights_only` is not set although the head is new.
    """
    head = config.model if isinstance(config.model, HeadConfig) else None
    if head is None and config.model.peft_config is None:
        return None
    source = open_model(checkpoint)
    if head is None:
        _check_trunk(source, config.model, str(checkpoint))
        return source
    if any(name.startswith(f"{head.head}.") for name in source.weights.outlines):
        return None
    if not config.load_weights_only:
        raise ConfigError(
            f"load_path: {checkpoint} lacks {head.head}, the head of {config.model.name}. Its weights alone "
            "can be taken: set load_weights_only: true."
        )
    _check_trunk(source, config.model, str(checkpoint))
    return source


def _check_trunk(source: ModelSource, model: ModelConfig, name: str) -> None:
    changes = leaves(model.config_overrides)
    for path, expected, value in differing(trunk_of(source.config), model.network().to_dict(), changes):
        # A checkpoint from load_path has no config_overrides, so its dropout may differ from the config's.
        if model.pretrained_model_name_or_path is not None or not path[-1].endswith("pdrop"):
            raise ConfigError(f"model.{'.'.join(path)}: {value} is not what {name} says, {expected}.")


def build_model(
    config: TrainConfig, plan: Plan, tokenizer: Any, source: ModelSource | None = None
) -> ComposerMPT:
    """The network as Composer trains and evaluates it; with FSDP and `meta`, not yet in memory.

    Weights are drawn, or read from `source` tensor by tensor; each rank handles only its own part.
    """
    # With `mixed`, Composer broadcasts the weights of global rank 0.
    on_meta = plan.init_device == "meta" or (plan.init_device == "mixed" and rank() != 0)
    device, is_empty = "meta" if on_meta else "cpu", source is not None
    network: Any = make_network(config.model.network(), device=device, seed=config.seed, empty=is_empty)
    network.fuses_loss = plan.loss_fn == "fused_crossentropy"
    if config.fsdp_config is not None and config.fsdp_config.saves_activations:
        _save_activations(network, config.model, config.fsdp_config)
    if config.compile_config is not None:
        _compile(network, config, plan)
    weights = None if source is None else _starting_weights(source, network, config.seed)
    if weights is not None and not on_meta:
        weights.fill(network)
    if config.model.bits or config.model.float8_recipe:
        _narrow(network, config.model, getattr(torch, COMPUTE_DTYPE[plan.precision]))
    if source is not None and config.model.peft_config is not None:
        _adapt(network, config.model.peft_config, source, config.seed)
    if on_meta and not torch.cuda.is_available():
        start_on_the_cpu(network)
    extra_flops = plan.trainable.extra_flops_per_token
    own = own_metrics(config.eval_metrics) if config.eval_metrics else None
    model = compose(network, tokenizer, seed=config.seed, extra_flops_per_token=extra_flops, own=own)
    if weights is not None:
        model.start_from(weights)
    return model


def _save_activations(network: Any, model: ModelConfig, fsdp: FSDPConfig) -> None:
    """Recompute activations in backward, or keep them on the host, in the parts that the config names."""
    parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
    recompute, offload = fsdp.activation_checkpointing, fsdp.activation_cpu_offload
    checkpoint_activations(network, parts, recompute=recompute, offload=offload)


def _compile(network: Any, config: TrainConfig, plan: Plan) -> None:
    from mptfoundry.models.compiling import compile_blocks

    assert config.compile_config is not None
    given = asdict(config.compile_config)
    options = {key: value for key, value in given.items() if value not in (None, {})}
    if config.compile_config.fullgraph is None:
        options["fullgraph"] = plan.attn_impl in ("triton", "flash")
    compile_blocks(network, **options)


def _narrow(network: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Store the blocks' matrices in fewer bits, or compute with them in float8."""
    if model.bits:
        quantize_blocks(network, model.bits, dtype)
    if model.float8_recipe:
        from mptfoundry.models.float8 import use_float8

        use_float8(network, model.float8_recipe)


def _adapt(network: Any, lora: LoRAConfig, base: ModelSource, seed: int) -> None:
    options, targets = asdict(lora), lora.targets(network.config)
    add_adapters(network, options, targets=targets, fingerprint=fingerprint(base), seed=seed)


def _starting_weights(source: ModelSource, network: Any, seed: int) -> StartingWeights:
    """The weights of `source`; those of a head that it lacks are drawn."""
    is_first, head = rank() == 0, getattr(network.config, "head", None)
    new, unused = ((f"{head}.",), ("lm_head.",)) if head else ((), ())
    weights = StartingWeights(source, network, seed=seed, new=new, unused=unused, progress=is_first)
    if weights.drawn and is_first:
        print(f"weights: drawn are {', '.join(weights.drawn)}", flush=True)
    return weights


def own_metrics(named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of the user's own that a config names, in their interface for Composer."""
    from mptfoundry.models.own_metrics import make_metric

    return {name: make_metric(name, plugins.metrics[name], kwargs) for name, kwargs in named.items()}


def compose(
    network: Any, tokenizer: Any, *, seed: int = 0, extra_flops_per_token: int = 0, own: Any = None
) -> ComposerMPT:
    """Wrap a network for Composer, with the metrics for its task, and those of the user's own."""
    if isinstance(network.config, HeadConfig):
        return ComposerHead(network, tokenizer=tokenizer, seed=seed)
    metrics = token_loss_metrics(token_byte_lengths(tokenizer, network.config.vocab_size))
    kind = ComposerMPT
    if own:
        from mptfoundry.models.own_metrics import MeasuredMPT

        kind = MeasuredMPT
    return kind(
        network,
        eval_metrics={**metrics, **(own or {})},
        tokenizer=tokenizer,
        seed=seed,
        extra_flops_per_token=extra_flops_per_token,
    )


def build_optimizer(config: TrainConfig, model: ComposerMPT, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer over the network's parameter groups, without frozen parameters."""
    options = {key: value for key, value in asdict(config.optimizer).items() if key not in DECIDED}
    name, groups, frozen = (options.pop(key) for key in ("name", "param_groups", "disable_grad"))
    groups = [{key: value for key, value in group.items() if value is not None} for group in groups]
    parameters = parameter_groups(model.model.named_parameters(), param_groups=groups, disable_grad=frozen)
    if isinstance(config.optimizer, OwnOptimizerConfig):
        options = signatures.own_arguments(config.optimizer, OwnOptimizerConfig)
        return plugins.call("optimizer", plugins.optimizers[name], parameters, **options)
    make = OPTIMIZERS[name]
    if fused and make in (DecoupledLionW, DecoupledAdamW):  # not a class of the user's own
        make = getattr(importlib.import_module(f"mptfoundry.optim.{FUSED_OPTIMIZERS[name]}"), make.__name__)
    if (dtype := choice_of(config.optimizer, "momentum_dtype")) not in (False, "float32"):
        options["momentum_dtype"] = getattr(torch, str(dtype))
    return make(parameters, **options)


def keep_bf16_weights(config: TrainConfig, model: ComposerMPT, optimizer: torch.optim.Optimizer) -> None:
    """Keep the blocks' matrices in bfloat16, too; `optimizer` is the network's."""
    from mptfoundry.optim.bf16_weights import use_bf16_weights

    is_ours_and_fused = hasattr(optimizer, "bf16_copies")
    has_gradients = has_bf16_gradients(config, is_ours_and_fused)
    use_bf16_weights(model.model, optimizer, bf16_gradients=has_gradients)


def build_scheduler(config: TrainConfig) -> ComposerScheduler:
    """The learning rate schedule; its times may have any unit."""
    if isinstance(config.scheduler, OwnScheduleConfig):
        return _own_scheduler(config.scheduler)
    options = asdict(config.scheduler)
    name = options.pop("name")
    options.pop("scale_warmup", None)
    rows = config.global_train_batch_size
    schedule = SCHEDULERS[name](**options, batch=BatchSize(rows, rows * config.max_seq_len))
    return cast(ComposerScheduler, schedule)


def _own_scheduler(section: OwnScheduleConfig) -> ComposerScheduler:
    given = signatures.own_arguments(section, OwnScheduleConfig)
    return cast(ComposerScheduler, plugins.call("scheduler", plugins.schedulers[section.name], **given))


def build_algorithms(config: TrainConfig) -> list[Algorithm]:
    """Composer's algorithms: gradient clipping if configured; the gradient norm is always measured."""
    clipping = config.algorithms.gradient_clipping
    given = {"gradient_clipping": {} if clipping is None else asdict(clipping)}
    for name in [name for name in plugins.algorithms if hasattr(config.algorithms, name)]:
        given |= _own_algorithm(name, getattr(config.algorithms, name))
    return [_make("algorithms", ALGORITHMS, name, kwargs) for name, kwargs in given.items()]


def _own_algorithm(name: str, section: Any) -> dict[str, dict[str, Any]]:
    return {} if section is None else {name: signatures.own_arguments(section)}


def build_callbacks(config: TrainConfig, tokenizer: Any, run_folder: Path) -> list[Callback]:
    """The callbacks that the config names, with the functions that they need to generate text or export.

    Loss spikes are always checked, with defaults if the config does not name the callback.
    """
    given: dict[str, dict[str, Any]] = {"kill_loss_spike": {}}
    given |= {name: dict(kwargs) for name, kwargs in config.callbacks.items()}
    ours = given.keys() - plugins.callbacks.keys()
    if "generate_callback" in ours:
        _add_generation(given["generate_callback"], tokenizer)
    if "hf_checkpointer" in ours:
        _add_export(given["hf_checkpointer"], config, run_folder)
    return [_make("callbacks", CALLBACKS, name, kwargs) for name, kwargs in given.items()]


def _add_generation(kwargs: dict[str, Any], tokenizer: Any) -> None:
    names = {field.name for field in fields(Sampling)}
    sampling = Sampling(**{key: kwargs.pop(key) for key in names & set(kwargs)})
    how = {"max_new_tokens": kwargs.pop("max_new_tokens", 50), "sampling": sampling}
    kwargs["generate"] = partial(_generate_text, tokenizer=tokenizer, how=how)


def _add_export(kwargs: dict[str, Any], config: TrainConfig, run_folder: Path) -> None:
    from mptfoundry.export.folder import export_weights

    network = config.model.network()
    kwargs |= {"run_folder": run_folder, "names": frozenset(expected_shapes(network))}
    overwrite = kwargs.get("overwrite", True)
    kwargs["write"] = partial(export_weights, config=network, run_folder=run_folder, overwrite=overwrite)


def build_loggers(
    config: TrainConfig | EvalConfig, run_folder: Path, start: Start | None = None
) -> list[LoggerDestination]:
    """The loggers that the config names; with the `start` of a run, trackers continue what it began."""
    given = {name: dict(kwargs) for name, kwargs in config.loggers.items()}
    if "tensorboard" in given and "tensorboard" not in plugins.loggers:
        given["tensorboard"] |= {"run_folder": run_folder}
    is_tracked = isinstance(config, TrainConfig) and start is not None and TRACKERS.keys() & given.keys()
    known = _trackers(config, run_folder, start, given) if is_tracked else LOGGERS
    return [_make("loggers", known, name, kwargs) for name, kwargs in given.items()]


def _trackers(
    config: Any, run_folder: Path, start: Any, given: dict[str, dict[str, Any]]
) -> dict[str, str | type]:
    """The known loggers, with those that share an id among a run's starts; `given` gets what they need.

    A tracker that the user's own code replaced stays as it is.
    """
    own = {name: TRACKERS[name] for name in TRACKERS if name not in plugins.loggers}
    for name in own.keys() & given.keys():
        given[name] |= {"run_folder": run_folder, "kept": _kept_of(name, config, run_folder, start)}
    return {**LOGGERS, **own}


def _kept_of(tracker: str, config: TrainConfig, run_folder: Path, start: Start) -> dict[str, Any]:
    """What earlier starts of the run kept of a tracker."""
    found = start.checkpoint.parent if start.is_fetched and start.checkpoint else run_folder
    return read_trackers(found).get(tracker, {}) if config.resumes else {}


def build_parallelism(config: TrainConfig, plan: Plan) -> dict[str, Any] | None:
    """Composer's FSDP2 configuration, or None if every device holds all weights (DDP)."""
    if plan.sharding is None or config.fsdp_config is None:
        return None
    return _sharding(plan.sharding, config.fsdp_config)


def _sharding(sharding: Sharding, fsdp: FSDPConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "reshard_after_forward": sharding.reshard_after_forward,
        "state_dict_type": fsdp.state_dict_type,
        "load_monolith_rank0_only": fsdp.load_monolith_rank0_only,
        "mixed_precision": fsdp.mixed_precision,
        "verbose": fsdp.verbose,
    }
    if sharding.replicas == 1:
        return {"fsdp": FSDP2Config(**options)}
    return {"fsdp": HybridConfig(replicas=sharding.replicas, shards=sharding.shards, **options)}


def _generate_text(
    network: torch.nn.Module, prompts: Sequence[str], *, tokenizer: Any, how: Mapping[str, Any]
) -> list[str]:
    from mptfoundry.generation import generate_text

    return generate_text(cast(MPT, network), tokenizer, prompts, **how)


def _make(section: str, table: Mapping[str, str | type], name: str, kwargs: Mapping[str, Any]) -> Any:
    """An instance of the user's class of this name, or of that in `table`; imports its module if needed."""
    if (own := plugins.TABLES[section].get(name)) is not None:
        return plugins.call(f"{section}.{name}", own, **kwargs)
    entry = table[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(importlib.import_module(module), attribute)
    return entry(**kwargs)
