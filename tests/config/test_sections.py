"""The rules of the single sections: data, optimizer, schedule, parallelism."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from mptfoundry.config.data import StreamConfig, TextDatasetConfig, TextLoaderConfig
from mptfoundry.config.engine.durations import parse_duration
from mptfoundry.config.engine.forms import parse_bytes, parse_count
from mptfoundry.config.engine.schema import field_types
from mptfoundry.config.optim import (
    DecoupledLionWConfig,
    GradientClippingConfig,
    InvSqrtWithWarmupConfig,
    ParamGroupConfig,
    WarmupStableDecayConfig,
)
from mptfoundry.config.parallel import CompileConfig, FSDPConfig, replicas_and_shards
from mptfoundry.errors import ConfigError
from mptfoundry.optim.schedules import DECAYS


def _source(package: str, *parts: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], *parts).read_text(encoding="utf-8")


def _class(source: str, name: str) -> ast.ClassDef:
    return next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)


def _constructor(source: str, name: str) -> set[str]:
    init = next(
        n for n in _class(source, name).body if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    )
    return {a.arg for a in [*init.args.args, *init.args.kwonlyargs]} - {"self"}


def _attributes(source: str, name: str) -> set[str]:
    body = _class(source, name).body
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def test_streams_take_what_streaming_takes() -> None:
    assert set(field_types(StreamConfig)) == _constructor(_source("streaming", "base", "stream.py"), "Stream")


def test_text_data_sets_take_what_streaming_takes_and_what_reads_tokens() -> None:
    theirs = _constructor(_source("streaming", "base", "dataset.py"), "StreamingDataset")
    given_by_the_run = {"batch_size", "stream_name", "stream_config", "kwargs"}
    ours = {"max_seq_len", "token_encoding_type", "eos_token_id", "bos_token_id", "verify"}
    ours |= {"special_tokens"}
    assert set(field_types(TextDatasetConfig)) == (theirs - given_by_the_run) | ours


def test_fsdp_has_the_keys_of_both_of_composers_classes_but_for_objects() -> None:
    source = _source("composer", "utils", "parallelism.py")
    theirs = _attributes(source, "FSDPConfig") | _attributes(source, "FSDP2Config")
    objects = {"device_mesh", "ignored_modules", "process_group", "load_planner", "save_planner"}
    named = {name for name in theirs if not name.startswith("_")}
    assert set(field_types(FSDPConfig)) == (named - objects) | {"version"}


def test_what_only_the_first_fsdp_can_do_is_refused_by_name_with_what_helps() -> None:
    for keys, help_ in (
        (
            {"cpu_offload": True},
            r"cpu_offload: true is only in PyTorch's first FSDP.* LoRA \(model.peft_config\)",
        ),
        ({"activation_checkpointing_reentrant": True}, "with the same numbers. Remove it"),
        ({"backward_prefetch": "BACKWARD_POST"}, "BACKWARD_PRE. Remove it"),
        ({"auto_wrap": False}, "block by block"),
        ({"keep_low_precision_grads": True}, "More shards"),
        ({"sharded_ckpt_prefix_dir": "mine"}, "by their name"),
    ):
        for version in ("auto", 1, 2):
            with pytest.raises(ValueError, match=help_):
                FSDPConfig(version=version, **keys)  # type: ignore[arg-type]


def test_keys_of_the_first_fsdp_that_say_what_fsdp2_does_are_accepted() -> None:
    FSDPConfig(
        version=1,
        limit_all_gathers=True,
        activation_checkpointing_reentrant=False,
        sync_module_states=True,
        use_orig_params=False,
        auto_wrap=True,
        backward_prefetch="BACKWARD_PRE",
        cpu_offload=False,
        keep_low_precision_grads=False,
        verbose=True,
    )


def test_sharding_strategy_and_reshard_after_forward_say_the_same() -> None:
    assert FSDPConfig(sharding_strategy="SHARD_GRAD_OP").reshards is False
    assert FSDPConfig(sharding_strategy="_HYBRID_SHARD_ZERO2").reshards is False
    assert FSDPConfig(sharding_strategy="HYBRID_SHARD").reshards is FSDPConfig().reshards is True
    assert FSDPConfig(reshard_after_forward=4).reshards == 4
    with pytest.raises(ValueError, match="Give one of them"):
        FSDPConfig(sharding_strategy="FULL_SHARD", reshard_after_forward=False)


def mesh(devices: int = 8, per_node: int = 4, **keys: Any) -> tuple[int, int]:
    return replicas_and_shards(FSDPConfig(**keys), devices=devices, per_node=per_node)


@pytest.mark.parametrize(
    ("keys", "replicas", "shards"),
    [
        ({}, 1, 8),
        ({"sharding_strategy": "HYBRID_SHARD"}, 2, 4),
        ({"sharding_strategy": "HYBRID_SHARD", "data_parallel_replicate_degree": 4}, 4, 2),
        ({"data_parallel_shard_degree": 2}, 4, 2),
        ({"data_parallel_shard_degree": -1, "data_parallel_replicate_degree": 2}, 2, 4),
        ({"sharding_strategy": "NO_SHARD"}, 8, 1),
    ],
)
def test_a_hybrid_has_replicas_of_shards_by_default_one_a_node(
    keys: dict[str, Any], replicas: int, shards: int
) -> None:
    assert mesh(**keys) == (replicas, shards)


def test_a_hybrid_on_one_node_is_fully_sharded() -> None:
    assert mesh(devices=4, sharding_strategy="HYBRID_SHARD") == (1, 4)


@pytest.mark.parametrize("keys", [{"data_parallel_shard_degree": 3}, {"data_parallel_replicate_degree": 16}])
def test_replicas_and_shards_have_to_make_the_devices(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="are not the 8 devices of this run"):
        mesh(**keys)
    with pytest.raises(ConfigError, match="shards nothing"):
        mesh(data_parallel_shard_degree=1)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"state_dict_type": "sharded"}, "no shards to save"),
        ({"mixed_precision": "PURE"}, r"only applies to shards, and NO_SHARD has none \(DDP\)"),
        ({"forward_prefetch": True}, "only applies to shards"),
        ({"data_parallel_shard_degree": 4}, "cuts nothing"),
    ],
)
def test_no_shard_has_no_words_about_shards(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FSDPConfig(sharding_strategy="NO_SHARD", **keys)


def test_prefetch_counts_blocks() -> None:
    keys: dict[str, Any] = {"forward_prefetch": True, "forward_prefetch_limit": 2}
    assert FSDPConfig(**keys, backward_prefetch_limit=3).prefetched_blocks == (2, 3)
    assert FSDPConfig(forward_prefetch=True, backward_prefetch="BACKWARD_PRE").prefetched_blocks == (1, 1)
    assert FSDPConfig().prefetched_blocks == (0, 0)
    with pytest.raises(ValueError, match="no effect without forward_prefetch"):
        FSDPConfig(forward_prefetch_limit=2)
    with pytest.raises(ValueError, match="backward_prefetch_limit: 0 is too small"):
        FSDPConfig(backward_prefetch_limit=0)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ({}, "is empty"),
        (
            {"a": StreamConfig(local="x", proportion=1), "b": StreamConfig(local="y")},
            "b lacks the proportion",
        ),
        ({"a": StreamConfig(local="x", proportion=0)}, "all proportions are 0"),
        (
            {"a": StreamConfig(local="x", proportion=1), "b": StreamConfig(local="y", repeat=2)},
            "b lacks the proportion",
        ),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(streams: dict[str, StreamConfig], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextDatasetConfig(streams=streams)


def test_a_data_set_has_one_kind_of_source() -> None:
    with pytest.raises(ValueError, match="Say where the shards lie"):
        TextDatasetConfig()
    with pytest.raises(ValueError, match="Use one of them"):
        TextDatasetConfig(local="x", streams={"a": StreamConfig(local="y")})
    with pytest.raises(ValueError, match="One of them separates documents"):
        TextDatasetConfig(local="x", eos_token_id=0, bos_token_id=1)
    with pytest.raises(ValueError, match="validate_hash: has no effect with verify: off"):
        TextDatasetConfig(local="x", verify="off", validate_hash="sha1")
    assert [*TextDatasetConfig(local="x", split="train").sources] == ["train"]


def test_a_stream_has_one_kind_of_share() -> None:
    with pytest.raises(ValueError, match="proportion and choose are both given"):
        StreamConfig(local="x", proportion=1, choose=2)
    with pytest.raises(ValueError, match="repeat: -1 is too small"):
        StreamConfig(local="x", repeat=-1)


def test_optimizers_refuse_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="betas"):
        DecoupledLionWConfig(lr=1e-4, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr: -1 is negative"):
        DecoupledLionWConfig(lr=-1)
    with pytest.raises(ValueError, match=r"param_groups\[0\].eps: decoupled_lionw has none"):
        DecoupledLionWConfig(lr=1, param_groups=(ParamGroupConfig(param_str_match="x", eps=1e-8),))
    with pytest.raises(ValueError, match=r"lr: 1e\+300 is too large\. Use 1000 or less"):
        DecoupledLionWConfig(lr=1e300)
    with pytest.raises(ValueError, match=r"^lr: 0 is not positive"):
        DecoupledLionWConfig(lr=0)
    with pytest.raises(ValueError, match=r"^weight_decay: 1. Use 0 or more and less than 1"):
        DecoupledLionWConfig(lr=1, weight_decay=1)
    with pytest.raises(ValueError, match=r"^param_groups\[0\].lr: 0 is not positive"):
        DecoupledLionWConfig(lr=1, param_groups=(ParamGroupConfig(param_str_match="x", lr=0),))
    with pytest.raises(ValueError, match="clipping_threshold: 0 is not positive"):
        GradientClippingConfig(clipping_type="norm", clipping_threshold=0)
    for rate in (
        {"lr": -1},
        {"lr": 1e300},
        {"weight_decay": 1e300},
        {"eps": 1e300},
        {"betas": (0.9, 1)},
        {"weight_decay": -1},
        {"eps": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(rate))):
            ParamGroupConfig(param_str_match="x", **rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer.momentum_dtype=float16",),
        ("optimizer.name=decoupled_adamw", "optimizer.momentum_dtype=bfloat16"),
        ("optimizer.momentum_dtype=int8", "model.d_model=96", "model.n_heads=4"),
    ],
)
def test_only_lion_stores_its_momentum_in_another_dtype(
    words: tuple[str, ...], problems: Callable[..., tuple[str, ...]]
) -> None:
    (problem,) = problems(words=words)
    assert "momentum_dtype" in problem, problem


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"predownload": 0}, "predownload: 0 is too small. Use 1 or more."),
        ({"num_canonical_nodes": 0}, "num_canonical_nodes: 0 is too small"),
        ({"shuffle_block_size": 0}, "shuffle_block_size: 0 is too small"),
        ({"download_retry": -1}, "download_retry: -1 is too small. Use 0 or more."),
        ({"cache_limit": "0gb"}, "cache_limit: 0gb is too small"),
        ({"epoch_size": 0}, "epoch_size: 0 is too small"),
    ],
)
def test_a_data_set_that_gives_no_samples_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        TextDatasetConfig(local="x", **options)
    assert said in str(error.value)


def test_a_loader_that_can_not_read_ahead_is_refused() -> None:
    for option, said in (
        ("num_workers", "-1 is negative"),
        ("timeout", "-1 is"),
        ("prefetch_factor", "-1 is"),
    ):
        with pytest.raises(ValueError, match=f"{option}: {said}"):
            TextLoaderConfig(dataset=TextDatasetConfig(local="x"), **{option: -1})  # type: ignore[arg-type]


def test_every_form_of_decay_that_a_config_takes_is_one_of_the_schedules() -> None:
    assert set(get_args(field_types(WarmupStableDecayConfig)["decay"])) == DECAYS.keys()


def test_the_inverse_square_root_is_not_counted_in_fractions_of_the_run() -> None:
    with pytest.raises(ValueError, match=r"t_scale: 0\.1dur is a fraction of the run"):
        InvSqrtWithWarmupConfig(t_warmup="1ba", t_scale="0.1dur", t_cooldown="1ba")
    with pytest.raises(ValueError, match="t_scale: 0ba is not positive"):
        InvSqrtWithWarmupConfig(t_warmup="1ba", t_scale="0ba", t_cooldown="1ba")


def test_compile_takes_a_mode_or_options() -> None:
    with pytest.raises(ValueError, match="mode and options"):
        CompileConfig(mode="default", options={"x": 1})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("10ba", (10, "ba")),
        ("1e12tok", (10**12, "tok")),
        ("1_000ba", (1000, "ba")),
        ("0.1dur", (0.1, "dur")),
        (".5dur", (0.5, "dur")),
        ("3EP", (3, "ep")),
        (2, (2, "ep")),
    ],
)
def test_durations_are_a_number_and_a_unit(text: int | str, parsed: tuple[float, str]) -> None:
    assert parse_duration(text) == parsed


@pytest.mark.parametrize("text", ["10", "ba", "10 batches", "1.5ba", "2dur", "-1ba", -1, ""])
def test_what_is_no_duration_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_sizes_are_in_units_of_1024_and_counts_in_units_of_1000() -> None:
    assert (parse_bytes("10kb"), parse_bytes(7), parse_bytes("1.5gb")) == (10240, 7, 3 * 2**29)
    assert (parse_count("64M"), parse_count("1.5k"), parse_count(3)) == (64_000_000, 1500, 3)
    with pytest.raises(ValueError, match="Expected a size"):
        parse_bytes("3 bananas")
