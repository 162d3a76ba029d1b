"""Where records lie is said once, and how much of them is read in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.config.load import load_train_config
from mptfoundry.config.streams import RecordsConfig

Problems = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "neither hf_name nor local nor remote is given"),
        ({"hf_name": "a", "local": "b"}, "hf_name and local are both given"),
        ({"local": "a", "hf_kwargs": {"name": "x"}}, "hf_kwargs: belongs to hf_name"),
        ({"hf_name": "a", "hf_kwargs": {"trust_remote_code": True}}, "no code of a data set is run"),
        (
            {"local": "a", "preprocessing_fn": {"prompt": "q"}},
            "columns are named as {prompt: ..., response: ...}",
        ),
        ({"local": "a", "preprocessing_fn": "mine"}, "preprocessing_fn: 'mine' is not module:function"),
        ({"local": "a", "streams": {"b": RecordsConfig(local="b")}}, "streams and local are both given"),
        ({"streams": {}}, "streams: is empty"),
        ({"local": "a", "packing_ratio": 0.5}, "packing_ratio: 0.5 is less than"),
        ({"local": "a", "max_bad_records": -1}, "max_bad_records: -1 is too small"),
        ({"local": "a", "max_dropped": 1.5}, "max_dropped: 1.5 is not a share"),
    ],
)
def test_what_cannot_be_read_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        FinetuningDatasetConfig(**keys)
    assert said in str(caught.value)


def mix(**amounts: dict[str, float]) -> FinetuningDatasetConfig:
    return FinetuningDatasetConfig(
        streams={name: RecordsConfig(local=name, **given) for name, given in amounts.items()}  # type: ignore[arg-type]
    )


def test_a_mix_says_in_one_way_how_much_of_each_is_read() -> None:
    assert mix(a={}, b={}).amounts == ("proportion", None)
    assert mix(a={"proportion": 1}, b={"proportion": 3}).amounts == ("proportion", [1, 3])
    assert mix(a={"repeat": 2}, b={}).amounts == ("repeat", [2, 1])
    assert mix(a={"choose": 5}, b={"choose": 6}).amounts == ("choose", [5, 6])
    for amounts, said in (
        ({"a": {"repeat": 2}, "b": {"choose": 3}}, "repeat and choose are both given"),
        ({"a": {"choose": 2}, "b": {}}, "b lacks the choose that others have"),
        ({"a": {"proportion": 2}, "b": {}}, "b lacks the proportion that a has"),
    ):
        with pytest.raises(ValueError, match=said):
            mix(**amounts)


def test_streams_take_split_and_function_of_their_data_set_unless_they_have_their_own() -> None:
    streams = {"a": RecordsConfig(local="a"), "b": RecordsConfig(local="b", split="own")}
    dataset = FinetuningDatasetConfig(streams=streams, split="train", preprocessing_fn="m:f")
    found = [(source.split, source.preprocessing_fn) for source in dataset.sources.values()]
    assert found == [("train", "m:f"), ("own", "m:f")]


CODE = "eval_loader: {name: finetuning, dataset: {local: x, preprocessing_fn: 'm:f'}}"
STREAM_CODE = "eval_loader: {name: finetuning, dataset: {streams: {a: {local: x, preprocessing_fn: 'm:f'}}}}"


def test_a_users_function_needs_leave_from_the_command_line(
    problems: Problems, write: Callable[..., str]
) -> None:
    said = "names code, which runs only with allow_code=true on the command line."
    assert problems(CODE) == (f"run.yaml:25: eval_loader.dataset.preprocessing_fn: {said}",)
    (found,) = problems(STREAM_CODE)
    assert found == f"run.yaml:25: eval_loader.dataset.streams.a.preprocessing_fn: {said}"
    config, _ = load_train_config(write(CODE), ["allow_code=true"])
    assert config.allow_code


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "target_prompts: some",
            "target_prompts: 'some' is not allowed here. Expected none, all, or length>=N",
        ),
        ("target_responses: first", "target_responses: 'first' is not allowed here"),
        ("decoder_only_format: false", "decoder_only_format: false is not allowed here"),
        ("num_canonical_nodes: 2", "num_canonical_nodes: is not supported: examples are tokenized once"),
        ("max_leftover_bins_to_keep: 2", "max_leftover_bins_to_keep: is not supported: packing is planned"),
        ("max_bad_recrds: 2", "max_bad_recrds: unknown key. Did you mean max_bad_records?"),
    ],
)
def test_keys_that_do_not_fit_are_refused_with_the_reason(problems: Problems, line: str, said: str) -> None:
    (found,) = problems(f"eval_loader: {{name: finetuning, dataset: {{local: x, {line}}}}}")
    assert f"eval_loader.dataset.{said}" in found


def test_packing_and_targets_are_read_in_each_of_their_forms(write: Callable[..., str]) -> None:
    keys = "hf_name: x, packing_ratio: auto, target_prompts: length>=9"
    config, _ = load_train_config(write(f"eval_loader: {{name: finetuning, dataset: {{{keys}}}}}"))
    dataset = config.eval_loaders["eval"].dataset
    assert isinstance(dataset, FinetuningDatasetConfig)
    assert (dataset.packing_ratio, dataset.target_prompts) == ("auto", "length>=9")
