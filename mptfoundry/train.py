"""A training run: `train(config)` builds what the config describes, and Composer's Trainer runs it.

A run has one local folder: the resolved config, the tokenizer, `metrics.jsonl`, the report and, where they
are saved, the checkpoints. Started again with the same command, it continues from its newest checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Callback
from torch.distributed.fsdp import FSDPModule

from mptfoundry import build, loaders
from mptfoundry.callbacks.console import ConsoleLine
from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.checkpoints.adapters import FINGERPRINT, check_base
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.config.optim import choice_of
from mptfoundry.config.parallel import FSDPConfig
from mptfoundry.config.run import TrainConfig
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.gloo_average import average_gradients
from mptfoundry.models.sharding import prefetch
from mptfoundry.plan.bf16_choice import choose_bf16_weights
from mptfoundry.plan.devices import detect_device
from mptfoundry.plan.gpu_support import imported_torch, refuse_unsupported
from mptfoundry.plan.plan import Choice, Plan, make_plan, refuse_missing, why_not_fused
from mptfoundry.plan.table import describe_plan
from mptfoundry.ranks import say
from mptfoundry.run.lifecycle import Run, guarded
from mptfoundry.run.start import Start
from mptfoundry.tokenizer import fingerprint, own_borders, spelled

# Keys of the config that are arguments of Composer's Trainer under the same name.
SAME_NAMES = (
    "run_name",
    "seed",
    "max_duration",
    "train_subset_num_batches",
    "spin_dataloaders",
    "eval_subset_num_batches",
    "progress_bar",
    "accumulate_train_batch_on_tokens",
    "dist_timeout",
    "python_log_level",
)


def train(config: TrainConfig, plan: Plan | None = None) -> Trainer:
    """Trains the model of `config` to its `max_duration`, from its newest checkpoint if there is one.

    `plan` is made here unless it is already checked. The `state` of the returned trainer holds the model and
    the last metrics.

    Raises:
        ConfigError, DataError, CheckpointError: Something that the config names is missing or doesn't fit.
        TrainingError: The numbers are not finite, or a rank is silent.
        RunStopped: SIGTERM or SIGINT came; what was trained is saved.
    """
    if plan is None:
        plan = make_plan(config, detect_device())
        refuse_missing(plan)
    if plan.device.gpus:
        refuse_unsupported(plan.device, imported_torch)
    with guarded(config, plan.device) as run:
        trainer = build_trainer(config, plan, run)
        run.fit(trainer)
        run.report(trainer)
    return trainer


def build_trainer(config: TrainConfig, plan: Plan, run: Run) -> Trainer:
    """Composer's Trainer with everything that the config describes, at the point where the run starts."""
    if run.start.is_own:
        say(f"resuming from {run.start.checkpoint}")
        plan = keep_fused(config, plan, run.start)
    takes_weights = config.model.takes_weights or run.start.checkpoint is not None
    source = starting_model(config, run.start) if takes_weights else None
    if config.code_paths:
        build.compare_code(config.code_paths, config.code_hashes)
    tokenizer = build.build_tokenizer(config)
    say(describe_plan(config, plan, spelled(own_borders(tokenizer), tokenizer)))
    run.compare_inputs({"tokenizer": fingerprint(tokenizer, with_special_tokens=True)})
    train_loader, evaluators = loaders.build_loaders(config, plan, tokenizer)
    run.compare_inputs(loaders.fingerprints_of(train_loader, evaluators))
    model = build.build_model(config, plan, tokenizer, source)
    throughput = Throughput(
        config.model.network(),
        peak_flops=plan.device.peak_flops,
        extra_flops_per_token=plan.trainable.extra_flops_per_token,
    )
    named = build.build_loggers(config, run.folder, run.start) if config.loggers else []
    console = [ConsoleLine(config.console_log_interval)] if config.log_to_console else []
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        optimizers=build.build_optimizer(config, model, fused=plan.fused),
        schedulers=build.build_scheduler(config),
        algorithms=build.build_algorithms(config),
        callbacks=[
            run.guard,
            throughput,
            *([in_context_tasks(config, plan, tokenizer)] if config.icl_tasks is not None else []),
            *build.build_callbacks(config, tokenizer, run.folder),
            *run.checkpointing(tokenizer, has_weights=source is not None, fused=plan.fused),
            *(foretold(config, plan) if plan.device.kind == "gpu" else ()),
        ],
        loggers=[*named, *run.loggers, *console],
        parallelism_config=build.build_parallelism(config, plan),
        **trainer_arguments(config, plan),
    )
    if source is not None and config.model.peft_config is not None:
        buffers = trainer.state.model.named_buffers()
        check_base(source, next(value for name, value in buffers if name.endswith(FINGERPRINT)))
    if config.fsdp_config is not None and isinstance(model.model, FSDPModule):
        set_up_sharding(config.fsdp_config, model, plan)
    if plan.bf16_weights:
        build.keep_bf16_weights(config, model, trainer.state.optimizers[0])
    if config.log_config:
        trainer.logger.log_hyperparameters({"config": run.yaml})
    return trainer


def keep_fused(config: TrainConfig, plan: Plan, start: Start) -> Plan:
    """With `optimizer.fused: auto`, a run keeps the step that it began with, if this machine has it."""
    before = start.notes is not None and start.notes.fused
    if choice_of(config.optimizer, "fused") != "auto" or before == plan.fused:
        return plan
    missing = why_not_fused(config, plan.device) if before else None
    reason = f"not fused as this run's earlier steps: {missing}" if missing else "as this run's earlier steps"
    choice = Choice(before and missing is None, reason)
    plan = replace(plan, fused=choice.value, choices=plan.choices | {"optimizer.fused": choice})
    if "optimizer.bf16_weights" not in plan.choices:
        return plan
    decided = plan.device, plan.sharding, plan.fused
    copies = Choice(*choose_bf16_weights(config, *decided, fits=lambda other: True))
    choices = plan.choices | {"optimizer.bf16_weights": copies}
    return replace(plan, bf16_weights=copies.value, choices=choices)


def foretold(config: TrainConfig, plan: Plan) -> list[Callback]:
    """The callback that compares the run's speed with the plan's, where the plan knows the GPU."""
    from mptfoundry.callbacks.foretold import foretold_callbacks

    return foretold_callbacks(config, plan)


def in_context_tasks(config: TrainConfig, plan: Plan, tokenizer: Any) -> Callback:
    """The callback that evaluates the config's tasks; imported only for runs that have some."""
    from mptfoundry.tasks.training import InContextTasks

    return InContextTasks(config, plan, tokenizer)


def set_up_sharding(fsdp: FSDPConfig, model: ComposerMPT, plan: Plan) -> None:
    """Tell FSDP what Composer leaves out, once it has sharded the model."""
    forward, backward = fsdp.prefetched_blocks
    prefetch(model.model, forward=forward, backward=backward)
    if plan.device.kind == "cpu":
        average_gradients(model)


def starting_model(config: TrainConfig, start: Start) -> ModelSource | None:
    """The model whose weights the run takes; None where they are new, or come with a checkpoint."""
    has_adapters = config.model.peft_config is not None
    if start.is_own and not has_adapters:
        return None
    if config.model.takes_weights:
        source: ModelSource | None = build.open_pretrained(config.model)
    elif start.is_own and config.load_path:
        source = build.open_base(config, Path(config.load_path.format(rank=0, run_name=config.run_name)))
    else:
        source = build.open_base(config, start.checkpoint) if start.checkpoint else None
    if source is not None:
        rest = ", next to the adapters" if has_adapters else "; the optimizer starts new"
        say(f"weights: from {source.path}{rest}")
    return source


def trainer_arguments(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The Trainer's arguments that stand in the config or the plan."""
    return {
        **{name: getattr(config, name) for name in SAME_NAMES},
        "device": plan.device.kind,
        # Composer warns of any other one without loaders, and so does `check` in words of its own.
        "eval_interval": config.eval_interval if config.eval_loaders else 1,
        "log_to_console": False,
        "precision": plan.precision,
        "device_train_microbatch_size": plan.device_train_microbatch_size,
    }
