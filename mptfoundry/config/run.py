"""TrainConfig: the whole shape of a training run.

Everything that a YAML file for `mptfoundry train` can say, with types. Rules within a section are in that
section's class; rules between sections are here. What sections share with the run (`max_seq_len`, `seed`) is
set only here.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from mptfoundry import plugins
from mptfoundry.config.data import LoaderConfig, loaders_by_label
from mptfoundry.config.engine.durations import Duration, parse_duration
from mptfoundry.config.engine.forms import parse_count
from mptfoundry.config.engine.section_rules import Limits, Rules, Section, not_empty
from mptfoundry.config.engine.signatures import (
    CALLBACKS,
    REFUSED_CALLBACKS,
    Catalogue,
)
from mptfoundry.config.evaluating import Loggers, Metrics
from mptfoundry.config.model import AnyModelConfig, TokenizerConfig
from mptfoundry.config.optim import AlgorithmsConfig, OptimizerConfig, SchedulerConfig
from mptfoundry.config.parallel import CompileConfig, FSDPConfig
from mptfoundry.config.rules import between_sections, tokens_of
from mptfoundry.config.tasks import GauntletConfig, TaskConfig

Callbacks = Annotated[
    dict[str, Any],
    Catalogue("a section of callbacks by name", ChainMap(plugins.callbacks, CALLBACKS), REFUSED_CALLBACKS),
]


@dataclass(frozen=True, kw_only=True)
class KeepBestConfig(Section):
    """Which checkpoint is the best one.

    Attributes:
        metric: A metric of an evaluation by its name in loggers, such as
            `metrics/eval/LanguageCrossEntropy`, `metrics/copa/3-shot/InContextLearningMultipleChoiceAccuracy`
            or `icl/metrics/eval_gauntlet/default_average`.
        mode: Whether the largest value or the smallest one is the best.
    """

    metric: str
    mode: Literal["max", "min"]

    def rules(self) -> Rules:
        yield not_empty(self, "metric")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """A training run.

    Attributes:
        run_name: Name of the run's folder; keep it to resume. Default: `$RUN_NAME`, then the config's file
            name.
        seed: Seed of the weights, of dropout and of the order of the data.
        max_seq_len: Tokens in a sequence, for model, data and tokenizer alike.
        model: The network.
        tokenizer: The tokenizer.
        train_loader: The training data.
        eval_loader: The held-out data: none, one loader, or a list of loaders, each with a `label`.
        optimizer: How gradients change the weights.
        scheduler: How the learning rate changes over the run.
        algorithms: What changes the gradients before the optimizer uses them.
        max_duration: Length of the run.
        global_train_batch_size: Sequences in one step, over all devices.
        device_train_microbatch_size: Sequences a device computes at once; affects memory, not results.
        device_eval_batch_size: Sequences a device evaluates at once. `auto`: the training microbatch.
        accumulate_train_batch_on_tokens: Weight microbatches by their trained tokens, not their sequences.
        train_subset_num_batches: Batches in an epoch; -1: all.
        spin_dataloaders: If a loader can't resume by itself, read data up to the resumed batch.
        eval_interval: How often to evaluate, also the tasks of `icl_tasks`.
        eval_first: Evaluate before the first step.
        eval_subset_num_batches: Batches in an evaluation; -1: all.
        eval_metrics: Metrics of your own, from code in `code_paths`, that each evaluation also measures.
        icl_tasks: In-context tasks that the model answers at each evaluation, or a YAML file of them.
        eval_gauntlet: How the tasks' scores are averaged, or a YAML file that says it.
        icl_seq_len: The most tokens of a question with its examples. Default: `max_seq_len`.
        icl_subset_num_batches: Evaluate only the first documents of each task, as many as this number of
            batches of `device_eval_batch_size` holds; -1: all.
        precision: Number format of the computation. `auto`: bfloat16 on GPUs that support it, else float32.
        fsdp_config: Shard the model over devices. Default: every device holds a whole copy.
        compile_config: Compile the model's blocks. Default: they are not compiled.
        max_split_size_mb: Largest block of GPU memory that the allocator may split, in MiB.
        expandable_segments: Let the allocator's GPU segments grow, which reduces fragmentation.
        cuda_load_lazy: Load each GPU kernel when it is first used; `false` loads them all at the start, which
            takes seconds and about a GiB.
        dist_timeout: Seconds that a rank waits for the others.
        save_folder: Folder or URL for checkpoints; `{run_name}` is filled in. Default: none are saved.
        save_interval: How often to save a checkpoint.
        save_num_checkpoints_to_keep: How many checkpoints to keep on the local disk; -1: all.
        keep_best: Also keep the checkpoint with the best value of a metric. Default: only the newest ones.
        save_overwrite: Let checkpoints replace older ones of the same name.
        save_weights_only: Save no optimizer state; such a checkpoint can't resume a run.
        save_filename: Name of a checkpoint.
        save_latest_filename: Name of the link to the newest checkpoint. Default: `latest-rank{rank}.pt`, or
            `latest-sharded-rank{rank}` for sharded checkpoints.
        save_ignore_keys: Parts of the state to leave out of checkpoints; wildcards are allowed.
        save_async: Write checkpoints in the background, from a copy in the host's memory.
        autoresume: Resume from the newest checkpoint in `save_folder`. Default: true if `save_folder` is
            given, unless `save_overwrite` or `save_weights_only` is true.
        resume_past_damage: If the newest checkpoint fails its checksums, resume from the one before it;
            otherwise that is an error.
        allow_changes: Keys or sections that may differ from the resumed run's although they make it a
            different run, such as `global_train_batch_size`.
        load_path: Checkpoint to start from: a file, a folder of shards, a run's folder (its newest complete
            checkpoint), or a URL of one of these.
        load_weights_only: Take only the weights from that checkpoint.
        load_strict_model_weights: Fail if the names of its weights don't match the model's.
        load_ignore_keys: Parts of that checkpoint to ignore; wildcards are allowed.
        callbacks: Callbacks by name, with their arguments.
        loggers: Loggers by name, with their arguments.
        progress_bar: Show a progress bar.
        log_to_console: Print a line of metrics every `console_log_interval`.
        console_log_interval: How often to print that line.
        log_config: Send the resolved config to the loggers.
        python_log_level: Least severe messages of the libraries that are printed.
        metadata: Anything about the run, kept with its config.
        code_paths: Python files with classes and functions of your own, by the names that they have in
            `mptfoundry.plugins`; they run before the check, and only with `allow_code=true`.
        code_hashes: The sha256 of each of these files. Filled in when they run, to tell whether one changed.
        allow_code: Run the files in `code_paths` and every `preprocessing_fn`. On the command line only.
        variables: Values that other keys refer to as `${variables.x}`.
    """

    run_name: str = "run"
    seed: int = 17
    max_seq_len: int
    model: AnyModelConfig
    tokenizer: TokenizerConfig
    train_loader: LoaderConfig
    eval_loader: LoaderConfig | tuple[LoaderConfig, ...] | None = None
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    max_duration: Duration
    global_train_batch_size: int
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    device_eval_batch_size: int | Literal["auto"] = "auto"
    accumulate_train_batch_on_tokens: bool = True
    train_subset_num_batches: int = -1
    spin_dataloaders: bool = True
    eval_interval: Duration = 1
    eval_first: bool = False
    eval_subset_num_batches: int = -1
    eval_metrics: Metrics = field(default_factory=dict)
    icl_tasks: tuple[TaskConfig, ...] | str | None = None
    eval_gauntlet: GauntletConfig | str | None = None
    icl_seq_len: int | None = None
    icl_subset_num_batches: int = -1
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = "auto"
    fsdp_config: FSDPConfig | None = None
    compile_config: CompileConfig | None = None
    max_split_size_mb: int | None = None
    expandable_segments: bool = True
    cuda_load_lazy: bool = True
    dist_timeout: float = 600.0
    save_folder: str | None = None
    save_interval: Duration = "1000ba"
    save_num_checkpoints_to_keep: int = -1
    keep_best: KeepBestConfig | None = None
    save_overwrite: bool = False
    save_weights_only: bool = False
    save_filename: str = "ep{epoch}-ba{batch}-rank{rank}.pt"
    save_latest_filename: str | None = None
    save_ignore_keys: tuple[str, ...] | None = None
    save_async: bool = True
    autoresume: bool | None = None
    resume_past_damage: bool = False
    allow_changes: tuple[str, ...] = ()
    load_path: str | None = None
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_ignore_keys: tuple[str, ...] | None = None
    callbacks: Callbacks = field(default_factory=dict)
    loggers: Loggers = field(default_factory=dict)
    progress_bar: bool = False
    log_to_console: bool = True
    console_log_interval: Duration = "1ba"
    log_config: bool = True
    python_log_level: Literal["debug", "info", "warning", "error", "critical"] = "warning"
    metadata: dict[str, Any] = field(default_factory=dict)
    code_paths: tuple[str, ...] = ()
    code_hashes: dict[str, str] = field(default_factory=dict)
    allow_code: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    limits: ClassVar = {
        "seed": Limits(0, 2**32 - 1),
        "max_seq_len": Limits(1, 10**9),
        "global_train_batch_size": Limits(1, 10**9),
        "device_train_microbatch_size": Limits(1, 10**9),
        "device_eval_batch_size": Limits(1, 10**9),
        "train_subset_num_batches": Limits(-1, 10**15),
        "eval_subset_num_batches": Limits(-1, 10**15),
        "max_split_size_mb": Limits(1, 10**9),
        "dist_timeout": Limits(1, 10**8),
        "save_num_checkpoints_to_keep": Limits(-1, 10**9),
    }

    def rules(self) -> Rules:
        """What has to hold, also between sections."""
        return between_sections(self)

    @property
    def eval_loaders(self) -> dict[str, LoaderConfig]:
        """The evaluation loaders by label; a single one without a label is `eval`."""
        return loaders_by_label(self.eval_loader)

    @property
    def resumes(self) -> bool:
        """Whether a start continues from the newest checkpoint in the save folder."""
        if self.autoresume is not None:
            return self.autoresume
        return self.save_folder is not None and not self.save_overwrite and not self.save_weights_only

    @property
    def latest_filename(self) -> str:
        """Name of the link to the newest checkpoint, which depends on how checkpoints are sharded."""
        if self.save_latest_filename is not None:
            return self.save_latest_filename
        is_sharded = self.fsdp_config is not None and self.fsdp_config.state_dict_type == "sharded"
        return "latest-sharded-rank{rank}" if is_sharded else "latest-rank{rank}.pt"

    @property
    def best_filename(self) -> str:
        """Name of the link to the best checkpoint."""
        is_sharded = self.fsdp_config is not None and self.fsdp_config.state_dict_type == "sharded"
        return "best-sharded-rank{rank}" if is_sharded else "best-rank{rank}.pt"

    def batches(self) -> int | None:
        """Steps of the run; None where they depend on the size of the data."""
        tokens = tokens_of(self.max_duration, self)
        if tokens is None:
            return self._batches_of_epochs()
        return -(-int(tokens) // (self.global_train_batch_size * self.max_seq_len))

    def _batches_of_epochs(self) -> int | None:
        number, unit = parse_duration(self.max_duration)
        epoch_size = self.train_loader.dataset.epoch_size
        if unit == "ep" and self.train_subset_num_batches > 0:
            return int(number) * self.train_subset_num_batches
        if unit == "ep" and epoch_size is not None:
            return int(number) * (parse_count(epoch_size) // self.global_train_batch_size)
        return None
