"""Every recipe in configs/ is what it says it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.flops import count_parameters

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# The published models as published; the others are the same architecture at their size.
PARAMETERS = {
    "mpt-tiny": 4_196_608,
    "mpt-125m": 123_685_632,
    "mpt-350m": 353_682_432,
    "mpt-760m": 757_016_064,
    "mpt-1b": 1_311_344_640,
    "mpt-3b": 2_645_854_720,
    "mpt-7b": 6_649_286_656,
    "mpt-13b": 12_841_538_560,
    "mpt-30b": 29_957_200_896,
    "mpt-30b-8k": 29_957_200_896,
    "mpt-70b": 64_838_967_296,
    "mpt-text-classification": 4_197_120,
    "mpt-token-classification": 4_197_893,
    "mpt-question-answering": 4_197_122,
    "mpt-7b-instruct": 6_649_286_656,
    "mpt-7b-instruct-lora": 6_649_286_656,
    "mpt-7b-chat": 6_649_286_656,
    "mpt-7b-storywriter": 6_649_286_656,
    "mpt-30b-instruct": 29_957_200_896,
    "mpt-30b-chat": 29_957_200_896,
    "finetune-demo": 4_196_608,
}
# A record for each head's loader.
RECORDS: dict[str, dict[str, Any]] = {
    "mpt-text-classification": {"text": "def f(x):", "label": "code"},
    "mpt-token-classification": {"words": ["def", "f", "(", ")"], "labels": ["keyword", "name", 2, 2]},
    "mpt-question-answering": {
        "question": "Which?",
        "context": "def f(x):",
        "answers": {"text": ["f"], "answer_start": [4]},
    },
}
TINY = MPTConfig(d_model=32, n_heads=4, n_layers=2, no_bias=True, attn_config=AttnConfig(alibi=True))
SHRUNK = ["model.d_model=32", "model.n_heads=4", "model.n_layers=2", "model.vocab_size=64"]
SHRUNK += ["model.pretrained_model_name_or_path=null", "model.config_overrides=null"]


def each(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_it_loads_without_a_note(path: Path) -> None:
    config, notes = load_train_config(path)
    assert notes == []
    assert config.run_name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_it_has_its_published_size(path: Path) -> None:
    assert count_parameters(load_train_config(path)[0].model) == PARAMETERS[path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_it_is_an_mpt_as_published(path: Path) -> None:
    model = load_train_config(path)[0].model
    assert model.no_bias and model.attn_config.alibi and model.tie_word_embeddings
    assert model.norm_type == "low_precision_layernorm" and model.init_config.name == "kaiming_normal_"


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_the_shares_of_its_data_make_one(path: Path) -> None:
    streams = load_train_config(path)[0].train_loader.dataset.sources.values()
    shares = [stream.proportion for stream in streams if stream.proportion is not None]
    assert not shares or (len(shares) == len(streams) and sum(shares) == pytest.approx(1, abs=1e-9))


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_it_leaves_the_hardware_to_auto(path: Path) -> None:
    config = load_train_config(path)[0]
    assert config.precision == config.device_train_microbatch_size == "auto"
    assert config.model.attn_config.attn_impl == config.model.loss_fn == "auto"
    assert config.fsdp_config is None or config.fsdp_config.version == "auto"


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_a_small_one_of_its_kind_is_built(path: Path) -> None:
    from mptfoundry.mpt.heads import make_network

    model = load_train_config(path, [*SHRUNK, "model.peft_config=null"])[0].model
    network = make_network(model.network(), device="meta")
    assert sum(p.numel() for p in network.parameters()) == count_parameters(model)


@pytest.mark.parametrize("path", CONFIGS, ids=each)
def test_a_small_one_of_its_kind_trains_on_a_cpu(
    path: Path, shards: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    from mptfoundry.run.metrics_file import read_rows
    from mptfoundry.train import train

    recipe, _ = load_train_config(path)
    words = [*SHRUNK, "model.vocab_size=512", "max_seq_len=32", f"tokenizer.name={shards}/tokenizer"]
    words += ["max_duration=2ba", "global_train_batch_size=8", "log_to_console=false", "load_path=null"]
    words += ["save_interval=2ba", "eval_interval=2ba", "eval_subset_num_batches=1"]
    words.append(f"save_folder={tmp_path}/{{run_name}}")
    words += data_of_its_kind(recipe, shards, tmp_path)
    if recipe.model.peft_config is not None:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'mptfoundry[peft]'")
        base = write_run(replace(TINY, vocab_size=512, max_seq_len=32), name="base")
        words.append(f"model.pretrained_model_name_or_path={base}")
    config, _ = load_train_config(path, words)
    train(config)
    rows = list(read_rows(tmp_path / path.stem / "metrics.jsonl"))
    assert [row["batch"] for row in rows if "loss" in row] == [1, 2]
    assert any("eval" in row for row in rows)


def data_of_its_kind(recipe: TrainConfig, shards: Path, folder: Path) -> list[str]:
    """Words that point a recipe's loaders at small data."""
    if recipe.train_loader.name == "labelled":
        (folder / "examples.jsonl").write_text((json.dumps(RECORDS[recipe.run_name]) + "\n") * 16)
        loaders = ("train_loader", "eval_loader")
        return [
            f"{name}.dataset.{key}"
            for name in loaders
            for key in (f"local={folder}/examples.jsonl", "split=null", f"cache_folder={folder}/cache")
        ]
    if recipe.train_loader.name == "finetuning":
        record = json.dumps({"prompt": "def", "response": " f(x):"}) + "\n"
        (folder / "records.jsonl").write_text(record * 64)
        here = [f"train_loader.dataset.streams.{name}" for name in recipe.train_loader.dataset.streams or ()]
        words = [
            f"{key}.{said}"
            for key in (*(here or ["train_loader.dataset"]), "eval_loader.dataset")
            for said in (f"local={folder}/records.jsonl", "hf_name=null")
        ]
        caches = [f"{name}.dataset.cache_folder={folder}/cache" for name in ("train_loader", "eval_loader")]
        return words + caches
    words = []
    names = recipe.train_loader.dataset.streams
    here = [f"train_loader.dataset.streams.{name}" for name in names] if names else ["train_loader.dataset"]
    loaders = recipe.eval_loader if isinstance(recipe.eval_loader, tuple) else (recipe.eval_loader,)
    several = isinstance(recipe.eval_loader, tuple)
    here += [f"eval_loader.{i}.dataset" if several else "eval_loader.dataset" for i in range(len(loaders))]
    for number, key in enumerate(here):  # streaming wants a folder of its own for each stream
        (folder / str(number)).symlink_to(shards / "a")
        words += [f"{key}.local={folder / str(number)}", f"{key}.remote=null"]
    return words


def test_storywriter_is_mpt_7b_with_what_long_rows_need() -> None:
    config = load_train_config(CONFIGS[0].parent / "mpt-7b-storywriter.yaml")[0]
    attention = config.model.attn_config
    assert (config.max_seq_len, attention.alibi_bias_max, attention.clip_qkv) == (65536, 16, 6)
    assert config.max_duration == "2500ba"
    assert config.fsdp_config is not None and config.fsdp_config.activation_checkpointing


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-30b"])
def test_the_published_mix_and_batch_are_kept(name: str) -> None:
    config = load_train_config(CONFIGS[0].parent / f"{name}.yaml")[0]
    assert len(config.train_loader.dataset.sources) == 10
    assert config.global_train_batch_size == 1760
    assert config.max_duration == "1000000000000tok"


def test_every_recipe_is_short() -> None:
    assert {path.stem for path in CONFIGS} >= set(PARAMETERS)
    assert all(path.read_text().count("\n") <= 65 for path in CONFIGS)
