"""llm-foundry's older layouts, translated; and what it knows that is not supported here, with the reason.

A translation moves values inside a document, before anything is checked, and leaves one line that says so.
What it removes had no effect on the numbers of a run.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mptfoundry.config.document import Document, KeyPath, dotted
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.schema import field_types
from mptfoundry.mpt.config import AttnConfig, InitConfig

_MOVED: dict[str, str] = {
    "model.mlp_ratio": "model.expansion_ratio",
    "model.param_init_fn": "model.init_config.name",
    "model.attn_qk_ln": "model.attn_config.qk_ln",
    "model.attn_clip_qkv": "model.attn_config.clip_qkv",
    "fsdp_config.load_fsdp_monolith_rank0_only": "fsdp_config.load_monolith_rank0_only",
}
for _field in fields(InitConfig):
    if _field.name != "name":
        _MOVED[f"model.{_field.name}"] = f"model.init_config.{_field.name}"
for _field in fields(AttnConfig):
    _MOVED[f"model.{_field.name}"] = f"model.attn_config.{_field.name}"

ANY: Any = object()
# Key, the value that it may have, and why it can go.
_DROPPED: tuple[tuple[str, Any, str], ...] = (
    ("model.verbose", ANY, "it only changed what was printed"),
    ("model.attn_config.verbose", ANY, "it only changed what was printed"),
    ("model.init_config.verbose", ANY, "it only changed what was printed"),
    ("model.device", ANY, "init_device says where weights are made"),
    ("model.use_cache", ANY, "training never caches keys and values, generation always does"),
    ("model.tokenizer_name", ANY, "tokenizer.name says it"),
    ("model.fc_type", "torch", "there is no other kind of layer here"),
    ("model.ffn_config.fc_type", "torch", "there is no other kind of layer here"),
    ("model.use_pad_tok_in_ffn", ANY, "padding changes no result here"),
    ("model.block_overrides", None, "it is blank"),
    ("model.attn_config.nope", False, "it is off"),
    ("model.attn_config.kv_dim", None, "it is blank"),
    ("model.attn_config.fc_type", "torch", "there is no other kind of layer here"),
    ("model.attn_config.attn_temperature_tuning.attn_scale", 0, "it is off"),
    ("model.pretrained", False, "weights are new unless load_path is given"),
    ("algorithms.low_precision_layernorm", ANY, "model.norm_type says it, and is low_precision_layernorm"),
    ("icl_tasks", None, "it is blank"),
    ("eval_gauntlet", None, "it is blank"),
    ("icl_seq_len", ANY, "it has no effect without icl_tasks"),
    ("icl_max_seq_len", ANY, "it has no effect without icl_tasks"),
    ("icl_subset_num_batches", ANY, "it has no effect without icl_tasks"),
    ("flatten_metadata", ANY, "metadata is kept as it is"),
    ("n_gpus", ANY, "the launcher says it"),
    ("device_train_batch_size", ANY, "it follows from global_train_batch_size"),
    ("device_train_grad_accum", ANY, "it follows from device_train_microbatch_size"),
    ("tp_config", None, "it is blank"),
    ("profiler", None, "it is blank"),
    ("only_hf_checkpoint", False, "it is off"),
    ("only_composer_checkpoint", ANY, "checkpoints are always Composer's"),
    ("python_log_level", None, "it is blank"),
    ("save_filename", None, "it is blank"),
    ("precision", None, "it is blank"),
)
_LOADER_DROPPED: tuple[tuple[str, Any, str], ...] = (
    ("dataset.tokenizer_name", ANY, "tokenizer.name says it"),
    ("dataset.group_method", ANY, "samples are as long as they were prepared"),
    ("dataset.stream_name", "stream", "there is no other kind of stream here"),
    ("dataset.stream_config", None, "it is blank"),
    ("dataset.batch_size", ANY, "it follows from the batch sizes of the run"),
)

_TENSOR = "tensor parallelism is not supported; fsdp_config shards a model over devices."
_ENGINE = "Transformer Engine and MegaBlocks are not supported."
_PEFT = "finetuning with adapters is not supported."
_EVAL = "in-context tasks are not supported in training."
_START = "starting from a Hugging Face folder is not supported; describe the model and give load_path."
_LATER = "finetuning data is not supported; use name: text."

# (class, key) or (top section, its name) -> why.
REFUSED: dict[tuple[str, str], str] = {
    ("TrainConfig", "tp_config"): _TENSOR,
    ("TrainConfig", "profiler"): "profiling is not supported. Remove the section.",
    ("TrainConfig", "icl_tasks"): _EVAL,
    ("TrainConfig", "eval_gauntlet"): _EVAL,
    ("TrainConfig", "lora"): _PEFT,
    ("TrainConfig", "peft_config"): _PEFT,
    ("TrainConfig", "freeze"): "parameters are frozen by optimizer.disable_grad.",
    ("TrainConfig", "only_hf_checkpoint"): "runs always save checkpoints that can be resumed.",
    (
        "TrainConfig",
        "parameters",
    ): "this is a job file of another platform. Pass what is under `parameters` as a file of its own.",
    ("TrainConfig", "device_train_grad_accum"): "it follows from device_train_microbatch_size. Remove it.",
    ("ModelConfig", "pretrained"): _START,
    ("ModelConfig", "pretrained_model_name_or_path"): _START,
    ("ModelConfig", "config_overrides"): _START,
    ("ModelConfig", "peft_config"): _PEFT,
    ("ModelConfig", "lora"): _PEFT,
    ("ModelConfig", "fc_type"): _ENGINE,
    ("ModelConfig", "block_overrides"): "blocks that differ from one another are not supported.",
    ("ModelConfig", "attention_patch_type"): "only Llama has it; models here are MPTs.",
    ("AttnConfig", "nope"): "layers without positions are not supported. Set alibi and rope to false.",
    ("AttnConfig", "kv_dim"): "cross-attention is not supported.",
    ("AttnConfig", "attn_temperature_tuning"): "it is not supported. softmax_scale sets a fixed scale.",
    ("AttnConfig", "fc_type"): _ENGINE,
    ("FFNConfig", "fc_type"): _ENGINE,
    ("FSDPConfig", "device_mesh"): "give data_parallel_shard_degree instead, as Composer asks for.",
    ("FSDPConfig", "ignored_modules"): "it holds objects, which a file can't say. Remove it.",
    ("FSDPConfig", "process_group"): "it holds an object, which a file can't say. Remove it.",
    ("FSDPConfig", "load_planner"): "it holds an object, which a file can't say. Remove it.",
    ("FSDPConfig", "save_planner"): "it holds an object, which a file can't say. Remove it.",
    ("FSDPConfig", "min_params"): "blocks are sharded as the model says. Remove it.",
    ("TextDatasetConfig", "stream_config"): "streams have only the keys that `mptfoundry explain` lists.",
    ("TextDatasetConfig", "hf_name"): _LATER,
    ("TextDatasetConfig", "mlm_probability"): "masked language modelling is not supported.",
    ("TextLoaderConfig", "sampler"): "the data set orders its samples itself. Remove it.",
    ("TextLoaderConfig", "batch_size"): "it follows from the batch sizes of the run. Remove it.",
    ("model", "hf_causal_lm"): f"{_START} Use name: mpt_causal_lm.",
    ("model", "hf_t5"): "models here are MPTs. Use name: mpt_causal_lm.",
    ("model", "hf_prefix_lm"): "use name: mpt_causal_lm with attn_config.prefix_lm: true.",
    ("model", "fmapi_causal_lm"): "models behind a service are not supported.",
    ("model", "openai_causal_lm"): "models behind a service are not supported.",
    ("model", "openai_chat"): "models behind a service are not supported.",
    ("train_loader", "finetuning"): _LATER,
    ("eval_loader", "finetuning"): _LATER,
    ("train_loader", "text_denoising"): "span corruption is not supported. Use name: text.",
    ("eval_loader", "text_denoising"): "span corruption is not supported. Use name: text.",
    ("optimizer", "clip_lion"): "decoupled_lionw with algorithms.gradient_clipping is close to it.",
    ("optimizer", "adalr_lion"): "it is not supported. Use decoupled_lionw.",
    ("optimizer", "no_op"): "a run without learning is not a training run. Use `mptfoundry eval`.",
}


def translate(document: Document) -> list[str]:
    """Bring an older llm-foundry layout into today's, in place.

    Returns:
        One line for each thing that was moved or left out, with its place.
    """
    notes: list[str] = []
    _old_model_name(document, notes)
    for old, new in _MOVED.items():
        _move(document, _path(old), _path(new), notes)
    _multiquery(document, notes)
    for key, allowed, reason in _DROPPED:
        _drop(document, _path(key), allowed, reason, notes)
    for loader in _loader_paths(document):
        for key, allowed, reason in _LOADER_DROPPED:
            _drop(document, loader + _path(key), allowed, reason, notes)
    _top_level_variables(document, notes)
    return notes


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _loader_paths(document: Document) -> list[KeyPath]:
    paths: list[KeyPath] = [("train_loader",)]
    loaders = document.get(("eval_loader",))
    if isinstance(loaders, list):
        return paths + [("eval_loader", index) for index in range(len(loaders))]
    return [*paths, ("eval_loader",)]


def _has(document: Document, path: KeyPath) -> bool:
    parent = document.get(path[:-1])
    return isinstance(parent, dict) and path[-1] in parent


def _move(document: Document, old: KeyPath, new: KeyPath, notes: list[str]) -> None:
    if not _has(document, old):
        return
    origin = document.origin(old)
    if _has(document, new):
        document.report(old, f"is the older name of {dotted(new)}, which is also given. Remove one.")
        return
    value = document.take(old)
    if not isinstance(document.get(new[:-1]), dict):
        document.put(new[:-1], {}, origin)
    document.put(new, value, origin)
    notes.append(f"{origin.place}: {dotted(old)} is now {dotted(new)}.")


def _drop(document: Document, path: KeyPath, allowed: Any, reason: str, notes: list[str]) -> None:
    if not _has(document, path):
        return
    value = document.get(path)
    if isinstance(value, dict) and value.keys() == {"name"}:
        value = value["name"]
    if allowed is not ANY and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
        return
    place = document.origin(path).place
    document.take(path)
    if path[-1] == "attn_scale":
        document.take(path[:-1])
    if value is not None:
        notes.append(f"{place}: {dotted(path)} is left out: {reason}.")


def _old_model_name(document: Document, notes: list[str]) -> None:
    name = ("model", "name")
    if document.get(name) == "mosaic_gpt":
        origin = document.origin(name)
        document.put(name, "mpt_causal_lm", origin)
        notes.append(f"{origin.place}: model.name: mosaic_gpt is now mpt_causal_lm.")


def _multiquery(document: Document, notes: list[str]) -> None:
    old = ("model", "multiquery_attention")
    if isinstance(document.get(old), bool):
        origin = document.origin(old)
        kind = "multiquery_attention" if document.take(old) else "multihead_attention"
        if not isinstance(document.get(("model", "attn_config")), dict):
            document.put(("model", "attn_config"), {}, origin)
        document.put(("model", "attn_config", "attn_type"), kind, origin)
        notes.append(f"{origin.place}: model.multiquery_attention is now model.attn_config.attn_type.")


def _top_level_variables(document: Document, notes: list[str]) -> None:
    """Names at the top that only interpolations refer to, as before there was `variables`."""
    known = field_types(TrainConfig)
    older = {"data_local", "data_remote", "global_seed", "tokenizer_name", "model_name", "max_split_size"}
    referred = {reference.split(".")[0].split("[")[0] for reference in document.references}
    for key in [k for k in document.tree if k not in known and ("TrainConfig", k) not in REFUSED]:
        if key not in older | referred:
            continue
        origin = document.origin((key,))
        value = document.take((key,))
        if key == "global_seed" and "seed" not in document.tree:
            document.put(("seed",), value, origin)
            notes.append(f"{origin.place}: global_seed is now seed.")
            continue
        if not isinstance(document.tree.get("variables"), dict):
            document.put(("variables",), {}, origin)
        document.put(("variables", key), value, origin)
        notes.append(f"{origin.place}: {key} is now variables.{key}, since only other values refer to it.")
