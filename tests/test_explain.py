from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest

from mptfoundry.config import verbs
from mptfoundry.config.engine.schema import describe, field_types, meanings, walk_keys
from mptfoundry.config.engine.signatures import CALLBACKS, LOGGERS
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError
from mptfoundry.explain import explain, options_of


def _classes() -> Iterator[type]:
    schemas = [v for v in vars(verbs).values() if is_dataclass(v) and isinstance(v, type)]
    for schema in [TrainConfig, *schemas]:
        yield from {schema, *(cls for _, cls, _ in walk_keys(schema))}


@pytest.mark.parametrize(
    "cls", sorted(set(_classes()), key=lambda cls: cls.__name__), ids=lambda c: c.__name__
)
def test_every_field_of_every_section_has_a_line_in_its_docstring_and_the_other_way_round(cls: type) -> None:
    assert set(meanings(cls)) == {f.name for f in fields(cls)}
    assert all(text.endswith((".", ")")) for text in meanings(cls).values())


@pytest.mark.parametrize(
    "cls", sorted(set(_classes()), key=lambda cls: cls.__name__), ids=lambda c: c.__name__
)
def test_every_type_has_words(cls: type) -> None:
    for annotation in field_types(cls).values():
        assert "[" not in describe(annotation)
        assert "typing" not in describe(annotation)


def test_a_key_is_explained_with_meaning_type_and_default() -> None:
    assert explain("model.attn_config.alibi") == (
        "model.attn_config.alibi\n"
        "    Attention with linear biases (https://arxiv.org/abs/2108.12409) instead of positions.\n"
        "    type: true or false\n"
        "    default: false"
    )


def test_choices_are_listed() -> None:
    assert "type: auto, fp32, amp_bf16 or amp_fp16" in explain("precision")
    assert "type: auto or a whole number" in explain("device_train_microbatch_size") or (
        "type: a whole number or auto" in explain("device_train_microbatch_size")
    )


def test_a_bare_name_lists_every_key_of_that_name() -> None:
    text = explain("lr")
    assert "optimizer.lr  (name: decoupled_lionw)" in text
    assert "optimizer.lr  (name: decoupled_adamw)" in text
    assert "optimizer.param_groups[N].lr" in text


def test_a_section_lists_its_kinds_and_keys() -> None:
    text = explain("optimizer")
    assert "name: decoupled_lionw." in text
    assert "keys: name, lr, betas, weight_decay" in text
    assert "default: those of its keys" in explain("model.attn_config")


def test_names_and_indices_of_the_user_are_understood() -> None:
    assert explain("train_loader.dataset.streams.code.proportion").startswith(
        "train_loader.dataset.streams.*.proportion"
    )
    assert explain("eval_loader[3].label").startswith("eval_loader")


def test_composers_classes_are_explained_by_their_signatures() -> None:
    assert "window_size: a whole number; default 100" in explain("callbacks.speed_monitor")
    assert "monitor: text; required" in explain("early_stopper.monitor")


@pytest.mark.parametrize("name", [*CALLBACKS, *LOGGERS])
def test_every_class_is_explained_by_a_sentence(name: str) -> None:
    sentence = explain(name).split("\n")[1].strip()
    assert len(sentence) > 10 and sentence[0].isupper() and ":`" not in sentence and "``" not in sentence


def test_an_unknown_key_gets_the_nearest_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.alibi: there is no such key\. Did you mean model\.attn_config"
    ):
        explain("model.alibi")
    with pytest.raises(ConfigError, match=r"Did you mean optimizer\.weight_decay"):
        explain("wieght_decay")


def test_the_options_of_a_verb_are_listed_from_its_class() -> None:
    text = options_of(verbs.ExportConfig)
    assert "  model: text; required\n      Folder of a run, a checkpoint, an exported folder" in text
    assert "  dtype: bf16, fp16 or fp32; default bf16\n" in text


def test_without_a_key_every_section_is_listed() -> None:
    text = explain()
    for name in field_types(TrainConfig):
        assert f"\n{name}: " in text


@pytest.mark.parametrize("key", ["profiler", "async_eval", "callbacks.async_eval", "clip_lion"])
def test_what_is_known_and_not_supported_says_why(key: str) -> None:
    assert explain(key).startswith(f"{key}\n    is not supported: ")
