"""What a model reads of a document; the expected texts are written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.tasks import TaskConfig
from mptfoundry.errors import DataError
from mptfoundry.tasks.questions import build_task, read_lines

CHOICES = [
    {"query": "two and two is ", "choices": ["four", "five"], "gold": 0},
    {"query": "three and one is", "choices": ["six", "four"], "gold": 1},
    {"query": "one and one is", "choices": ["two", "seven"], "gold": 0},
]


def task(kind: str = "multiple_choice", **options: Any) -> TaskConfig:
    return TaskConfig(
        **{"label": "t", "dataset_uri": "t.jsonl", "icl_task_type": kind, "num_fewshot": 0, **options}
    )


def texts(
    lines: list[dict[str, Any]], tokenizer: Any, shots: int = 0, max_seq_len: int = 512, **options: Any
):
    """The texts of each document's rows, with a bar before the answer."""
    config = task(**options)
    data = build_task(config, shots, lines, tokenizer, max_seq_len)
    return [
        [
            tokenizer.decode(row.ids[: row.start]) + "|" + tokenizer.decode(row.ids[row.start :])
            for row in question.rows
        ]
        for question in data.questions
    ]


def test_a_choice_follows_its_question(tiny_tokenizer: Any) -> None:
    found = texts(CHOICES, tiny_tokenizer, continuation_delimiter=" -> ", prelimiter="Q: ")
    assert found[0] == ["Q: two and two is  ->| four", "Q: two and two is  ->| five"]


def test_examples_are_other_documents_with_their_right_answers(tiny_tokenizer: Any) -> None:
    found = texts(CHOICES, tiny_tokenizer, 2, prompt_string="Add.", example_delimiter="\n")
    first = found[0][0]
    assert first.startswith("Add.\n") and first.endswith("\ntwo and two is| four")
    assert "three and one is four" in first and "one and one is two" in first


def test_the_same_seed_draws_the_same_examples_and_a_limit_changes_none(tiny_tokenizer: Any) -> None:
    lines = [{"query": f"item {n} is", "choices": ["yes", "no"], "gold": n % 2} for n in range(12)]
    whole = build_task(task(), 3, lines, tiny_tokenizer, 512)
    assert build_task(task(), 3, lines, tiny_tokenizer, 512) == whole
    assert build_task(task(), 3, lines, tiny_tokenizer, 512, limit=5).questions == whole.questions[:5]
    other = build_task(task(fewshot_random_seed=1), 3, lines, tiny_tokenizer, 512)
    assert other.questions != whole.questions


def test_a_schema_scores_one_continuation_after_several_contexts(tiny_tokenizer: Any) -> None:
    lines = [
        {"context_options": ["the cat", "the dog"], "continuation": "barks", "gold": 1},
        {"context_options": ["the sun", "the moon"], "continuation": "is hot", "gold": 0},
    ]
    assert texts(lines, tiny_tokenizer, kind="schema")[0] == ["the cat| barks", "the dog| barks"]
    assert texts(lines, tiny_tokenizer, 1, kind="schema")[0] == [
        "the sun is hot\nthe cat| barks",
        "the sun is hot\nthe dog| barks",
    ]


def test_each_category_draws_examples_from_itself(tiny_tokenizer: Any) -> None:
    lines = [{**CHOICES[n % 3], "query": f"{n} of {c}", "category": c} for n, c in enumerate("abbaab")]
    config = task(has_categories=True)
    data = build_task(config, 2, lines, tiny_tokenizer, 512)
    assert [(question.category, question.doc_id) for question in data.questions] == [
        ("a", 0), ("a", 3), ("a", 4), ("b", 1), ("b", 2), ("b", 5)
    ]  # fmt: skip
    for question in data.questions:
        text = tiny_tokenizer.decode(question.rows[0].ids)
        assert f"of {'b' if question.category == 'a' else 'a'}" not in text


def test_a_generated_answer_has_room_for_the_longest_right_one(tiny_tokenizer: Any) -> None:
    lines = [
        {"context": "1 + 1", "answer": "2", "aliases": ["two of them"]},
        {"context": "2 + 1", "answer": "3"},
    ]
    data = build_task(task("generation_task_with_answers"), 0, lines, tiny_tokenizer, 512)
    assert data.max_new_tokens == len(tiny_tokenizer("two of them")["input_ids"])
    assert data.questions[0].choices == ("2", "two of them")
    thoughts = [{**line, "chain_of_thought": "I count."} for line in lines]
    config = task("generation_task_with_answers", cot_delimiter=" So: ")
    data = build_task(config, 1, thoughts, tiny_tokenizer, 512)
    assert data.max_new_tokens == len(tiny_tokenizer("I count. So: two of them")["input_ids"]) + 10
    assert "2 + 1 I count. So: 3" in tiny_tokenizer.decode(data.questions[0].rows[0].ids)


def test_a_long_question_is_cut_on_the_left_and_counted(tiny_tokenizer: Any) -> None:
    lines = [
        {"context": "a b c d e f g h i j k l", "continuation": "m"},
        {"context": "a", "continuation": "b"},
    ]
    whole = build_task(task("language_modeling"), 0, lines, tiny_tokenizer, 512).questions
    cut = build_task(task("language_modeling"), 0, lines, tiny_tokenizer, 6).questions
    assert cut[0].is_cut and not cut[1].is_cut and not whole[0].is_cut
    assert cut[0].rows[0].ids == whole[0].rows[0].ids[-6:]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "t.jsonl:2: is not JSON"),
        ('["a"]', "t.jsonl:2: is not an object"),
        ('{"query": "a", "gold": 0}', "choices: is missing. A document of a multiple_choice task needs it."),
        ('{"query": 1, "choices": ["a", "b"], "gold": 0}', "query: 1 is not a text."),
        ('{"query": "a", "choices": ["a", "b"], "gold": 2}', "gold: 2 is not the index of one of 2 choices."),
        ('{"query": "a", "choices": ["a", "b"], "gold": "b"}', 'gold: "b" is not a whole number.'),
        ('{"query": "a", "choices": ["a"], "gold": 0}', "choices: is not a list of two texts or more."),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(CHOICES[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl:2") as error:
        read_lines(file, task())
    assert said in str(error.value)


def test_files_without_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_lines(tmp_path / "t.jsonl", task())
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no documents"):
        read_lines(tmp_path / "t.jsonl", task())


def test_too_many_examples_and_too_long_answers_are_errors(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"3 examples before a question need 4 documents, and t\.jsonl has 3"):
        build_task(task(), 3, CHOICES, tiny_tokenizer, 512)
    with pytest.raises(DataError, match=r"the answer of document 0 has .* too many for a context of 2"):
        build_task(task(), 0, CHOICES, tiny_tokenizer, 2)
