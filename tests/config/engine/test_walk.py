from __future__ import annotations

from collections.abc import Callable

import pytest

from mptfoundry.config.load import parse_words
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import GenerateConfig
from tests.config.conftest import SMALL

Problems = Callable[..., tuple[str, ...]]


def test_all_problems_of_a_file_are_reported_at_once_in_the_order_of_its_lines(problems: Problems) -> None:
    text = (
        SMALL.replace("d_model: 64", "d_model: 66")
        .replace("alibi: true", "alibbi: true")
        .replace("decoupled_lionw", "decoupled_lion")
        .replace("10ba", "10b")
        .replace("size: 8", "size: eight")
        .replace("proportion: 0.3", "propotion: 0.3")
    )
    said = problems("precision: bf16", "callbacks: {speed_monitor: {window: 3}}", text=text)
    keys = [problem.split(": ")[1] for problem in said]
    assert keys == [
        "model.d_model",
        "model.attn_config.alibbi",
        "train_loader.dataset.streams",
        "train_loader.dataset.streams.prose.propotion",
        "optimizer.name",
        "scheduler.t_warmup",
        "global_train_batch_size",
        "precision",
        "callbacks.speed_monitor.window",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("savefolder: x", "savefolder: unknown key. Did you mean save_folder?"),
        (
            "eval_loader: {dataset: {local: x, packing_ratio: 2}}",
            "eval_loader.dataset.packing_ratio: unknown key here. "
            "It belongs to another `name` of eval_loader.",
        ),
        ("lr: 1", "lr: unknown key here. It belongs at optimizer.lr or optimizer.param_groups[N].lr."),
        ("xyz: 1", "xyz: unknown key. `mptfoundry explain` lists all keys."),
        ("seed: '5'", "seed: '5' is not allowed here. Write it without quotes. Expected a whole number."),
        ("seed: 1.5", "seed: 1.5 is not allowed here. Expected a whole number."),
        ("seed: true", "seed: true is not allowed here. Expected a whole number."),
        ("seed:", "seed: has no value. Expected a whole number."),
        ("seed: [1]", "seed: [1] is not allowed here. Expected a whole number."),
        ("eval_first: 1", "eval_first: 1 is not allowed here. Expected true or false."),
        ("dist_timeout: soon", "dist_timeout: 'soon' is not allowed here. Expected a number."),
        ("dist_timeout: .inf", "dist_timeout: inf is not allowed here. Expected a number."),
        ("run_name: true", "run_name: true is not allowed here. Expected text."),
        (
            "precision: amp_bf61",
            "precision: 'amp_bf61' is not allowed here. Did you mean amp_bf16? "
            "Expected auto, fp32, amp_bf16 or amp_fp16.",
        ),
        (
            "eval_loader: {name: txt, dataset: {local: x}}",
            "eval_loader.name: 'txt' is not known. Did you mean text? Allowed: text, labelled, finetuning.",
        ),
        ("compile_config: yes", "compile_config: true is not allowed here. Expected a section or null."),
        (
            "eval_loader: {dataset: {local: x, cache_limit: 10 gigs}}",
            "eval_loader.dataset.cache_limit: '10 gigs' is not allowed here. "
            "Expected a size, such as 1000000 or 100gb.",
        ),
        (
            "eval_loader: {}",
            "eval_loader.dataset: is missing. Expected a section. Which samples, in which mix and order.",
        ),
    ],
)
def test_a_wrong_value_is_said_with_line_key_value_and_what_is_allowed(
    problems: Problems, line: str, said: str
) -> None:
    assert problems(line) == (f"run.yaml:25: {said}",)


def test_a_wrong_value_that_the_model_shares_is_said_once(problems: Problems) -> None:
    said = "max_seq_len: '2k' is not allowed here. Expected a whole number."
    assert problems(text=SMALL.replace("max_seq_len: 128", "max_seq_len: 2k")) == (f"run.yaml:1: {said}",)


@pytest.mark.parametrize("section", ["model", "train_loader", "eval_loader", "optimizer", "scheduler"])
@pytest.mark.parametrize("name", ["[a, b]", "{a: b}", "[[1]]", "3", "true"])
def test_a_name_that_is_no_text_is_an_error(problems: Problems, section: str, name: str) -> None:
    said = problems(words=(f"{section}.name={name}",))
    assert any(f"{section}.name={name}" in problem for problem in said)


def test_a_choice_that_yaml_reads_as_a_bool_is_that_choice(load: Callable[..., TrainConfig]) -> None:
    assert load(words=("train_loader.dataset.verify=off",)).train_loader.dataset.verify == "off"


@pytest.mark.parametrize(
    "word",
    [
        "n_layers=1000000000",
        "n_layers=100000000000000",
        "d_model=1000000000000",
        "vocab_size=1000000000000",
        "max_seq_len=1000000000000",
        "head_dim=1000000000000",
        "n_heads=1000000000000",
        "ffn_config.ffn_hidden_size=1000000000000",
        "expansion_ratio=1e300",
    ],
)
def test_a_size_that_no_model_has_is_refused_at_once(problems: Problems, word: str) -> None:
    assert "too large" in problems(words=(f"model.{word}", "max_seq_len=128"))[0]


@pytest.mark.parametrize(
    "word",
    [
        "global_train_batch_size=1000000000000",
        "device_train_microbatch_size=1000000000000",
        "seed=1000000000000",
        "max_duration=1e300ba",
        "max_duration=" + "9" * 400 + "tok",
        "train_loader.dataset.epoch_size=" + "9" * 400,
        "train_loader.dataset.cache_limit=" + "9" * 400 + "gb",
        "train_loader.num_workers=1000000000000",
        "optimizer.lr=1e300",
        "dist_timeout=1e300",
    ],
)
def test_a_number_that_no_run_has_is_refused_in_a_short_line(problems: Problems, word: str) -> None:
    [said] = problems(words=(word,))
    assert "too large" in said and len(said.partition("=")[2]) < 700


def test_long_values_and_control_letters_are_shown_short_and_harmless(problems: Problems) -> None:
    [said] = problems(f'max_duration2: "{"x " * 3000}"', f'precision: "{"y" * 5000}\e[2J"', words=())[1:]
    assert len(said) < 400 and "" not in said


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("seed: 3.0", "seed", 3),
        ("max_split_size_mb: 1e3", "max_split_size_mb", 1000),
        ("dist_timeout: 60", "dist_timeout", 60.0),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 1.10", "run_name", "1.10"),
        ("run_name: '1.10'", "run_name", "1.10"),
        ("load_ignore_keys: state/optimizers", "load_ignore_keys", ("state/optimizers",)),
        ("eval_interval: 2", "eval_interval", 2),
        ("loggers:", "loggers", {}),
        ("eval_loader:", "eval_loader", None),
    ],
)
def test_what_can_only_mean_one_thing_is_taken(
    load: Callable[..., object], line: str, name: str, value: object
) -> None:
    taken = getattr(load(line), name)
    assert taken == value
    assert type(taken) is type(value)


def test_scientific_notation_without_a_point_is_a_number(load: Callable[..., object]) -> None:
    assert load().optimizer.lr == 1e-4


def test_several_rules_of_one_section_are_reported_together(problems: Problems) -> None:
    text = SMALL.replace(
        "    alibi: true\n", "    attn_pdrop: 2\n    clip_qkv: -1\n    qk_ln: true\n    qk_gn: true\n"
    )
    assert problems(text=text) == (
        "run.yaml:8: model.attn_config.attn_pdrop: 2.0 is not a probability. Use 0 or more and less than 1.",
        "run.yaml:9: model.attn_config.clip_qkv: -1.0 is not positive. Use a positive number, or null for "
        "none.",
        "run.yaml:10: model.attn_config: qk_ln and qk_gn are both true. A model has one of them.",
    )


def test_a_wrong_value_raises_no_second_complaint_about_its_default(problems: Problems) -> None:
    # The default width does not split over 3 heads, but nobody asked for it.
    text = SMALL.replace("d_model: 64", "d_model: wide").replace("n_heads: 4", "n_heads: 3")
    assert problems(text=text) == (
        "run.yaml:4: model.d_model: 'wide' is not allowed here. Expected a whole number.",
    )


def test_a_misspelled_name_still_has_its_keys_checked(problems: Problems) -> None:
    text = SMALL.replace("decoupled_lionw", "decoupled_lion").replace("  lr: 1e-4", "  lr: 1e-4\n  epss: 1")
    assert [problem.split(": ")[1] for problem in problems(text=text)] == ["optimizer.name", "optimizer.epss"]


def test_every_missing_key_is_named_with_its_meaning(problems: Problems) -> None:
    said = problems(text="max_seq_len: 128\n")
    assert len(said) == 7
    assert said[0] == (
        "run.yaml: model: is missing. Expected a section with name: mpt_causal_lm, "
        "mpt_sequence_classification, mpt_token_classification or mpt_question_answering. The network."
    )


def test_streams_can_be_taken_out_by_null(load: Callable[..., object]) -> None:
    words = ("train_loader.dataset.streams.code=null",)
    assert [*load(words=words).train_loader.dataset.sources] == ["prose"]


def test_a_stream_that_is_not_there_cannot_be_taken_out(problems: Problems) -> None:
    word = "train_loader.dataset.streams.codes=null"
    said = f"command line: {word}: nothing has this name, so it can't be left out. Did you mean code?"
    assert problems(words=(word,)) == (said,)


def test_callbacks_can_be_taken_out_by_null_on_the_command_line_only(
    load: Callable[..., object], problems: Problems
) -> None:
    line = "callbacks: {lr_monitor: {}, memory_monitor: {}}"
    assert [*load(line, words=("callbacks.lr_monitor=null",)).callbacks] == ["memory_monitor"]
    assert problems("callbacks: {lr_monitor: }") == (
        "run.yaml:25: callbacks.lr_monitor: has no value. Expected its arguments as a section; {} for none.",
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("prompts=Hello # world", "Hello # world"),
        ("prompts=note: this", "note: this"),
        ("prompts=5", "5"),
        ("prompts=yes", "yes"),
        ("prompts='quoted: 1'", "quoted: 1"),
        ("prompts=[unclosed", "[unclosed"),
        ("prompts={name}", "{name}"),
        ("prompts='[1, 2]'", "[1, 2]"),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_was_typed(word: str, text: str) -> None:
    assert parse_words(["model=runs/a", word], GenerateConfig).prompts == (text,)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("tokenizer.name=[x]", "['x']"),
        ("run_name=[]", "[]"),
        ("save_folder={a: b}", "a section"),
        ("train_loader.dataset.streams.code.local=[x]", "['x']"),
    ],
)
def test_a_list_or_a_mapping_on_the_command_line_is_not_a_text(
    problems: Problems, word: str, shown: str
) -> None:
    said = f"command line: {word}: {shown} is not allowed here. Put it in quotes if it is text. Expected text"
    (problem,) = problems(words=(word,))
    assert problem.startswith(said)
