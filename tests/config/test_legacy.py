from __future__ import annotations

from collections.abc import Callable

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.optim import DecoupledLionWConfig
from mptfoundry.config.run import TrainConfig

from .conftest import SMALL

# The layout of llm-foundry's first releases: variables at the top, each fact wherever it is used.
FIRST = """\
data_local: ./c4
data_remote:
max_seq_len: 256
global_seed: 23
run_name:
model:
  name: mpt_causal_lm
  init_device: meta
  d_model: 96
  n_heads: 6
  n_layers: 3
  max_seq_len: ${max_seq_len}
  vocab_size: 1024
  attn_config:
    attn_impl: triton
tokenizer:
  name: some/tokenizer
  kwargs:
    model_max_length: ${max_seq_len}
train_loader:
  name: text
  dataset:
    local: ${data_local}
    remote: ${data_remote}
    split: train
    shuffle: true
    max_seq_len: ${max_seq_len}
    shuffle_seed: ${global_seed}
  drop_last: true
  num_workers: 8
scheduler:
  name: cosine_with_warmup
  t_warmup: 10ba
  alpha_f: 0.1
optimizer:
  name: decoupled_adamw
  lr: 6.0e-4
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.0
algorithms:
  gradient_clipping:
    clipping_type: norm
    clipping_threshold: 1.0
max_duration: 90ba
global_train_batch_size: 32
seed: ${global_seed}
device_eval_batch_size: 4
device_train_microbatch_size: 4
precision: amp_bf16
fsdp_config:
  sharding_strategy: FULL_SHARD
  mixed_precision: PURE
  limit_all_gathers: true
  verbose: false
callbacks:
  speed_monitor:
    window_size: 10
  lr_monitor: {}
"""

Load = Callable[..., TrainConfig]


def test_the_first_layout_of_llm_foundry_is_understood_with_a_note_for_each_move(
    write: Callable[..., str],
) -> None:
    config, notes = load_train_config(write(text=FIRST))
    assert config.seed == 23
    assert config.train_loader.dataset.local == "./c4"
    assert config.model.attn_config.attn_impl == "triton"
    assert notes == [
        "run.yaml:1: data_local is now variables.data_local, since only other values refer to it.",
        "run.yaml:2: data_remote is now variables.data_remote, since only other values refer to it.",
        "run.yaml:4: global_seed is now variables.global_seed, since only other values refer to it.",
    ]


def test_the_first_layout_can_be_changed_by_its_own_words(load: Load) -> None:
    config = load(text=FIRST, words=("global_seed=4", "data_local=other", "max_seq_len=64"))
    assert (config.seed, config.train_loader.dataset.local, config.model.max_seq_len) == (4, "other", 64)


def test_the_layout_with_variables_needs_no_note(write: Callable[..., str]) -> None:
    text = FIRST.replace("data_local: ./c4\ndata_remote:", "variables: {data_local: ./c4, data_remote: }")
    text = text.replace("global_seed: 23\n", "").replace("${data_", "${variables.data_")
    text = text.replace("${global_seed}", "17")
    assert load_train_config(write(text=text))[1] == []


def test_a_name_at_the_top_that_nothing_refers_to_is_an_unknown_key(
    problems: Callable[..., tuple[str, ...]],
) -> None:
    assert problems("my_rate: 3") == (
        "run.yaml:25: my_rate: unknown key. `mptfoundry explain` lists all keys.",
    )


@pytest.mark.parametrize(
    ("line", "note", "read"),
    [
        ("mlp_ratio: 2", "model.mlp_ratio is now model.expansion_ratio.", lambda m: m.expansion_ratio == 2),
        (
            "param_init_fn: small_init_",
            "model.param_init_fn is now model.init_config.name.",
            lambda m: m.init_config.name == "small_init_",
        ),
        ("attn_pdrop: 0.1", "model.attn_pdrop is now", lambda m: m.attn_config.attn_pdrop == 0.1),
        ("attn_clip_qkv: 6", "model.attn_clip_qkv is now", lambda m: m.attn_config.clip_qkv == 6.0),
        ("multiquery_attention: true", "model.multiquery_attention is now", lambda m: m.kv_heads == 1),
        ("emb_init_std: 0.02", "model.emb_init_std is now", lambda m: m.init_config.emb_init_std == 0.02),
        ("use_cache: true", "model.use_cache is left out: training never caches", lambda m: True),
        ("verbose: 2", "model.verbose is left out", lambda m: True),
        ("fc_type: te", "", None),
        ("fc_type: {name: torch}", "", lambda m: True),
        ("block_overrides: {order: []}", "", None),
    ],
)
def test_older_keys_of_the_model_are_moved_or_left_out_or_refused(
    write: Callable[..., str],
    problems: Callable[..., tuple[str, ...]],
    line: str,
    note: str,
    read: Callable[[object], bool] | None,
) -> None:
    text = SMALL.replace("  d_model: 64", f"  {line}\n  d_model: 64")
    if read is None:
        assert "is not supported: the blocks of a model are all alike" in problems(text=text)[0]
        return
    config, notes = load_train_config(write(text=text))
    assert read(config.model)
    assert [n.startswith(f"run.yaml:4: {note}") for n in notes] == ([True] if note else [])


def test_an_older_name_beside_the_newer_one_is_an_error(problems: Callable[..., tuple[str, ...]]) -> None:
    text = SMALL.replace("    alibi: true", "    alibi: true\n  alibi: true")
    assert problems(text=text) == (
        "run.yaml:9: model.alibi: is the older name of model.attn_config.alibi, which is also given. "
        "Remove one.",
    )


def test_the_first_name_of_the_model_is_understood(load: Load) -> None:
    assert load(text=SMALL.replace("mpt_causal_lm", "mosaic_gpt")).model.name == "mpt_causal_lm"


@pytest.mark.parametrize(
    ("more", "dtype"), [("", "int8"), ("quantize: false, compress_state_dict: true, ", "float32")]
)
def test_the_lion_in_8_bits_is_a_momentum_in_int8(write: Callable[..., str], more: str, dtype: str) -> None:
    lion = f"optimizer: {{name: decoupled_lionw_8b, {more}error_correction: false, lr: 1e-4}}\n"
    text = SMALL.replace("optimizer:\n  name: decoupled_lionw\n  lr: 1e-4\n", lion)
    config, (note,) = load_train_config(write(text=text))
    assert isinstance(config.optimizer, DecoupledLionWConfig) and config.optimizer.momentum_dtype == dtype
    assert note.endswith(f"decoupled_lionw_8b is now decoupled_lionw with momentum_dtype: {dtype}.")


def test_error_correction_of_the_lion_in_8_bits_is_refused(problems: Callable[..., tuple[str, ...]]) -> None:
    words = ("optimizer={name: decoupled_lionw_8b, lr: 1e-4, error_correction: true}",)
    (problem,) = problems(words=words)
    assert "error_correction: is not supported: momentum_dtype int8 has none" in problem


def test_low_precision_layernorm_is_what_the_model_has_already(
    write: Callable[..., str], problems: Callable[..., tuple[str, ...]]
) -> None:
    line = "algorithms: {low_precision_layernorm: {}}"
    config, notes = load_train_config(write(line))
    assert config.algorithms.gradient_clipping is None
    assert "model.norm_type is low_precision_layernorm already" in notes[0]
    assert "Set model.norm_type" in problems(line, words=("model.norm_type=layernorm",))[0]


@pytest.mark.parametrize(
    "line",
    [
        "icl_tasks:",
        "tp_config: null",
        "profiler:",
        "only_hf_checkpoint: false",
        "python_log_level:",
        "eval_gauntlet: null",
        "icl_seq_len: null",
        "icl_subset_num_batches:",
        "spin_dataloaders:",
        "algorithms: {alibi: null}",
        "algorithms: {gradient_clipping: null}",
    ],
)
def test_what_is_blank_or_off_needs_no_word(write: Callable[..., str], line: str) -> None:
    assert load_train_config(write(line))[1] == []


@pytest.mark.parametrize(
    "key",
    [
        "train_loader.prefetch_factor",
        "train_loader.dataset.predownload",
        "train_loader.dataset.epoch_size",
        "train_loader.dataset.num_canonical_nodes",
        "train_loader.dataset.stream_config",
        "model.attn_config",
        "model.attn_config.kv_n_heads",
        "model.attn_config.attn_temperature_tuning",
        "model.ffn_config",
        "model.init_config",
        "model.attention_bias",
        "save_ignore_keys",
        "save_latest_filename",
        "load_path",
        "metadata",
        "callbacks",
        "loggers",
        "algorithms",
        "compile_config",
        "fsdp_config",
    ],
)
def test_null_is_the_default_where_llm_foundry_allows_it(write: Callable[..., str], key: str) -> None:
    config, notes = load_train_config(write(), [f"{key}=null", "train_loader.num_workers=0"])
    assert notes == [] and config.train_loader.prefetch_factor == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tp_config: {strategy: ffn}", "tp_config: is not supported: Composer's tensor parallelism fails"),
        ("profiler: {schedule: {}}", "profiler: is not supported"),
        ("freeze: [wte]", "freeze: is not supported: patterns in optimizer.disable_grad"),
        ("parameters: {seed: 1}", "parameters: is not supported: this is a platform's job file."),
        ("precision: amp_fp8", "precision: 'amp_fp8' is not supported"),
        ("fsdp_config: {device_mesh: [2]}", "fsdp_config.device_mesh: is not supported: give data_parallel"),
        (
            "eval_loader: {name: text_denoising, dataset: {}}",
            "eval_loader.name: 'text_denoising' is not supported",
        ),
        (
            "callbacks: {hf_checkpointer: {save_folder: a, save_interval: 1ep, mlflow_logging_config: {}}}",
            "callbacks.hf_checkpointer.mlflow_logging_config: unknown key",
        ),
        ("loggers: {mosaicml: {}}", "loggers.mosaicml: is not supported"),
        ("algorithms: {alibi: {}}", "algorithms.alibi: is not supported: it does nothing to an MPT."),
    ],
)
def test_what_llm_foundry_has_and_this_has_not_is_refused_with_the_reason(
    problems: Callable[..., tuple[str, ...]], line: str, said: str
) -> None:
    found = problems(line)
    assert len(found) == 1
    assert found[0].startswith(f"run.yaml:25: {said}")


def test_other_architectures_are_refused(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems(text=SMALL.replace("mpt_causal_lm", "hf_causal_lm"))
    assert said[0].startswith("run.yaml:3: model.name: 'hf_causal_lm' is not supported: name the MPT")


def test_what_moves_into_no_section_does_not_replace_it(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems("data_local: x", "variables: 5", words=("model.attn_config=7", "model.attn_impl=torch"))
    assert [text.partition(": ")[2] for text in said] == [
        "variables: 5 is not allowed here. Expected a section of names.",
        "model.attn_config=7: 7 is not allowed here. Expected a section.",
    ]
