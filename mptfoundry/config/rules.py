"""The rules between the sections of a training run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from string import Formatter
from typing import Any

from mptfoundry import plugins
from mptfoundry.architecture.trainable import pattern_problems
from mptfoundry.config.data import FinetuningDatasetConfig, label_problems, some_batches
from mptfoundry.config.engine.durations import parse_duration
from mptfoundry.config.engine.section_rules import Problem, Rules, broken_rules, where_set
from mptfoundry.config.optim import MOMENTUM_GROUP, OwnScheduleConfig, choice_of
from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.config.streams import code_problem
from mptfoundry.config.tasks import GauntletConfig, missing_benchmarks
from mptfoundry.config.verbs import Sampling
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.places import is_url, why_no_start_finds, why_not_a_path, why_not_a_run_name
from mptfoundry.ranks import world_size

TrainConfig = Any  # config/run.py imports this file

_PACKED = re.compile(r"\.(tar|tgz|tar\.\w+|pt\.(bz2|gz|lz4|lzma|lzo|xz|zst))$")
# The metrics of an evaluation loader of a language model.
TOKEN_METRICS = ("LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy", "tokens", "bits_per_byte")
# What is filled in for `{...}`: in names of checkpoints what Composer knows.
_IN_NAMES = (
    *("run_name", "rank", "local_rank", "world_size", "local_world_size", "node_rank"),
    *("epoch", "batch", "batch_in_epoch", "sample", "sample_in_epoch", "token", "token_in_epoch"),
    *("total_wct", "epoch_wct", "batch_wct"),
)
_FILLED_IN = {
    "save_folder": ("run_name",),
    "load_path": ("run_name", "rank"),
    "save_filename": _IN_NAMES,
    "save_latest_filename": _IN_NAMES,
}


def between_sections(run: TrainConfig) -> Rules:
    """All rules of a run except the limits of its numbers."""
    yield from (some_batches(run, key) for key in ("train_subset_num_batches", "eval_subset_num_batches"))
    yield from (_some_time(run, key) for key in ("max_duration", "save_interval"))
    for key in ("train_loader", "eval_loader"):
        yield _loader_gives_twice(run, key, "max_seq_len", "max_seq_len")
        yield _loader_gives_twice(run, key, "shuffle_seed", "seed")
        for rule in (_documents, _heads, _preprocessing):
            yield rule(run, key)
    for key in _FILLED_IN:
        yield where_set(run, key, partial(_file_name, key=key))
    for rule_of_a_run in (
        *(_batch_splits, _model_length_given_twice, _tokenizer_length_given_twice, label_problems),
        *(_schedule_ends, _decay_fits, _run_name, _names_that_a_start_finds, _link_name),
    ):
        yield rule_of_a_run(run)
    for key, rule_of_an_option in _RULES_OF_OPTIONS:
        yield where_set(run, key, rule_of_an_option)


def _some_time(run: TrainConfig, key: str) -> Iterator[Problem]:
    number, unit = parse_duration(getattr(run, key))
    if number == 0:
        yield key, f"{getattr(run, key)} is not longer than 0. Use more than 0."
    if key == "max_duration" and unit == "dur":
        text = "can't be given in dur, which is a fraction of max_duration. Use batches, tokens or epochs."
        yield key, text


def _batch_splits(run: TrainConfig) -> Iterator[Problem]:
    if problem := split_problem(run.global_train_batch_size, world_size()):
        yield "global_train_batch_size", problem


def split_problem(batch: int, devices: int) -> str | None:
    """Why a batch does not split over the devices, or None."""
    if batch % devices == 0:
        return None
    below, above = batch // devices * devices, -(-batch // devices) * devices
    use = f"{below} or {above}" if below else str(above)
    return f"{batch} does not split over {devices} devices. Use a multiple of {devices}: {use}."


def _loaders(run: TrainConfig, key: str) -> Iterator[tuple[str, Any]]:
    """The loaders of `train_loader` or `eval_loader`, each with its key."""
    loaders = getattr(run, key)
    if isinstance(loaders, tuple):
        for index, loader in enumerate(loaders):
            yield f"{key}[{index}]", loader
    elif loaders is not None:
        yield key, loaders


def _given_twice(key: str, value: Any, of_run: str, expected: Any) -> Iterator[Problem]:
    if value is not None and value != expected:
        yield key, f"{value} is not the {of_run} of the run, {expected}. Remove it, or make them equal."


def _model_length_given_twice(run: TrainConfig) -> Iterator[Problem]:
    yield from _given_twice("model.max_seq_len", run.model.max_seq_len, "max_seq_len", run.max_seq_len)


def _tokenizer_length_given_twice(run: TrainConfig) -> Iterator[Problem]:
    length = run.tokenizer.kwargs.get("model_max_length")
    yield from _given_twice("tokenizer.kwargs.model_max_length", length, "max_seq_len", run.max_seq_len)


def _loader_gives_twice(run: TrainConfig, key: str, name: str, of_run: str) -> Iterator[Problem]:
    for path, loader in _loaders(run, key):
        value = getattr(loader.dataset, name)
        yield from _given_twice(f"{path}.dataset.{name}", value, of_run, getattr(run, of_run))


def _documents(run: TrainConfig, key: str) -> Iterator[Problem]:
    """The tokens that separate documents exist, and are given where attention needs them."""
    for path, loader in _loaders(run, key):
        if loader.name != "text":
            continue
        ids = run.model.vocab_size
        for name in ("eos_token_id", "bos_token_id"):
            token_id = getattr(loader.dataset, name)
            if token_id is not None and not 0 <= token_id < ids:
                yield f"{path}.dataset.{name}", f"{token_id} is not one of the {ids} ids that the model has."
        if run.model.attn_config.attn_uses_sequence_id and not loader.dataset.separates_documents:
            text = "needs eos_token_id or bos_token_id here, to separate documents."
            yield f"{path}.dataset", f"model.attn_config.attn_uses_sequence_id {text}"


def _heads(run: TrainConfig, key: str) -> Iterator[Problem]:
    """A head trains on labelled examples, a language model on all others."""
    has_head = isinstance(run.model, HeadConfig)
    for path, loader in _loaders(run, key):
        if has_head != (loader.name == "labelled"):
            yield f"{path}.name", _why_not_its_loader(run.model.name, loader.name, has_head)


def _why_not_its_loader(model: str, loader: str, has_head: bool) -> str:
    if has_head:
        return f"{loader}: model.name: {model} trains on labels. Use labelled."
    return f"labelled: model.name: {model} has no head that predicts labels. Use text."


def _generated_samples(run: TrainConfig) -> Iterator[Problem]:
    if "generate_callback" in run.callbacks.keys() - plugins.callbacks.keys():
        yield from _sampling(run.callbacks["generate_callback"])
        name = run.model.name
        if isinstance(run.model, HeadConfig):
            yield "callbacks.generate_callback", f"model.name: {name} generates no text. Remove it."


def _sampling(arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """The callback that generates takes the sampling of `generate`, with its rules."""
    names = {field.name: field.default for field in fields(Sampling)}
    values = {k: v for k, v in arguments.items() if k in names}
    for name, text in broken_rules(Sampling, names | values):
        yield f"callbacks.generate_callback.{name}", text


def code_named(run: TrainConfig) -> Iterator[Problem]:
    """The code that a file names, and that it runs only with the user's permission."""
    if run.code_paths:
        yield "code_paths", "names code, which runs only with allow_code=true on the command line."
    for key in ("train_loader", "eval_loader"):
        for path, loader in _loaders(run, key):
            if loader.name == "finetuning":
                yield from _refused_code(loader.dataset, f"{path}.dataset")


def _preprocessing(run: TrainConfig, key: str) -> Iterator[Problem]:
    """Code that a file names runs only with the user's permission."""
    for path, loader in _loaders(run, key):
        if loader.name == "finetuning" and not run.allow_code:
            yield from _refused_code(loader.dataset, f"{path}.dataset")


def _refused_code(dataset: FinetuningDatasetConfig, place: str) -> Iterator[Problem]:
    text = "names code, which runs only with allow_code=true on the command line."
    is_shared = dataset.preprocessing_fn is not None or dataset.streams is None
    named = [name for name, source in dataset.sources.items() if isinstance(source.preprocessing_fn, str)]
    for name in named[:1] if is_shared else named:
        yield f"{place}{'' if is_shared else f'.streams.{name}'}.preprocessing_fn", text


def _own_metrics(run: TrainConfig) -> Iterator[Problem]:
    name = run.model.name
    if run.eval_metrics and isinstance(run.model, HeadConfig):
        yield "eval_metrics", f"are only for language models, not for {name}. Remove them."


def _patterns(run: TrainConfig) -> Iterator[Problem]:
    """Every pattern names parameters of the model, and some parameter stays trainable."""
    model, optimizer = run.model, run.optimizer
    groups = [group.param_str_match for group in optimizer.param_groups]
    problems = pattern_problems(model.network(), model.peft_config, optimizer.disable_grad, groups)
    yield from ((f"optimizer.{key}", text) for key, text in problems)


def _momentum(run: TrainConfig) -> Iterator[Problem]:
    if choice_of(run.optimizer, "momentum_dtype") == "int8":
        yield from _momentum_in_8_bits(run)


def _momentum_in_8_bits(run: TrainConfig) -> Iterator[Problem]:
    width, size = run.model.network().d_model, MOMENTUM_GROUP
    if width % size:
        text = f"int8 stores {size} numbers of a row together, and model.d_model: {width} is not a multiple"
        yield "optimizer.momentum_dtype", f"{text} of {size}. Use bfloat16 or float32."


def _base_of_adapters(run: TrainConfig) -> Iterator[Problem]:
    """Adapters train on top of a base model, which a resumed run reads from the same place."""
    path = run.load_path
    if not run.model.takes_weights and not path:
        yield (
            "model.peft_config",
            "trains on top of the weights of a base model. Name it in model.pretrained_model_name_or_path, "
            "or in load_path with load_weights_only: true.",
        )
    if path and is_url(path):
        yield "load_path", f"{path} is the adapters' base, and is read from this machine. Name a local path."
    if path and not run.load_weights_only:
        yield (
            "load_path",
            f"{path} is the adapters' base, of which only the weights are taken. Set load_weights_only: "
            "true.",
        )


def _around_adapters(run: TrainConfig) -> Iterator[Problem]:
    """What adapters can't be combined with."""
    if "hf_checkpointer" in run.callbacks:
        yield (
            "callbacks.hf_checkpointer",
            "exports whole models, and this one has adapters. Remove it; `mptfoundry export` takes a run.",
        )
    if run.fsdp_config is not None and run.model.bits:
        text = "is for whole models: a quantized base can't be sharded. Remove fsdp_config."
        yield f"model.load_in_{run.model.bits}bit", text


def _schedule_ends(run: TrainConfig) -> Iterator[Problem]:
    if isinstance(run.scheduler, OwnScheduleConfig):
        return
    end, whole = tokens_of(run.scheduler.t_max, run), tokens_of(run.max_duration, run)
    if end is not None and whole is not None and end < whole:
        text = f"is shorter than max_duration: {run.max_duration}. Use 1dur, the whole run."
        yield "scheduler.t_max", f"{run.scheduler.t_max} {text}"


def _decay_fits(run: TrainConfig) -> Iterator[Problem]:
    """Decay must fit inside the run and start after warmup; the end of the run may cut off a warmup."""
    for key in ("t_decay", "t_cooldown"):
        if not isinstance(run.scheduler, OwnScheduleConfig) and hasattr(run.scheduler, key):
            yield from _decay_problem(run, key)


def _decay_problem(run: TrainConfig, key: str) -> Iterator[Problem]:
    scheduler, whole, decay = run.scheduler, tokens_of(run.max_duration, run), getattr(run.scheduler, key)
    length, warmup = tokens_of(decay, run), tokens_of(scheduler.t_warmup, run)
    if whole is None or length is None:
        return
    text = f"{decay} is longer than the run, max_duration: {run.max_duration}. Use less."
    if length > whole:
        yield f"scheduler.{key}", text
    elif key == "t_decay" and warmup is not None and whole < length + warmup:
        yield "scheduler.t_decay", f"together with t_warmup: {scheduler.t_warmup}, {text}"


def tokens_of(duration: int | str, run: TrainConfig) -> float | None:
    """A duration of a run in tokens; None where that depends on the size of the data."""
    number, unit = parse_duration(duration)
    if number == 0:
        return 0
    if unit == "dur":
        is_known = parse_duration(run.max_duration)[1] != "dur"
        whole = tokens_of(run.max_duration, run) if is_known else None
        return None if whole is None else number * whole
    length = run.max_seq_len
    size = {"tok": 1, "sp": length, "ba": length * run.global_train_batch_size}.get(unit)
    return None if size is None else number * size


def _one_source_of_weights(run: TrainConfig) -> Iterator[Problem]:
    if run.model.takes_weights:
        text = "Remove one; with model.pretrained: false the latter gives only the architecture."
        both = "and model.pretrained_model_name_or_path both say where the weights come from."
        yield "load_path", f"{both} {text}"


def _file_name(run: TrainConfig, key: str) -> Iterator[Problem]:
    """What files and folders can be called."""
    name = getattr(run, key)
    if key in ("save_filename", "load_path") and _PACKED.search(name):
        yield key, f"{name} is not a plain file. Archives and compressed checkpoints are not read: use .pt."
    if problem := _placeholder_problem(name, _FILLED_IN[key]):
        yield key, problem
    if key in ("save_filename", "save_latest_filename") and "/" in name:
        yield key, f"{name} contains a folder. Name the folder in save_folder."
    if problem := why_not_a_path(name):
        yield key, problem


def _placeholder_problem(text: str, known: tuple[str, ...]) -> str | None:
    """What is wrong with the names in braces of a text, or None."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return f"{text} has an unmatched brace. Remove it."
    unknown = next((name for name in names if name not in known), None)
    allowed = ", ".join(f"{{{name}}}" for name in known)
    return None if unknown is None else f"{{{unknown}}} is not a placeholder here. Allowed: {allowed}."


def _run_name(run: TrainConfig) -> Iterator[Problem]:
    if problem := why_not_a_run_name(run.run_name):
        yield "run_name", problem


def _names_that_a_start_finds(run: TrainConfig) -> Iterator[Problem]:
    name, in_a_store = run.save_filename, run.save_folder is not None and is_url(run.save_folder)
    if problem := why_no_start_finds(name, in_a_store=in_a_store):
        yield "save_filename", problem
    elif run.save_num_checkpoints_to_keep > 0 and why_no_start_finds(name, in_a_store=True):
        text = f"save_filename: {name} does not tell which checkpoint is the oldest."
        yield "save_num_checkpoints_to_keep", f"{text} Use -1, or ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt."


def _link_name(run: TrainConfig) -> Iterator[Problem]:
    name, latest = run.save_filename, run.save_latest_filename or "latest-rank{rank}.pt"
    if latest.replace("{rank}", "0") == name.replace("{rank}", "0"):
        yield "save_filename", f"{name} is the name of the link to the newest checkpoint. Use another."


def _resuming(run: TrainConfig) -> Iterator[Problem]:
    if run.save_folder is None:
        yield "autoresume", "needs save_folder, which holds the checkpoint to resume from."
    if run.save_weights_only:
        yield "autoresume", "needs whole checkpoints. Set save_weights_only: false."


def _around_target(run: TrainConfig) -> Iterator[Problem]:
    """What the parts that are recomputed or offloaded need."""
    fsdp, model = run.fsdp_config, run.model
    if fsdp is None or not fsdp.saves_activations:
        text = (
            "has no effect without fsdp_config.activation_checkpointing or activation_cpu_offload. Set one."
        )
        yield "model.activation_checkpointing_target", text
    elif fsdp.activation_cpu_offload and "act_fn" in recomputed_parts(
        model.activation_checkpointing_target, model.n_layers
    ):
        text = "act_fn can't be offloaded, only recomputed. Use mlp, or remove activation_cpu_offload."
        yield "model.activation_checkpointing_target", text


def _around_sharding(run: TrainConfig) -> Iterator[Problem]:
    """What sharding can't be combined with."""
    fsdp = run.fsdp_config
    if fsdp.activation_cpu_offload and run.compile_config is not None:
        yield "fsdp_config.activation_cpu_offload", "true can't be combined with compile_config."
    if fsdp.load_monolith_rank0_only and run.model.init_device == "meta":
        yield (
            "model.init_device",
            "meta: fsdp_config.load_monolith_rank0_only loads into a whole model on rank 0. Use mixed.",
        )


def _tasks_in_training(run: TrainConfig) -> Iterator[Problem]:
    batches, length, model = run.icl_subset_num_batches, run.icl_seq_len, run.model
    if batches < -1 or batches == 0:
        yield "icl_subset_num_batches", f"{batches} is too small. Use 1 or more, or -1 for all documents."
    if length is not None and length < 2:
        yield "icl_seq_len", f"{length} is too small. Use 2 or more."
    if length is not None and length > run.max_seq_len and model.has_learned_positions:
        text = f"{length} exceeds the {run.max_seq_len} learned positions of the model. Use at most these."
        yield "icl_seq_len", text
    if run.icl_tasks is None and run.eval_gauntlet is not None:
        yield "eval_gauntlet", "has no effect without icl_tasks. Name the tasks, or remove it."
    if run.icl_tasks is not None and isinstance(model, HeadConfig):
        text = f"need a language model, and model.name is {run.model.name}. Remove them."
        yield "icl_tasks", text
    if isinstance(run.icl_tasks, tuple) and isinstance(run.eval_gauntlet, GauntletConfig):
        for key, text in missing_benchmarks(run.icl_tasks, run.eval_gauntlet):
            yield f"eval_gauntlet.{key}", text


def _keep_best(run: TrainConfig) -> Iterator[Problem]:
    if run.save_folder is None:
        yield "keep_best", "needs save_folder, where checkpoints are kept."
    every, end = parse_duration(run.eval_interval), parse_duration(run.max_duration)
    save = parse_duration(run.save_interval)
    if (run.eval_loader is None and run.icl_tasks is None) or every[0] == 0:
        yield "keep_best", "needs an evaluation. Set eval_loader or icl_tasks, and eval_interval."
    if why_no_start_finds(run.save_filename, in_a_store=True):
        yield "keep_best", f"save_filename: {run.save_filename} does not tell the batch. Leave it out."
    yield from _unknown_metric(run)
    whole = end[0] if end[1] == every[1] else run.batches() if every[1] == "ba" else None
    if every[1] != save[1] or every[1] == "dur" or whole is None:
        return
    if math.lcm(int(every[0]), int(save[0])) >= whole > save[0]:
        yield (
            "keep_best",
            f"eval_interval: {run.eval_interval} and save_interval: {run.save_interval} meet only at the end "
            "of the run, and only a checkpoint of an evaluation's batch is judged. Let one divide the other.",
        )


def _unknown_metric(run: TrainConfig) -> Iterator[Problem]:
    """A metric that no evaluation has; tasks in other files are not judged here."""
    metric, tasks = run.keep_best.metric, run.icl_tasks or ()
    if not metric.startswith("metrics/") or isinstance(tasks, str) or run.code_paths:
        return
    has_head = isinstance(run.model, HeadConfig)
    names = {f"metrics/{label}/": () if has_head else TOKEN_METRICS for label in run.eval_loaders}
    names |= {f"metrics/{each.label}/": () for each in tasks}
    start = next((each for each in names if metric.startswith(each)), None)
    if start is not None and (not names[start] or metric.removeprefix(start) in names[start]):
        return
    known = [start + name for name in names[start]] if start else [f"{each}..." for each in names]
    yield "keep_best.metric", not_measured(metric, known)


def not_measured(metric: str, known: Sequence[str]) -> str:
    """What is wrong with `keep_best.metric`, and some known metrics like it."""
    near = difflib.get_close_matches(metric, known, 3, 0.4) or known[:8]
    return f"{metric} is not measured by this run. Use one such as {', '.join(near)}."


def _allowed_changes(run: TrainConfig) -> Iterator[Problem]:
    known = {field.name for field in fields(run)}
    for key in run.allow_changes:
        if key.split(".")[0] not in known:
            yield "allow_changes", f"{key} is not a key of a run. Use the keys that the refusal names."


# The rules of what most runs don't use, by the option that has to be set. Where two options ask for one rule,
# its problems are reported once.
_RULES_OF_OPTIONS: tuple[tuple[str, Callable[[TrainConfig], Iterator[Problem]]], ...] = (
    ("callbacks", _generated_samples),
    ("optimizer.disable_grad", _patterns),
    ("optimizer.param_groups", _patterns),
    ("optimizer", _momentum),
    ("model.peft_config", _base_of_adapters),
    ("model.peft_config", _around_adapters),
    ("load_path", _one_source_of_weights),
    ("autoresume", _resuming),
    ("model.activation_checkpointing_target", _around_target),
    ("fsdp_config", _around_sharding),
    ("code_paths", code_problem),
    ("eval_metrics", _own_metrics),
    ("allow_changes", _allowed_changes),
    ("icl_tasks", _tasks_in_training),
    ("eval_gauntlet", _tasks_in_training),
    ("keep_best", _keep_best),
)
