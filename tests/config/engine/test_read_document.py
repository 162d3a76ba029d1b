from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import ConfigError
from tests.config.conftest import SMALL


def _error(path: str, words: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_train_config(path, words)
    return str(caught.value)


def test_a_missing_file_is_said_with_the_nearest_name(write: Callable[..., str]) -> None:
    write(name="mpt-7b.yaml")
    assert _error("mpt7b.yaml") == "mpt7b.yaml: there is no such file. Did you mean mpt-7b.yaml?"
    assert _error("nowhere/x.yaml") == "nowhere/x.yaml: there is no such file."


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert _error(str(tmp_path)) == f"{tmp_path}: is a folder. Name a YAML file."


def test_an_empty_file_is_said_to_be_empty(write: Callable[..., str]) -> None:
    assert "run.yaml: is empty." in _error(write(text="# nothing\n"))


def test_a_list_at_the_top_is_refused(write: Callable[..., str]) -> None:
    assert _error(write(text="- a\n")) == "run.yaml:1: has no `key: value` lines at the top."


def test_text_that_is_not_utf8_is_refused_with_its_line(write: Callable[..., str]) -> None:
    path = write()
    Path(path).write_bytes(b"a: 1\nb: \xff\xfe\n")
    assert _error(path) == "run.yaml:2: is not UTF-8 text. Save the file as UTF-8."


def test_a_byte_order_mark_is_no_problem(write: Callable[..., str]) -> None:
    path = write()
    Path(path).write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_train_config(path)[0].max_seq_len == 128


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("\tseed: 1", "Indent with spaces"),
        ("run_name: a: b", "A value that contains `: ` needs quotes."),
        ("run_name: [a", ""),
        ("run_name: *nothing", "A value that begins with * needs quotes."),
        ("---\nseed: 1", "Keep one document in a file."),
    ],
)
def test_what_is_no_yaml_is_said_with_its_line(write: Callable[..., str], line: str, hint: str) -> None:
    error = _error(write(line))
    assert re.match(r"run\.yaml:2[56]: is not valid YAML here: ", error)
    assert hint in error


def test_code_in_yaml_tags_is_never_run(write: Callable[..., str]) -> None:
    error = _error(write("metadata: !!python/object/apply:os.mkdir [made]"))
    assert error.startswith("run.yaml:25: could not determine a constructor")
    assert not Path("made").exists()


def test_a_key_given_twice_is_an_error_with_both_lines(problems: Callable[..., tuple[str, ...]]) -> None:
    assert problems("max_seq_len: 256") == (
        "run.yaml:25: max_seq_len: is given twice, in lines 1 and 25. Remove one.",
    )


def test_an_alias_that_contains_itself_is_refused(write: Callable[..., str]) -> None:
    assert "is nested too deeply, or contains itself." in _error(write("metadata: &m {a: *m}"))


def test_words_override_the_file_in_their_order(load: Callable[..., object]) -> None:
    config = load("seed: 1", words=("seed=2", "seed=3", "model.attn_config.alibi=false"))
    assert config.seed == 3
    assert not config.model.attn_config.alibi


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("optimizer.lr", ""),
        ("=3", ""),
        ("a b=3", ""),
        ("--max-duration=3ba", " Options are written without dashes: max_duration=3ba."),
    ],
)
def test_a_word_that_is_not_key_equals_value_is_refused(
    problems: Callable[..., tuple[str, ...]], word: str, hint: str
) -> None:
    said = f"command line: '{word}' is not of the form key=value, without spaces.{hint}"
    assert problems(words=(word, "3e-4")) == (said,)


def test_a_wrong_word_is_named_as_it_was_written(problems: Callable[..., tuple[str, ...]]) -> None:
    assert problems(words=("optimizer.lr=[1,",)) == (
        "command line: optimizer.lr=[1,: '[1,' is not allowed here. Expected a number.",
    )


def test_words_reach_into_lists_by_index(load: Callable[..., object]) -> None:
    more = "eval_loader: [{label: a, dataset: {local: x}}, {label: b, dataset: {local: y}}]"
    config = load(more, words=("eval_loader[1].label=c", "eval_loader.0.dataset.local=z"))
    assert [*config.eval_loaders] == ["a", "c"]
    assert config.eval_loaders["a"].dataset.local == "z"


def test_an_index_beyond_a_list_is_refused(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems("eval_loader: [{label: a, dataset: {local: x}}]", words=("eval_loader[4].label=c",))
    assert said == ("command line: eval_loader[4].label=c: there is no eval_loader[4].label.",)


def test_a_key_below_a_list_names_its_entry(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems("eval_loader: [{label: a, dataset: {local: x}}]", words=("eval_loader.label=c",))
    text = "eval_loader is a list of 1. Name one of its entries, as in eval_loader[0].label."
    assert said == (f"command line: eval_loader.label=c: {text}",)


def test_a_word_opens_a_section_that_was_blank(load: Callable[..., object]) -> None:
    assert load("fsdp_config:", words=("fsdp_config.version=2",)).fsdp_config.version == 2


def test_a_section_in_place_of_a_number_is_refused(problems: Callable[..., tuple[str, ...]]) -> None:
    assert problems(words=("optimizer.lr.x=3",)) == (
        "command line: optimizer.lr.x=3: optimizer.lr: a section is not allowed here. Expected a number.",
    )


def test_interpolations_refer_to_variables_and_to_each_other(load: Callable[..., object]) -> None:
    config = load(
        "variables: {where: here, n: 4}",
        "save_folder: ${variables.where}/${run_name}",
        "device_train_microbatch_size: ${variables.n}",
    )
    assert config.save_folder == "here/run"
    assert config.device_train_microbatch_size == 4


def test_a_wrong_interpolated_value_names_its_line_and_the_expression(
    problems: Callable[..., tuple[str, ...]],
) -> None:
    said = problems("variables: {n: many}", "device_train_microbatch_size: ${variables.n}")
    assert said == (
        "run.yaml:26: device_train_microbatch_size: 'many' (from ${variables.n}) is not allowed here. "
        "Expected a whole number or auto.",
    )


def test_an_interpolation_of_nothing_gets_the_nearest_key(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems("variables: {length: 4}", "seed: ${variables.lenght}")
    assert said == (
        "run.yaml:26: seed: ${variables.lenght} refers to a key that does not exist. "
        "Did you mean ${variables.length}?",
    )


def test_interpolations_in_a_circle_are_refused(problems: Callable[..., tuple[str, ...]]) -> None:
    said = problems("variables: {a: '${variables.b}', b: '${variables.a}'}")
    assert len(said) == 2
    assert all(text.startswith("run.yaml:25: variables.") for text in said)


def test_a_section_can_be_an_interpolation(load: Callable[..., object]) -> None:
    config = load("eval_loader: ${train_loader}")
    assert config.eval_loader == config.train_loader


def test_three_question_marks_have_to_be_given(
    problems: Callable[..., tuple[str, ...]], load: Callable[..., object]
) -> None:
    assert problems("save_folder: ???") == (
        "run.yaml:25: save_folder: is required. Give it, for example on the command line.",
    )
    assert load("save_folder: ???", words=("save_folder=x",)).save_folder == "x"


def test_yaml_anchors_and_merge_keys_work(load: Callable[..., object]) -> None:
    config = load("eval_loader:", "- &first {label: a, dataset: {local: x}}", "- {<<: *first, label: b}")
    assert config.eval_loaders["b"].dataset.local == "x"


def test_a_section_that_takes_the_place_of_a_merged_one_is_said(write: Callable[..., str]) -> None:
    text = "common: &c {optimizer: {lrr: 3, lr: 2}, seed: 4}\n<<: *c\n" + SMALL
    _, notes = load_train_config(write(text=text))
    assert notes[0] == (
        "run.yaml:19: optimizer: takes the place of a merged section, whose lrr has no effect."
    )
