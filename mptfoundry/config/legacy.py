"""llm-foundry's older layouts, translated; and what it knows that is not supported here, with the reason.

A translation moves values inside a document, before anything is checked, and leaves one line that says so.
What it removes had no effect on the numbers of a run.
"""

from __future__ import annotations

from typing import Any

from mptfoundry.architecture.dialects import FLAT_KEYS
from mptfoundry.config.engine.document import Document, KeyPath, dotted
from mptfoundry.config.engine.schema import field_types
from mptfoundry.config.run import TrainConfig

_MOVED: dict[str, str] = {
    **{f"model.{old}": f"model.{new}" for old, new in FLAT_KEYS.items()},
    "fsdp_config.load_fsdp_monolith_rank0_only": "fsdp_config.load_monolith_rank0_only",
}

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
    ("model.use_auth_token", ANY, "the hub's client takes its token from HF_TOKEN or from its login"),
    ("model.trust_remote_code", ANY, "no code of a model is run"),
    ("model.use_train_metrics", ANY, "the loss says it all in training"),
    ("model.use_flash_attention_2", ANY, "attn_config.attn_impl says it"),
    ("model.attn_implementation", ANY, "attn_config.attn_impl says it"),
    ("model.use_logits", ANY, "there is no other kind of output here"),
    ("model.allow_embedding_resizing", False, "it is off"),
    ("model.pretrained_lora_id_or_path", None, "it is blank"),
    ("model.should_save_peft_only", ANY, "a checkpoint of adapters never holds their base"),
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
    ("spin_dataloaders", None, "it is blank"),
    ("model.attn_config.attn_temperature_tuning", None, "it is blank"),
)
_LOADER_DROPPED: tuple[tuple[str, Any, str], ...] = (
    ("dataset.tokenizer_name", ANY, "tokenizer.name says it"),
    ("dataset.group_method", ANY, "samples are as long as they were prepared"),
    ("dataset.stream_name", "stream", "there is no other kind of stream here"),
    ("dataset.stream_config", None, "it is blank"),
    ("prefetch_factor", None, "it is blank"),
    ("dataset.batch_size", ANY, "it follows from the batch sizes of the run"),
)

_PARTS = "the blocks of a model are all alike, of torch's own layers. Remove it."
_MOE = "mixtures of experts are another architecture. Remove it."
_PEFT = "say it in model.peft_config: {r: 16, lora_alpha: 32}."
_TASKS = (
    "in-context tasks are not evaluated yet. Remove it, or export the model and use lm-evaluation-harness."
)
_HUB = "name the MPT to start from in pretrained_model_name_or_path."
_OBJECT = "it holds an object, which a file can't say. Remove it."
_PLANNED = "packing is planned for the whole data set, and leaves no example out. Remove it."
_ONCE = "examples are tokenized once and read from this machine's disk. Remove it."
_RECORDS = "data sets are text in shards. Use name: text."
_MPT = "models are MPTs. Use name: mpt_causal_lm."
_FORMAT = "runs save checkpoints in Composer's format alone. Remove it, and use `mptfoundry export`."

# What a file that describes no training has in place of a model, and what to do with such a file.
OTHER_KINDS = {
    "parameters": "this is a platform's job file. Give what stands under `parameters` as a file of its own.",
    "models": "this file describes an evaluation, not a training. `mptfoundry eval RUN` measures the loss "
    "of a model on its eval_loader; for in-context tasks, export it and use lm-evaluation-harness.",
}

# (class, key), (top section, its name) or (key, value) -> why.
REFUSED: dict[tuple[str, str], str] = {
    (
        "TrainConfig",
        "tp_config",
    ): "Composer's tensor parallelism fails with FSDP2. fsdp_config shards a model "
    "over devices; remove this.",
    ("TrainConfig", "profiler"): "runs are not traced. Remove it.",
    ("TrainConfig", "icl_tasks"): _TASKS,
    ("TrainConfig", "eval_gauntlet"): _TASKS,
    ("TrainConfig", "lora"): _PEFT,
    ("TrainConfig", "peft_config"): _PEFT,
    ("TrainConfig", "freeze"): "patterns in optimizer.disable_grad say which parameters stay as they are.",
    ("TrainConfig", "only_hf_checkpoint"): _FORMAT,
    ("TrainConfig", "parameters"): OTHER_KINDS["parameters"],
    ("TrainConfig", "models"): "a run has one model, in `model`. Remove it.",
    ("ModelConfig", "allow_embedding_resizing"): "config_overrides.vocab_size says how many rows. Remove it.",
    ("ModelConfig", "pretrained_lora_id_or_path"): "adapters start new. Merge those into their base first.",
    ("ModelConfig", "lora"): _PEFT,
    ("ModelConfig", "fc_type"): _PARTS,
    ("ModelConfig", "block_overrides"): _PARTS,
    ("ModelConfig", "attention_patch_type"): "only Llama has it. Remove it.",
    ("AttnConfig", "nope"): "no layer can go without positions alone. Set alibi and rope to false for all.",
    ("AttnConfig", "kv_dim"): "there is no cross-attention. Remove it.",
    ("AttnConfig", "attn_temperature_tuning"): "softmax_scale sets a fixed scale. Remove it.",
    ("AttnConfig", "fc_type"): _PARTS,
    ("FFNConfig", "fc_type"): _PARTS,
    ("ffn_type", "te_ln_mlp"): _PARTS,
    ("ffn_type", "mb_moe"): _MOE,
    ("ffn_type", "mb_dmoe"): _MOE,
    ("ffn_type", "torch_dmoe"): _MOE,
    ("precision", "amp_fp8"): "it needs Transformer Engine's layers.",
    ("FSDPConfig", "device_mesh"): "give data_parallel_shard_degree instead, as Composer asks for.",
    ("FSDPConfig", "ignored_modules"): _OBJECT,
    ("FSDPConfig", "process_group"): _OBJECT,
    ("FSDPConfig", "load_planner"): _OBJECT,
    ("FSDPConfig", "save_planner"): _OBJECT,
    ("FSDPConfig", "min_params"): "the model says what is sharded. Remove it.",
    ("TextDatasetConfig", "stream_config"): "streams have only the keys that `mptfoundry explain` lists.",
    (
        "TextDatasetConfig",
        "hf_name",
    ): "records are read by name: finetuning; text by shards. Use one of them.",
    ("FinetuningDatasetConfig", "pad_to_longest"): "use allow_pad_trimming.",
    ("FinetuningDatasetConfig", "seq_parallel_replication"): "each device reads rows of its own. Remove it.",
    ("FinetuningDatasetConfig", "auto_packing_replication"): _PLANNED,
    ("FinetuningDatasetConfig", "max_leftover_bins_to_keep"): _PLANNED,
    ("FinetuningDatasetConfig", "epoch_size"): "streams.NAME.choose says how many examples an epoch has.",
    ("TextDatasetConfig", "mlm_probability"): "models predict the next token. Remove it.",
    ("TextLoaderConfig", "sampler"): "the data set orders its samples itself. Remove it.",
    ("TextLoaderConfig", "batch_size"): "it follows from the batch sizes of the run. Remove it.",
    ("ChatConfig", "prompts"): "a chat asks for each line itself. Remove it, or use generate.",
    ("GenerateConfig", "system"): "only a chat begins with it. Put it into the prompt, or use chat.",
    ("model", "hf_causal_lm"): _HUB,
    ("model", "hf_t5"): _MPT,
    ("model", "hf_prefix_lm"): "use name: mpt_causal_lm with attn_config.prefix_lm: true.",
    ("model", "fmapi_causal_lm"): _MPT,
    ("model", "openai_causal_lm"): _MPT,
    ("model", "openai_chat"): _MPT,
    ("train_loader", "text_denoising"): _RECORDS,
    ("eval_loader", "text_denoising"): _RECORDS,
    ("optimizer", "clip_lion"): "decoupled_lionw with algorithms.gradient_clipping is close to it.",
    ("optimizer", "adalr_lion"): "use decoupled_lionw.",
    ("optimizer", "no_op"): "a run that learns nothing is an evaluation. Use `mptfoundry eval`.",
}
for _name in (
    *("predownload", "cache_limit", "partition_algo", "num_canonical_nodes", "shuffle_algo", "keep_zip"),
    *("shuffle_block_size", "sampling_method", "sampling_granularity", "batching_method", "validate_hash"),
    *("download_retry", "download_timeout", "replication", "allow_unsafe_types"),
):
    REFUSED["FinetuningDatasetConfig", _name] = REFUSED["RecordsConfig", _name] = _ONCE
REFUSED["RecordsConfig", "token_encoding_type"] = "say it for all streams, in dataset.token_encoding_type."
for _name in (
    *("moe_num_experts", "moe_top_k", "moe_loss_weight", "moe_lbl_in_fp32", "moe_world_size", "mlp_impl"),
    *("moe_weight_parallelism", "uniform_expert_assignment", "memory_optimized_mlp"),
):
    REFUSED["FFNConfig", _name] = _MOE


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
    _tasks_without_data(document, notes)
    _unmasked_packing(document, notes)
    _low_precision_norm(document, notes)
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


def _move(document: Document, old: KeyPath, new: KeyPath, notes: list[str]) -> None:
    if not document.has(old):
        return
    origin = document.origin(old)
    if document.has(new):
        document.report(old, f"is the older name of {dotted(new)}, which is also given. Remove one.")
        document.take(old)
        return
    document.put(new, document.take(old), origin)
    notes.append(f"{origin.place}: {dotted(old)} is now {dotted(new)}.")


def _drop(document: Document, path: KeyPath, allowed: Any, reason: str, notes: list[str]) -> None:
    if not document.has(path):
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
    if value not in (None, allowed) or (allowed is ANY and path[0] == "algorithms"):
        notes.append(f"{place}: {dotted(path)} is left out: {reason}.")


def _old_model_name(document: Document, notes: list[str]) -> None:
    name = ("model", "name")
    if document.get(name) == "mosaic_gpt":
        origin = document.origin(name)
        document.put(name, "mpt_causal_lm", origin)
        notes.append(f"{origin.place}: model.name: mosaic_gpt is now mpt_causal_lm.")


def _low_precision_norm(document: Document, notes: list[str]) -> None:
    """The algorithm swaps layernorms for what MPT's default norm is already."""
    old, norm = ("algorithms", "low_precision_layernorm"), document.get(("model", "norm_type"))
    if norm is None or str(norm).startswith("low_precision"):
        _drop(document, old, ANY, f"model.norm_type is {norm or 'low_precision_layernorm'} already", notes)


def _tasks_without_data(document: Document, notes: list[str]) -> None:
    """llm-foundry's finetuning files list tasks whose data the user is to fill in."""
    tasks = document.tree.get("icl_tasks")
    if isinstance(tasks, list) and all(isinstance(t, dict) and t.get("dataset_uri") is None for t in tasks):
        _drop(document, ("icl_tasks",), ANY, "none of its tasks says where its data lies", notes)


def _unmasked_packing(document: Document, notes: list[str]) -> None:
    """llm-foundry's packed examples see one another unless told otherwise: other mathematics than here."""
    switch = ("attn_config", "attn_uses_sequence_id")
    paths: list[KeyPath] = [("model", *switch), ("model", "config_overrides", *switch)]
    off = next((path for path in paths if document.get(path) is False), None)
    ratios = [document.get((*loader, "dataset", "packing_ratio")) for loader in _loader_paths(document)]
    if off and any(ratios):
        text = "is false, but packed examples never see one another here"
        notes.append(f"{document.origin(off).place}: {dotted(off)} {text}.")


def _multiquery(document: Document, notes: list[str]) -> None:
    old = ("model", "multiquery_attention")
    if isinstance(document.get(old), bool):
        origin = document.origin(old)
        kind = "multiquery_attention" if document.take(old) else "multihead_attention"
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
        document.put(("variables", key), value, origin)
        notes.append(f"{origin.place}: {key} is now variables.{key}, since only other values refer to it.")
