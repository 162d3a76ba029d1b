"""What has to hold between the sections of a training run.

Each rule looks at the fields that it needs and is left out where one of them is missing, so that one wrong
field does not hide what is wrong elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from string import Formatter
from typing import Any

from mptfoundry.architecture.trainable import pattern_problems
from mptfoundry.config.data import label_problems
from mptfoundry.config.engine.durations import parse_duration
from mptfoundry.config.verbs import Sampling
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.places import is_url, why_no_start_finds, why_not_a_path, why_not_a_run_name
from mptfoundry.ranks import world_size

Problem = tuple[str, str]
_AT_MOST = {
    "max_seq_len": 1_000_000_000,
    "seed": 2**32 - 1,
    "global_train_batch_size": 1_000_000_000,
    "device_train_microbatch_size": 1_000_000_000,
    "device_eval_batch_size": 1_000_000_000,
    "train_subset_num_batches": 10**15,
    "eval_subset_num_batches": 10**15,
    "save_num_checkpoints_to_keep": 10**9,
    "max_split_size_mb": 10**9,
    "dist_timeout": 10**8,
}
_PACKED = re.compile(r"\.(tar|tgz|tar\.\w+|pt\.(bz2|gz|lz4|lzma|lzo|xz|zst))$")
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


def between_sections(values: Mapping[str, Any]) -> Iterator[Problem]:
    """All problems, as (dotted key, text)."""
    yield from _sizes(values)
    yield from _batches(values)
    yield from _said_twice(values)
    yield from label_problems(values.get("eval_loader"))
    yield from _documents(values)
    yield from _heads(values)
    yield from _sampling(values)
    yield from _preprocessing(values)
    yield from _patterns(values)
    yield from _adapters(values)
    yield from _schedule(values)
    yield from _checkpoints(values)
    yield from _sharding(values)
    if values.get("code_paths") and "allow_code" in values and not values["allow_code"]:
        yield "code_paths", "names code, which runs only with allow_code=true on the command line."


def _sizes(values: Mapping[str, Any]) -> Iterator[Problem]:
    at_least = {
        "max_seq_len": 1,
        "seed": 0,
        "global_train_batch_size": 1,
        "device_train_microbatch_size": 1,
        "device_eval_batch_size": 1,
        "train_subset_num_batches": -1,
        "eval_subset_num_batches": -1,
        "save_num_checkpoints_to_keep": -1,
        "max_split_size_mb": 1,
        "dist_timeout": 1,
    }
    for key, least in at_least.items():
        value = values.get(key)
        if isinstance(value, (int, float)) and value < least:
            yield key, f"{value} is too small. Use {least} or more."
    for key, most in _AT_MOST.items():
        value = values.get(key)
        if isinstance(value, (int, float)) and value > most:
            yield key, f"{value} is too large. Use {most} or less."
    for key in ("train_subset_num_batches", "eval_subset_num_batches"):
        if values.get(key) == 0:
            yield key, "0 batches leave nothing to do. Use -1 for all of them."
    for key in ("max_duration", "save_interval"):
        if key in values and parse_duration(values[key])[0] == 0:
            yield key, f"{values[key]} is not longer than 0. Use more than 0."
    if "max_duration" in values and parse_duration(values["max_duration"])[1] == "dur":
        yield (
            "max_duration",
            "can't be given in dur, which is a fraction of max_duration. Use batches, tokens or epochs.",
        )


def _batches(values: Mapping[str, Any]) -> Iterator[Problem]:
    batch = values.get("global_train_batch_size", 0)
    if batch > 0 and (problem := split_problem(batch, world_size())):
        yield "global_train_batch_size", problem


def split_problem(batch: int, devices: int) -> str | None:
    """Why a batch does not split over the devices, or None."""
    if batch % devices == 0:
        return None
    below, above = batch // devices * devices, -(-batch // devices) * devices
    use = f"{below} or {above}" if below else str(above)
    return f"{batch} does not split over {devices} devices. Use a multiple of {devices}: {use}."


def _loaders(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "train_loader" in values:
        yield "train_loader", values["train_loader"]
    loaders = values.get("eval_loader")
    if isinstance(loaders, tuple):
        for index, loader in enumerate(loaders):
            yield f"eval_loader[{index}]", loader
    elif loaders is not None:
        yield "eval_loader", loaders


def _said_twice(values: Mapping[str, Any]) -> Iterator[Problem]:
    length, seed = values.get("max_seq_len"), values.get("seed")
    said: list[tuple[str, Any, str, Any]] = []
    if "model" in values:
        said.append(("model.max_seq_len", values["model"].max_seq_len, "max_seq_len", length))
    if "tokenizer" in values:
        given = values["tokenizer"].kwargs.get("model_max_length")
        said.append(("tokenizer.kwargs.model_max_length", given, "max_seq_len", length))
    for key, loader in _loaders(values):
        said.append((f"{key}.dataset.max_seq_len", loader.dataset.max_seq_len, "max_seq_len", length))
        said.append((f"{key}.dataset.shuffle_seed", loader.dataset.shuffle_seed, "seed", seed))
    for key, value, top_key, top in said:
        if value is not None and top is not None and value != top:
            yield key, f"{value} is not the {top_key} of the run, {top}. Remove it, or make them equal."


def _documents(values: Mapping[str, Any]) -> Iterator[Problem]:
    if "model" not in values:
        return
    ids = values["model"].vocab_size
    for key, loader in _loaders(values):
        if loader.name != "text":
            continue
        for name in ("eos_token_id", "bos_token_id"):
            token_id = getattr(loader.dataset, name)
            if token_id is not None and not 0 <= token_id < ids:
                yield f"{key}.dataset.{name}", f"{token_id} is not one of the {ids} ids that the model has."
        if values["model"].attn_config.attn_uses_sequence_id and not loader.dataset.separates_documents:
            yield (
                f"{key}.dataset",
                "model.attn_config.attn_uses_sequence_id needs eos_token_id or bos_token_id here, "
                "to tell documents apart.",
            )


def _heads(values: Mapping[str, Any]) -> Iterator[Problem]:
    """A head learns from labelled examples and makes no text; a language model is the other way round."""
    if "model" not in values:
        return
    has_head, name = isinstance(values["model"], HeadConfig), values["model"].name
    for key, loader in _loaders(values):
        if has_head and loader.name != "labelled":
            yield f"{key}.name", f"{loader.name}: model.name: {name} learns from labels. Use labelled."
        elif not has_head and loader.name == "labelled":
            yield f"{key}.name", f"labelled: model.name: {name} has no head that learns labels. Use text."
    if has_head and "generate_callback" in values.get("callbacks", {}):
        yield "callbacks.generate_callback", f"model.name: {name} makes no text. Remove it."


def _sampling(values: Mapping[str, Any]) -> Iterator[Problem]:
    given = values.get("callbacks", {}).get("generate_callback", {})
    try:
        Sampling(**{field.name: given[field.name] for field in fields(Sampling) if field.name in given})
    except ValueError as error:
        name, _, text = str(error).partition(": ")
        yield f"callbacks.generate_callback.{name}", text


def _preprocessing(values: Mapping[str, Any]) -> Iterator[Problem]:
    if values.get("allow_code", True):
        return
    for key, loader in _loaders(values):
        for name, source in loader.dataset.sources.items() if loader.name == "finetuning" else ():
            if isinstance(source.preprocessing_fn, str):
                own = loader.dataset.preprocessing_fn is not None or loader.dataset.streams is None
                place = f"{key}.dataset" if own else f"{key}.dataset.streams.{name}"
                text = "names code, which runs only with allow_code=true on the command line."
                yield f"{place}.preprocessing_fn", text
                if own:
                    break


def _patterns(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Every pattern names parameters of the model, and something is left to learn."""
    model, optimizer = values.get("model"), values.get("optimizer")
    if model is None or optimizer is None:
        return
    groups = [group.param_str_match for group in optimizer.param_groups]
    for key, text in pattern_problems(model.network(), model.peft_config, optimizer.disable_grad, groups):
        yield f"optimizer.{key}", text


def _adapters(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Adapters stand beside the weights of a base model, which a resumed run reads from the same place."""
    model, path, fsdp = values.get("model"), values.get("load_path"), values.get("fsdp_config")
    if model is None or model.peft_config is None:
        return
    if not model.takes_weights and not path:
        yield (
            "model.peft_config",
            "learns beside the weights of a base model. Name it in model.pretrained_model_name_or_path, or "
            "in load_path with load_weights_only: true.",
        )
    if path and not values.get("load_weights_only", True):
        yield (
            "load_path",
            f"{path} is the adapters' base, of which weights alone are taken. Set load_weights_only: true.",
        )
    if path and is_url(path):
        yield "load_path", f"{path} is the adapters' base, and is read from this machine. Name a local path."
    if fsdp is not None and model.bits:
        yield (
            f"model.load_in_{model.bits}bit",
            "is for whole models: a quantized base can't be sharded. Remove fsdp_config.",
        )
    if "hf_checkpointer" in values.get("callbacks", {}):
        yield (
            "callbacks.hf_checkpointer",
            "exports whole models, and this one has adapters. Remove it; `mptfoundry export` takes a run.",
        )


def _schedule(values: Mapping[str, Any]) -> Iterator[Problem]:
    """The fall at the end has to lie inside the run, and after the rise; a rise may be cut off by the end."""
    scheduler, total = values.get("scheduler"), values.get("max_duration")
    if scheduler is None or total is None:
        return
    end, whole = tokens_of(scheduler.t_max, values), tokens_of(total, values)
    if end is not None and whole is not None and end < whole:
        text = f"{scheduler.t_max} is shorter than max_duration: {total}. Use 1dur, the whole run."
        yield "scheduler.t_max", text
    fall = "t_decay" if hasattr(scheduler, "t_decay") else "t_cooldown"
    length = tokens_of(getattr(scheduler, fall, 0), values)
    if whole is None or length is None:
        return
    said = f"{getattr(scheduler, fall, 0)} is longer than the run, max_duration: {total}. Use less."
    if length > whole:
        yield f"scheduler.{fall}", said
    rise = tokens_of(scheduler.t_warmup, values)
    if fall == "t_decay" and rise is not None and length <= whole < length + rise:
        text = f"together with t_warmup: {scheduler.t_warmup}, {said}"
        yield "scheduler.t_decay", text


def tokens_of(duration: int | str, values: Mapping[str, Any]) -> float | None:
    """A duration of a run in tokens; None where that depends on the size of the data."""
    number, unit = parse_duration(duration)
    if number == 0:
        return 0
    if unit == "dur":
        total = values.get("max_duration", 1)
        whole = None if parse_duration(total)[1] == "dur" else tokens_of(total, values)
        return None if whole is None else number * whole
    length, batch = values.get("max_seq_len", 0), values.get("global_train_batch_size", 0)
    if length < 1 or batch < 1:
        return None
    size = {"tok": 1, "sp": length, "ba": length * batch}.get(unit)
    return None if size is None else number * size


def _checkpoints(values: Mapping[str, Any]) -> Iterator[Problem]:
    if values.get("load_path") and "model" in values and values["model"].takes_weights:
        yield (
            "load_path",
            "and model.pretrained_model_name_or_path both say where the weights come from. Remove one; with "
            "model.pretrained: false the latter gives the architecture alone.",
        )
    for key in ("save_filename", "load_path"):
        if (name := values.get(key)) and _PACKED.search(name):
            yield key, f"{name} is no plain file. Archives and compressed checkpoints are not read: use .pt."
    for key, known in _FILLED_IN.items():
        if problem := _placeholder_problem(values.get(key) or "", known):
            yield key, problem
    for key in ("save_filename", "save_latest_filename"):
        if "/" in (values.get(key) or ""):
            yield key, f"{values[key]} names a folder, too. Say that in save_folder."
    yield from _names(values)
    if values.get("autoresume"):
        if "save_folder" in values and values["save_folder"] is None:
            yield "autoresume", "needs save_folder, where the checkpoint to resume from lies."
        if values.get("save_weights_only"):
            yield "autoresume", "needs whole checkpoints. Set save_weights_only: false."


def _names(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What files and folders can be called, and what a later start finds."""
    if "run_name" in values and (problem := why_not_a_run_name(values["run_name"])):
        yield "run_name", problem
    for key in ("save_folder", "load_path", "save_filename", "save_latest_filename"):
        if problem := why_not_a_path(values.get(key) or ""):
            yield key, problem
    folder, name = values.get("save_folder"), values.get("save_filename", "ep{epoch}-ba{batch}.pt")
    if problem := why_no_start_finds(name, in_a_store=folder is not None and is_url(folder)):
        yield "save_filename", problem
    elif values.get("save_num_checkpoints_to_keep", -1) > 0 and why_no_start_finds(name, in_a_store=True):
        yield (
            "save_num_checkpoints_to_keep",
            f"save_filename: {name} does not tell which checkpoint is the oldest. Use -1, or "
            "ep{epoch}-ba{batch}-rank{rank}.pt.",
        )
    latest = values.get("save_latest_filename") or "latest-rank{rank}.pt"
    if latest.replace("{rank}", "0") == name.replace("{rank}", "0"):
        yield "save_filename", f"{name} is the name of the link to the newest checkpoint. Use another."


def _placeholder_problem(text: str, known: tuple[str, ...]) -> str | None:
    """What is wrong with the names in braces of a text, or None."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return f"{text} has a brace without its other one. Remove it."
    unknown = next((name for name in names if name not in known), None)
    allowed = ", ".join(f"{{{name}}}" for name in known)
    return None if unknown is None else f"{{{unknown}}} is not filled in here. Allowed: {allowed}."


def _sharding(values: Mapping[str, Any]) -> Iterator[Problem]:
    if "model" not in values or "fsdp_config" not in values:
        return
    model, fsdp = values["model"], values["fsdp_config"]
    saves = fsdp is not None and fsdp.saves_activations
    if model.activation_checkpointing_target is not None and not saves:
        yield (
            "model.activation_checkpointing_target",
            "has no effect without fsdp_config.activation_checkpointing or activation_cpu_offload. Set one.",
        )
    if fsdp is None:
        return
    if model.init_device == "meta" and fsdp.load_monolith_rank0_only:
        yield (
            "model.init_device",
            "meta: fsdp_config.load_monolith_rank0_only loads into a whole model on rank 0. Use mixed.",
        )
    if fsdp.activation_cpu_offload and values.get("compile_config") is not None:
        yield "fsdp_config.activation_cpu_offload", "true does not go together with compile_config."
