"""What an error advises is accepted by the next check."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.check import check
from mptfoundry.config.load import load_train_config, parse_words
from mptfoundry.config.verbs import (
    ChatConfig,
    CompareConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    PreviewConfig,
)
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.config import AttnConfig, MPTConfig

CONFIG = Path(__file__).parents[2] / "configs" / "mpt-tiny.yaml"
REMOVED = "~"
DATA = "train_loader.dataset"
CODE = f"{DATA}.streams.code"
FLASH = "model.attn_config.attn_impl=flash"
ONE = f"{DATA}.streams=null"
LION = "optimizer.name=decoupled_lionw"
TWO_EVALUATIONS = "eval_loader=[{{label: a, dataset: {{local: x}}}}, {{label: {}, dataset: {{local: y}}}}]"
TUNED = [ONE, "train_loader.name=finetuning", f"{DATA}.local=x.jsonl"]

# What breaks the config, what the error advises, and that advice as words; `~KEY` takes a word back.
CASES = [
    (["model.d_model=258"], "Use a multiple of 8, or set head_dim", ["model.d_model=264"]),
    (["model.d_model=258"], "set head_dim", ["model.head_dim=64"]),
    (["model.d_model=0"], "Use 1 or more", ["model.d_model=8"]),
    (["model.expansion_ratio=0.3"], "not a whole number", ["model.expansion_ratio=0.5"]),
    (["model.attn_config.rope=true"], "A model has one of them", ["model.attn_config.alibi=false"]),
    (
        ["model.attn_config.attn_type=grouped_query_attention"],
        "needs kv_n_heads",
        ["model.attn_config.kv_n_heads=2"],
    ),
    (["model.attn_config.kv_n_heads=2"], "only grouped_query_attention takes it", ["~model.attn"]),
    (
        ["model.attn_config.sliding_window_size=-2"],
        "Use -1 for none",
        ["model.attn_config.sliding_window_size=-1"],
    ),
    (
        ["model.attn_config.attn_pdrop=1"],
        "Use 0 or more and less than 1",
        ["model.attn_config.attn_pdrop=0.5"],
    ),
    (["model.embedding_fraction=0"], "Use a number in (0, 1]", ["model.embedding_fraction=1"]),
    (["model.init_config.name=baseline_"], "needs init_std", ["model.init_config.init_std=0.02"]),
    (["model.vocab_size=-1"], "Use 1 or more", ["model.vocab_size=4096"]),
    ([FLASH, "precision=fp32"], "Use auto or torch", ["model.attn_config.attn_impl=auto"]),
    ([FLASH, "precision=fp32"], "Use auto or torch", ["model.attn_config.attn_impl=torch"]),
    (["optimizer.lr=-1"], "such as 1e-4", ["optimizer.lr=1e-4"]),
    (["optimizer.lrr=1"], "Did you mean lr?", ["~optimizer.lrr", "optimizer.lr=1"]),
    (["optimizer.betas=[1,1]"], "0 or more and less than 1", ["optimizer.betas=[0,0.9]"]),
    ([LION, "optimizer.param_groups=[{param_str_match: wte, eps: 1e-8}]"], "Remove it", ["~optimizer.param"]),
    (["optimizer.disable_grad=['.']"], "Leave at least one trainable", ["optimizer.disable_grad=[wte]"]),
    (["optimizer.name=clip_lion"], "decoupled_lionw with algorithms.gradient_clipping", [LION]),
    (["scheduler.t_max=1ba"], "Use 1dur", ["scheduler.t_max=1dur"]),
    (["max_duration=0ba"], "Use more than 0", ["max_duration=1ba"]),
    (["max_duration=1dur"], "Use batches, tokens or epochs", ["max_duration=3ep"]),
    (["max_duration=5x"], "such as 1000ba (batches), 2ep (epochs)", ["max_duration=1000ba"]),
    (["max_duration=5x"], "1000000tok (tokens)", ["max_duration=1000000tok"]),
    (["eval_subset_num_batches=0"], "Use -1 for all of them", ["eval_subset_num_batches=-1"]),
    (["seed=-1"], "Use 0 or more", ["seed=0"]),
    (["model.max_seq_len=100"], "Remove it, or make them equal", ["model.max_seq_len=256"]),
    (["tokenizer.kwargs.model_max_length=1"], "Remove it", ["~tokenizer"]),
    (["device_train_microbatch_size=0"], "Use 1 or more", ["device_train_microbatch_size=1"]),
    (["autoresume=true", "save_folder=null"], "needs save_folder", ["save_folder=x"]),
    (
        ["autoresume=true", "save_weights_only=true"],
        "Set save_weights_only: false",
        ["save_weights_only=false"],
    ),
    (
        ["save_filename=a/b.pt"],
        "Name the folder in save_folder",
        ["save_filename=ep{epoch}-ba{batch}.pt", "save_folder=a"],
    ),
    (
        ["save_filename='b{batch}.tar'"],
        "use .pt",
        ["save_filename='b{batch}.pt'", "save_num_checkpoints_to_keep=-1"],
    ),
    (["save_folder='x/{epoch}'"], "Allowed: {run_name}", ["save_folder='x/{run_name}'"]),
    (["fsdp_config={auto_wrap: false}"], "Remove it", ["fsdp_config.auto_wrap=null"]),
    (
        ["fsdp_config={cpu_offload: true}"],
        "or fsdp_config.activation_cpu_offload",
        ["fsdp_config={activation_cpu_offload: true, cpu_offload: null}"],
    ),
    (
        ["fsdp_config={load_monolith_rank0_only: true, state_dict_type: sharded}"],
        "Set state_dict_type: full",
        ["fsdp_config.state_dict_type=full"],
    ),
    (
        ["fsdp_config={sharding_strategy: NO_SHARD, state_dict_type: sharded}"],
        "Set it to full",
        ["fsdp_config.state_dict_type=full"],
    ),
    (
        ["fsdp_config={sharding_strategy: NO_SHARD, mixed_precision: PURE}"],
        "Remove it",
        ["fsdp_config.mixed_precision=DEFAULT"],
    ),
    (
        ["fsdp_config={forward_prefetch_limit: 2}"],
        "without forward_prefetch: true",
        ["fsdp_config.forward_prefetch=true"],
    ),
    (
        ["fsdp_config={state_dict_type: full, load_monolith_rank0_only: true}", "model.init_device=meta"],
        "Use mixed",
        ["model.init_device=mixed"],
    ),
    (
        ["model.activation_checkpointing_target=mlp"],
        "Set one",
        ["fsdp_config.activation_checkpointing=true"],
    ),
    (["compile_config={mode: default, options: {a: 1}}"], "takes one of them", ["~compile"]),
    ([f"{DATA}.local=x"], "Use one of them", [ONE]),
    ([ONE], "Say where the shards lie", [f"{DATA}.local=x"]),
    (
        [f"{CODE}.repeat=2"],
        "Use one of them",
        [f"{DATA}.streams.{name}.proportion=null" for name in ("code", "docstrings", "documentation")],
    ),
    (
        [f"{DATA}.eos_token_id=0", f"{DATA}.bos_token_id=0"],
        "One of them separates documents",
        [f"{DATA}.bos_token_id=null"],
    ),
    ([f"{DATA}.eos_token_id=9999999"], "is not one of the", [f"{DATA}.eos_token_id=0"]),
    (
        ["model.attn_config.attn_uses_sequence_id=true"],
        "needs eos_token_id or bos_token_id",
        [f"{DATA}.eos_token_id=0", "eval_loader=null"],
    ),
    ([f"{DATA}.cache_limit=many"], "such as 1000000 or 100gb", [f"{DATA}.cache_limit=100gb"]),
    ([f"{DATA}.epoch_size=many"], "such as 10000 or 64M", [f"{DATA}.epoch_size=64M"]),
    ([f"{DATA}.verify=off", f"{DATA}.validate_hash=sha1"], "Remove one of them", [f"{DATA}.verify=lazy"]),
    (["train_loader.prefetch_factor=0"], "Use 1 or more", ["train_loader.prefetch_factor=1"]),
    (["code_paths=[a.py]"], "allow_code=true on the command line", ["allow_code=true"]),
    (["load_path=a.tar"], "use .pt", ["load_path=a.pt"]),
    (
        ["callbacks.generate_callback={prompts: [a], interval: 1ba, top_k: -1}"],
        "Use 0 for all",
        ["callbacks.generate_callback.top_k=0"],
    ),
    (
        ["algorithms.alibi={}"],
        "Set model.attn_config.alibi: true",
        ["~algorithms", "model.attn_config.alibi=true"],
    ),
    (["model.name=hf_causal_lm"], "pretrained_model_name_or_path", ["model.name=mpt_causal_lm"]),
    (["model.revision=a"], "no effect without pretrained_model_name_or_path", ["~model"]),
    (
        ["model.load_in_8bit=true"],
        "Add adapters: peft_config",
        ["model.peft_config={r: 4}", "load_path=x", "load_weights_only=true", "optimizer.disable_grad=[]"],
    ),
    (
        ["model.peft_config={r: 4}"],
        "or in load_path with load_weights_only: true",
        ["load_path=x", "load_weights_only=true"],
    ),
    (
        ["model.peft_config={r: 4, target_modules: [qkv]}", "load_path=x", "load_weights_only=true"],
        "or all-linear alone",
        ["model.peft_config.target_modules=[all-linear]"],
    ),
    (["allow_changes=[lr]"], "is not a key of a run", ["allow_changes=[optimizer.lr]"]),
    (["mystery=1"], "`mptfoundry explain` lists all keys", ["~mystery"]),
]

MORE = [
    # Sizes and the network.
    (["seed=99999999999"], "too large", ["seed=4294967295"]),
    (["dist_timeout=0"], "Use 1 or more", ["dist_timeout=1"]),
    (["train_subset_num_batches=0"], "Use -1 for all of them", ["train_subset_num_batches=-1"]),
    (["device_eval_batch_size=0"], "Use 1 or more", ["device_eval_batch_size=1"]),
    (["save_interval=0ba"], "Use more than 0", ["save_interval=1ba"]),
    (["model.n_layers=1000000000"], "Use 10000 or less", ["model.n_layers=100"]),
    (["model.logit_scale=[1]"], "Expected", ["model.logit_scale=1"]),
    (["model.resid_pdrop=2"], "Use 0 or more and less than 1", ["model.resid_pdrop=0"]),
    (
        ["model.ffn_config={ffn_type: mptmlp, ffn_act_fn: {name: relu, approximate: tanh}}"],
        "Remove it",
        ["~model"],
    ),
    (
        ["model.init_config={emb_init_std: 1, emb_init_uniform_lim: 1}"],
        "Use one of them",
        ["model.init_config.emb_init_std=null"],
    ),
    (
        ["model.attn_config={alibi: false, rope: true, rope_hf_config: {type: linear, factor: 0.5}}"],
        "Use 1 or more",
        ["model.attn_config.rope_hf_config.factor=1"],
    ),
    (["model.attn_config.kv_dim=1"], "Remove it", ["~model"]),
    # The optimizer and the schedule.
    (["optimizer.weight_decay=-1"], "Use 0 or more", ["optimizer.weight_decay=0"]),
    (["optimizer={name: decoupled_adamw, lr: 1, eps: 0}"], "such as 1e-8", ["optimizer.eps=1e-8"]),
    (["optimizer.name=adalr_lion"], "use decoupled_lionw", [LION]),
    (["optimizer.name=decoupled_lion"], "Did you mean decoupled_lionw?", [LION]),
    (
        ["scheduler={name: linear_decay_with_warmup, t_warmup: 200ba, t_max: 100ba}"],
        "Use 1dur",
        ["scheduler.t_max=1dur"],
    ),
    # The data.
    (["train_loader.num_workers=-1"], "Use 0 or more, or auto", ["train_loader.num_workers=0"]),
    (["train_loader.num_workers=-1"], "Use 0 or more, or auto", ["train_loader.num_workers=auto"]),
    (["train_loader.sampler=x"], "Remove it", ["~train_loader"]),
    (["train_loader.batch_size=1"], "Remove it", ["~train_loader"]),
    ([f"{DATA}.mlm_probability=0.5"], "Remove it", ["~train_loader"]),
    ([f"{DATA}.predownload=-1"], "Use", [f"{DATA}.predownload=8"]),
    ([f"{CODE}.proportion=-1"], "Use 0 or more", [f"{CODE}.proportion=0"]),
    (
        [f"{CODE}.proportion=null"],
        "Give it to all or none",
        [f"{CODE}.proportion=0.6"],
    ),
    ([f"{DATA}.max_seq_len=100"], "Remove it, or make them equal", [f"{DATA}.max_seq_len=256"]),
    (
        [TWO_EVALUATIONS.format("a")],
        "Use a label of its own",
        [TWO_EVALUATIONS.format("b")],
    ),
    ([*TUNED, f"{DATA}.packing_ratio=0.5"], "Use auto", [f"{DATA}.packing_ratio=auto"]),
    ([*TUNED, f"{DATA}.max_bad_records=-1"], "Use 0 or more", [f"{DATA}.max_bad_records=0"]),
    (
        [*TUNED, f"{DATA}.pad_to_longest=true"],
        "use allow_pad_trimming",
        ["~train_loader.dataset", f"{DATA}.allow_pad_trimming=true"],
    ),
    ([*TUNED, f"{DATA}.hf_name=x"], "Use one of them", [f"{DATA}.hf_name=null"]),
    ([*TUNED, f"{DATA}.hf_kwargs={{name: x}}"], "Remove it", ["~train_loader.dataset"]),
    (
        [ONE, f"{DATA}.split=null", f"{DATA}.local=x.jsonl", "train_loader.name=labelled"],
        "Use text",
        ["train_loader.name=text"],
    ),
    # Checkpoints, devices and the rest.
    (["run_name=../x"], "Use", ["run_name=x"]),
    (["save_filename='model.pt'"], "Use", ["save_filename='ep{epoch}-ba{batch}-rank{rank}.pt'"]),
    (["save_filename='x{epoch'"], "brace", ["save_filename='ep{epoch}-ba{batch}-rank{rank}.pt'"]),
    (
        ["save_filename='ep{epoch}-ba{batch}.pt'", "save_latest_filename='ep{epoch}-ba{batch}.pt'"],
        "Use another",
        ["save_latest_filename=latest.pt"],
    ),
    (
        ["fsdp_config={sharding_strategy: FULL_SHARD, reshard_after_forward: false}"],
        "Give one of them",
        ["fsdp_config.reshard_after_forward=null"],
    ),
    (
        ["fsdp_config={sharding_strategy: NO_SHARD, data_parallel_shard_degree: 2}"],
        "Remove one of them",
        ["fsdp_config.data_parallel_shard_degree=null"],
    ),
    (
        ["fsdp_config={forward_prefetch: true, forward_prefetch_limit: 0}"],
        "Use 1 or more",
        ["fsdp_config.forward_prefetch_limit=1"],
    ),
    (["fsdp_config.min_params=1"], "Remove it", ["~fsdp"]),
    (
        ["model.activation_checkpointing_target=everything", "fsdp_config={activation_checkpointing: true}"],
        "Use",
        ["model.activation_checkpointing_target=block"],
    ),
    (["profiler={}"], "Remove it", ["~profiler"]),
    (["models=[]"], "Remove it", ["~models"]),
    (
        ["model.peft_config={r: 0}", "load_path=x", "load_weights_only=true"],
        "Use 1 or more",
        ["model.peft_config.r=1"],
    ),
    (
        ["model.peft_config={lora_alpha: 0}", "load_path=x", "load_weights_only=true"],
        "Use r, or twice as much",
        ["model.peft_config.lora_alpha=16"],
    ),
    (
        ["model.peft_config={target_modules: []}", "load_path=x", "load_weights_only=true"],
        "all-linear",
        ["model.peft_config.target_modules=[all-linear]"],
    ),
    (["model.peft_config={r: 4}", "load_path=x"], "Set load_weights_only: true", ["load_weights_only=true"]),
    (["seed='5'"], "Write it without quotes", ["seed=5"]),
    (["run_name=[a]"], "Put it in quotes", ["run_name='a'"]),
    (["precision=amp_bf61"], "Did you mean amp_bf16?", ["precision=fp32"]),
    (
        ["callbacks.speed_monitors={}"],
        "Did you mean speed_monitor?",
        ["~callbacks", "callbacks.speed_monitor={}"],
    ),
]

# The same for the options of the other verbs.
OF_VERBS: list[tuple[type, list[str], str, list[str]]] = [
    (PrepareConfig, ["engine=spark", "workers=2"], "Remove it", ["~workers"]),
    (PrepareConfig, ["workers=0"], "Use 1 or more", ["workers=1"]),
    (PrepareConfig, ["held_out=1.0"], "such as 0.01", ["held_out=0.01"]),
    (PrepareConfig, ["split=a/b"], "such as train", ["split=train"]),
    (PrepareConfig, ["held_out=0.1", "split=val"], "Use another", ["split=train"]),
    (PrepareConfig, ["compression=gz"], "Use one of br, bz2, snappy, zstd", ["compression=zstd:7"]),
    (PreviewConfig, ["samples=-1"], "Use 0 or more", ["samples=0"]),
    (PreviewConfig, ["picture=mix.doc"], "ends in .png", ["picture=mix.png"]),
    (EvalConfig, ["eval_subset_num_batches=0"], "Use -1 for all of them", ["eval_subset_num_batches=-1"]),
    (EvalConfig, ["max_seq_len=4y"], "or 2x or 4x", ["max_seq_len=4x", "positions=true"]),
    (EvalConfig, ["max_seq_len=4x"], "Add it", ["positions=true"]),
    (EvalConfig, ["needle={lengths: [8]}"], "of at least 32", ["needle={lengths: [32]}"]),
    (CompareConfig, ["picture=a.gif"], "ends in .png", ["picture=a.png"]),
    (CompareConfig, ["examples=-1"], "Use 0 or more", ["examples=0"]),
    (ExportConfig, ["adapter=separate", "format=native"], "Remove it", ["~format"]),
    (GenerateConfig, ["temperature=-1"], "Use 0 or more", ["temperature=0"]),
    (GenerateConfig, ["top_p=0"], "up to 1", ["top_p=1"]),
    (GenerateConfig, ["top_k=-1"], "Use 0 for all", ["top_k=0"]),
    (GenerateConfig, ["stop=['']"], "Remove it", ["~stop"]),
    (GenerateConfig, ["max_new_tokens=0"], "Use 1 or more", ["max_new_tokens=1"]),
    (GenerateConfig, ["system=x"], "use chat", ["~system"]),
    (ChatConfig, ["prompts=x"], "Remove it", ["~prompts"]),
]
NEEDED: dict[type, list[str]] = {
    PrepareConfig: ["inputs=a", "out=b", "tokenizer=c", "max_seq_len=8"],
    PreviewConfig: ["data=a"],
    CompareConfig: ["places=[a, b]"],
    EvalConfig: ["model=a", "eval_loader={name: text, dataset: {local: x}}"],
    ExportConfig: ["model=a", "out=b"],
    GenerateConfig: ["model=a"],
    ChatConfig: ["model=a"],
}


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: f"{' '.join(c[0])} -> {c[1]}")
def test_the_advice_of_an_error_is_accepted(case: tuple[list[str], str, list[str]]) -> None:
    broken, said, advised = case
    with pytest.raises(ConfigError) as refused:
        judge(broken)
    assert said in str(refused.value)
    taken_back = tuple(word[1:] for word in advised if word.startswith(REMOVED))
    kept = [word for word in broken if not taken_back or not word.startswith(taken_back)]
    judge([*kept, *(word for word in advised if not word.startswith(REMOVED))])


@pytest.mark.parametrize("case", OF_VERBS, ids=lambda c: f"{c[0].__name__} {' '.join(c[1])} -> {c[2]}")
def test_the_advice_of_a_verbs_error_is_accepted(case: tuple[type, list[str], str, list[str]]) -> None:
    schema, broken, said, advised = case
    with pytest.raises(ConfigError) as refused:
        parse_words([*NEEDED[schema], *broken], schema)
    assert said in str(refused.value)
    kept = [word for word in broken if f"{REMOVED}{word.partition('=')[0]}" not in advised]
    parse_words([*NEEDED[schema], *kept, *(word for word in advised if not word.startswith(REMOVED))], schema)


def judge(words: list[str]) -> None:
    """What `check` does, without the error of data that is not there."""
    check(load_train_config(CONFIG, words)[0])


def test_a_tokenizer_larger_than_a_pretrained_model_is_told_the_key_that_the_next_check_takes(
    write_run: Callable[..., Path], shards: Path, tiny_run: Path
) -> None:
    text = re.sub(
        r"model: \{.*?\}\}\n", "model: {name: mpt_causal_lm, PRETRAINED}\n", tiny_run.read_text(), flags=re.S
    )
    run = write_run(TINY_300)
    tiny_run.write_text(text.replace("PRETRAINED", f"pretrained_model_name_or_path: {run}"))
    words = ["max_seq_len=32"]
    with pytest.raises(
        ConfigError, match=r"config_overrides\.vocab_size: 300 is smaller .* Use (\d+) or more"
    ) as error:
        check(load_train_config(tiny_run, words)[0])
    found = re.search(r"^(\S+): .*Use (\d+) or more; (\d+) is a multiple", str(error.value))
    assert found is not None
    for size in (found[2], found[3]):
        check(load_train_config(tiny_run, [*words, f"{found[1]}={size}"])[0])


TINY_300 = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=32,
    vocab_size=300,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)
