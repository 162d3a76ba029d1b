from __future__ import annotations

from pathlib import Path

import pytest

from mptfoundry.config.engine.schema import field_types, sections, walk_keys
from mptfoundry.config.load import load_train_config, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.run.changes import (
    MAKES_THE_RUN,
    MAY_CHANGE,
    allows_other_rows,
    changed_inputs,
    changes_since,
    listed_keys,
    refuse_changes,
)
from tests.conftest import TINY_RUN
from tests.marks import some_of

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("the config was changed", "17 keys", "refused with both values, or only shown"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A YAML of a run whose folder, beside it, has a `config.yaml`."""
    (tmp_path / "tiny.yaml").write_text(TINY_RUN.format(folder="/data", out="/runs"))
    (tmp_path / "config.yaml").write_text(to_yaml(load(tmp_path / "tiny.yaml")))
    return tmp_path / "tiny.yaml"


def load(path: Path, *words: str) -> TrainConfig:
    return load_train_config(path, words)[0]


def changes(path: Path, *words: str) -> list[str]:
    return [str(change) for change in changes_since(path.parent / "config.yaml", load(path, *words))]


def refusal(path: Path, *words: str) -> str:
    config = load(path, *words)
    with pytest.raises(ConfigError) as error:
        refuse_changes(changes_since(path.parent / "config.yaml", config), config, path.parent)
    return str(error.value)


def allowed(path: Path, *words: str) -> None:
    config = load(path, *words)
    refuse_changes(changes_since(path.parent / "config.yaml", config), config, path.parent)


def test_every_key_either_makes_the_run_or_may_change() -> None:
    makes, free = listed_keys(MAKES_THE_RUN), listed_keys(MAY_CHANGE)
    keys = {
        key
        for key, cls, name in walk_keys(TrainConfig)
        if "[N]" not in key and not sections(field_types(cls)[name]) and not key.endswith(".streams")
    }
    covered = {key for key in keys if key.split(".")[0] in free}  # by a section that is listed as a whole
    assert keys - covered == (makes | free) & keys - covered, "list new keys in mptfoundry/run/changes.py"
    assert makes | free <= keys | {key.split(".")[0] for key in keys}, "these keys no longer exist"
    assert not makes & free


def test_the_same_config_has_no_changes(path: Path) -> None:
    assert changes(path) == []


def test_what_a_newer_version_adds_with_its_default_is_no_change(path: Path) -> None:
    text = (path.parent / "config.yaml").read_text()
    (path.parent / "config.yaml").write_text(text.replace("save_async: true\n", ""))
    assert changes(path) == []


def test_every_change_is_shown_by_its_key(path: Path) -> None:
    words = ["max_duration=20ba", "eval_interval=5ba", "callbacks.lr_monitor={}", "precision=fp32"]
    assert changes(path, *words) == [
        "callbacks.lr_monitor: not given -> {}",
        "eval_interval: 1 -> 5ba",
        "max_duration: 12ba -> 20ba",
        "precision: auto -> fp32",
    ]


@pytest.mark.parametrize(
    "word",
    [
        "max_duration=20ba",
        "save_interval=1ba",
        "device_train_microbatch_size=2",
        "train_loader.num_workers=3",
        "train_loader.dataset.download_retry=9",
        "model.attn_config.attn_impl=torch",
        "fsdp_config={state_dict_type: sharded}",
        "algorithms.gradient_clipping.clipping_threshold=2",
        "scheduler.t_warmup=2ba",
        "dist_timeout=100",
    ],
)
def test_what_leaves_the_run_itself_may_change_freely(path: Path, word: str) -> None:
    allowed(path, word)


@pytest.mark.parametrize(
    "word",
    some_of(
        [
            "global_train_batch_size=16",
            "seed=1",
            "model.n_layers=3",
            "model.attn_config.alibi_bias_max=16",
            "tokenizer.name=/other",
            "train_loader.dataset.streams.a.proportion=0.5",
            "train_loader.dataset.streams.a.local=/elsewhere",
            "train_loader.dataset.num_canonical_nodes=4",
            "train_loader.dataset.shuffle=false",
            "optimizer.lr=1",
            "optimizer={name: decoupled_adamw, lr: 1e-3}",
        ]
    ),
)
def test_what_makes_another_run_needs_leave(path: Path, word: str) -> None:
    said, key = refusal(path, word), word.split("=")[0]
    assert "The run would continue as a different one." in said
    assert key in said and said.endswith("].")
    allowed(path, word, f"allow_changes=[{key}]")
    allowed(path, word, f"allow_changes=[{key.split('.')[0]}]")


def test_a_cache_may_lie_elsewhere(path: Path) -> None:
    text = (
        (path.parent / "config.yaml")
        .read_text()
        .replace("local: /data/a", "local: /data/a\n        remote: s3://b/a")
    )
    (path.parent / "config.yaml").write_text(text)
    remote = "train_loader.dataset.streams.a.remote=s3://b/a"
    allowed(path, remote, "train_loader.dataset.streams.a.local=/other/cache")
    assert "remote: s3://b/a in the run" in refusal(path, "train_loader.dataset.streams.a.remote=s3://c/a")


def test_leave_names_keys_that_exist(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"allow_changes.*batchsize is not a key of a run"):
        load(path, "allow_changes=[batchsize]")


def test_other_training_data_need_to_be_allowed_and_an_evaluations_are_shown(path: Path) -> None:
    before = {"tokenizer": "a" * 64, "train_loader.dataset": "b" * 64, "eval_loader x.dataset": "c" * 64}
    changes = changed_inputs({**before, "gone": "d" * 64}, {**dict.fromkeys(before, "0" * 64), "new": "e"})
    assert [str(change) for change in changes] == [
        "eval_loader x.dataset: its content has changed (cccccccc -> 00000000)",
        "tokenizer: its content has changed (aaaaaaaa -> 00000000)",
        "train_loader.dataset: its content has changed (bbbbbbbb -> 00000000)",
    ]
    with pytest.raises(ConfigError) as refused:
        refuse_changes(changes, load(path), Path("runs/x"))
    assert str(refused.value).splitlines()[:2] == [
        f"{key}: its content is not what the run of runs/x read (fingerprint 00000000, then {digits})."
        for key, digits in (("tokenizer", "aaaaaaaa"), ("train_loader.dataset", "bbbbbbbb"))
    ]
    words = "allow_changes=[tokenizer,train_loader.dataset]"
    assert words in str(refused.value)
    refuse_changes(changes, load(path, words), Path("runs/x"))


@pytest.mark.parametrize(
    ("key", "makes_rows"),
    [
        ("train_loader.dataset.packing_ratio", True),
        ("train_loader", True),
        ("seed", True),
        ("optimizer.lr", False),
    ],
)
def test_rows_may_be_others_where_what_makes_them_is_allowed(path: Path, key: str, makes_rows: bool) -> None:
    assert allows_other_rows(load(path, f"allow_changes=[{key}]")) == makes_rows
