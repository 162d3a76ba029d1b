"""In-context tasks: from the lines of a JSONL file to the token ids that a model scores or continues.

Ids, examples and their order are llm-foundry's, so that scores can be compared with published ones:

* One random generator runs through the documents in order and draws each one's examples; with categories,
  one through each category, and examples are of the same category.
* The examples, the question and the answer are tokenized apart. The examples get the special tokens that the
  tokenizer adds to a text, without an end-of-text token; the other two get none.
* A question loses white space at its end; an answer begins with a blank if the tokenizer has a token for a
  blank and a letter.
* What exceeds `max_seq_len` is cut on the left.

Unlike there, texts are not padded to `max_seq_len`, a limit is a number of documents, and a question without
any context begins with the tokenizer's beginning-of-text or end-of-text token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptfoundry.config.tasks import TaskConfig
from mptfoundry.errors import DataError

# Extra tokens for a generated chain of thought that is longer than the longest one in the data.
_SPARE_TOKENS = 10
_SHOWN_PROBLEMS = 10
_FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
    "generation_task_with_answers": {"context": str, "answer": str},
}
_OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}

Line = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A text to score.

    Attributes:
        ids: Token ids of the context and the answer.
        start: Index of the answer's first token, at least 1.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Question:
    """A document as a model reads it.

    Attributes:
        doc_id: Its line in the file, from 0.
        rows: The texts to score, one per choice; for a generation task, the prompt as the only row.
        choices: The answers' texts; for a generation task, the right ones.
        gold: Index of the right choice; 0 where there is one answer, or any of several is right.
        category: Its category, if the file has them.
        is_cut: Whether it exceeded the context's length.
    """

    doc_id: int
    rows: tuple[Row, ...]
    choices: tuple[str, ...]
    gold: int = 0
    category: str | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class TaskData:
    """All questions of a task with a number of examples; `max_new_tokens` is for generated answers."""

    task: TaskConfig
    shots: int
    questions: tuple[Question, ...]
    max_new_tokens: int = 0

    @property
    def label(self) -> str:
        """Name in all results, as llm-foundry writes it."""
        return f"{self.task.label}/{self.shots}-shot"


def read_lines(path: Path, task: TaskConfig) -> list[Line]:
    """Read and check a task's file.

    Raises:
        DataError: The file can't be read, or a line does not have what the task's type needs; with its line.
    """
    lines, problems = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}). It is the data of {task.label}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text. A task is a JSONL file.") from error
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                line = json.loads(content)
                problem = _problem(line, task)
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg})."
            if problem:
                problems.append(f"{path}:{number}: {problem}")
            else:
                lines.append(_stripped(line) if task.strip_dataset else line)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = [*problems[:_SHOWN_PROBLEMS], *([f"{path}: and {more} more bad lines."] if more > 0 else [])]
        raise DataError("\n".join(shown))
    if not lines:
        raise DataError(f"{path}: holds no documents. It is the data of {task.label}.")
    return lines


def line_of(row: Mapping[str, Any], task: TaskConfig) -> Line:
    """A row of a data set as a line: with the fields of `hf_parsing_map`, texts of several columns joined."""
    if not task.hf_parsing_map:
        return dict(row)
    kinds = _FIELDS[task.icl_task_type]
    return {
        name: row[columns[0]]
        if len(columns) == 1 and kinds.get(name, list) is not str and not isinstance(row[columns[0]], str)
        else " ".join(str(row[column]) for column in columns)
        for name, columns in task.hf_parsing_map.items()
    }


def _problem(line: Any, task: TaskConfig) -> str | None:
    """Why a line can't be a document of the task, or None."""
    if not isinstance(line, dict):
        return "is not an object. Each line of a task is a JSON object."
    for name, kind in _FIELDS[task.icl_task_type].items():
        if name not in line:
            others = f" It has {', '.join(line)}." if line else ""
            return f"{name}: is missing. A document of a {task.icl_task_type} task needs it.{others}"
        if not isinstance(line[name], kind) or isinstance(line[name], bool):
            return f"{name}: {json.dumps(line[name])[:60]} is not {_named(kind)}."
    if options := _OPTIONS.get(task.icl_task_type):
        texts = line[options]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            return f"{options}: is not a list of two texts or more."
        if not 0 <= line["gold"] < len(texts):
            return f"gold: {line['gold']} is not the index of one of {len(texts)} {options}."
    if task.has_categories and not isinstance(line.get("category"), str):
        return "category: is missing, and the task has has_categories: true."
    return None


def _named(kind: type) -> str:
    return {str: "a text", list: "a list", int: "a whole number"}[kind]


def _stripped(line: Line) -> Line:
    return {name: value.strip() if isinstance(value, str) else value for name, value in line.items()}


def build_task(
    task: TaskConfig, shots: int, lines: Sequence[Line], tokenizer: Any, max_seq_len: int, limit: int = -1
) -> TaskData:
    """Turn a task's lines into questions.

    Args:
        task: Which texts stand around a question.
        shots: Examples before each question.
        lines: All lines of the task's file; examples are drawn from them.
        tokenizer: The model's.
        max_seq_len: The most tokens of a row; for a generation task, with the generated answer.
        limit: Build only the first questions; -1: all.

    Raises:
        DataError: An answer alone exceeds `max_seq_len`, or the shots need more documents.
    """
    encoder = _Encoder(task, tokenizer)
    is_generation = task.icl_task_type == "generation_task_with_answers"
    new_tokens = encoder.longest_answer(lines) if is_generation else 0
    if is_generation:
        new_tokens = int(task.generation_kwargs.get("max_new_tokens", new_tokens))
    groups: dict[str | None, list[int]] = {}
    for doc_id, line in enumerate(lines):
        groups.setdefault(line["category"] if task.has_categories else None, []).append(doc_id)
    questions = []
    for category, doc_ids in sorted(groups.items(), key=lambda group: str(group[0])):
        if shots >= len(doc_ids):
            where = f"{task.dataset_uri} has {len(doc_ids)}" + (f" in {category}" if category else "")
            raise DataError(
                f"{task.label}: {shots} examples before a question need {shots + 1} documents, and {where}. "
                "Use a smaller num_fewshot."
            )
        draw = random.Random(task.fewshot_random_seed)
        for place, doc_id in enumerate(doc_ids):
            others = [lines[doc_ids[other]] for other in _others(len(doc_ids), shots, place, draw)]
            if 0 <= limit <= doc_id:
                break
            rows = encoder.rows(lines[doc_id], "".join(encoder.examples(others)))
            fitted, is_cut = _fitted(rows, max_seq_len - new_tokens, task, doc_id)
            choices, gold = _choices(lines[doc_id], task), lines[doc_id].get("gold", 0)
            questions.append(Question(doc_id, fitted, choices, gold, category, is_cut))
    return TaskData(task, shots, tuple(questions), new_tokens)


def _others(size: int, shots: int, own: int, draw: random.Random) -> set[int]:
    """Draw the documents that precede one as examples; the order of the set is part of the result."""
    chosen = set(draw.sample(range(size), min(size - 1, shots)))
    if own in chosen:
        chosen.remove(own)
        if len(chosen) < size - 1:
            other = draw.choice(range(size))
            while other in chosen or other == own:
                other = draw.choice(range(size))
            chosen.add(other)
    return chosen


def _choices(line: Line, task: TaskConfig) -> tuple[str, ...]:
    """The texts that a model chooses from, or the right ones."""
    if options := _OPTIONS.get(task.icl_task_type):
        return tuple(line[options])
    if task.icl_task_type == "language_modeling":
        return (line["continuation"],)
    return tuple(dict.fromkeys([line["answer"], *line.get("aliases", [])]))


def _fitted(rows: list[Row], longest: int, task: TaskConfig, doc_id: int) -> tuple[tuple[Row, ...], bool]:
    """Cut rows on the left to `longest` tokens; whether one was cut."""
    fitted, is_cut = [], False
    for row in rows:
        excess = max(0, len(row.ids) - longest)
        if excess >= row.start:
            raise DataError(
                f"{task.dataset_uri}: the answer of document {doc_id} has {len(row.ids) - row.start} tokens, "
                f"too many for a context of {longest}. Use a larger max_seq_len."
            )
        is_cut |= excess > 0
        fitted.append(Row(row.ids[excess:], row.start - excess))
    return tuple(fitted), is_cut


class _Encoder:
    """Writes and tokenizes the questions of one task."""

    def __init__(self, task: TaskConfig, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.leads_with_blank = len(self.plain(" a")) == 1
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.begin = [] if begin is None else [begin]

    def plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def examples(self, lines: Sequence[Line]) -> Iterator[str]:
        """The task's prompt and solved examples, in pieces."""
        preceding = self.task.prompt_string
        yield preceding
        for line in lines:
            piece = self.question(line, preceding)
            if self.task.icl_task_type != "schema":
                piece += self.answer(line)
            preceding += piece
            yield piece

    def question(self, line: Line, preceding: str) -> str:
        """A question with the texts around it; of a schema task, its right context with the continuation."""
        task = self.task
        delimiter = task.example_delimiter if preceding else ""
        if task.icl_task_type == "schema":
            text = line["context_options"][line["gold"]]
            return (
                f"{task.before_questions}{delimiter}{text}{task.continuation_delimiter}{line['continuation']}"
            )
        text = line["query" if task.icl_task_type == "multiple_choice" else "context"]
        return f"{delimiter}{task.before_questions}{text}{task.continuation_delimiter}"

    def answer(self, line: Line) -> str:
        """The right answer, as it stands in an example."""
        if self.task.icl_task_type == "multiple_choice":
            return str(line["choices"][line["gold"]])
        if self.task.icl_task_type == "language_modeling":
            return str(line["continuation"])
        thought = line.get("chain_of_thought")
        return line["answer"] if thought is None else f"{thought}{self.task.cot_delimiter}{line['answer']}"

    def rows(self, line: Line, examples: str) -> list[Row]:
        """The rows of a document after its examples."""
        task = self.task
        ids = list(self.tokenizer(examples)["input_ids"])
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        if task.icl_task_type == "schema":
            answers = [line["continuation"]] * len(line["context_options"])
            contexts = [self.option(text, examples) for text in line["context_options"]]
        else:
            answers = {
                "multiple_choice": lambda: line["choices"],
                "language_modeling": lambda: [line["continuation"]],
                "generation_task_with_answers": lambda: [None],
            }[task.icl_task_type]()
            text = self.question(line, examples)
            contexts = [text.rstrip() if task.strip_dataset else text] * len(answers)
        encoded = {text: (ids + self.plain(text)) or self.begin for text in dict.fromkeys(contexts)}
        return [self.row(encoded[text], answer) for text, answer in zip(contexts, answers, strict=True)]

    def option(self, text: str, examples: str) -> str:
        """One context of a schema task, which llm-foundry delimits only after examples."""
        task = self.task
        if not examples:
            return f"{task.before_questions}{text}"
        delimiter = task.continuation_delimiter
        delimiter = delimiter.rstrip() if task.strip_dataset else delimiter
        return f"{task.before_questions}{task.example_delimiter}{text}{delimiter}"

    def row(self, context: list[int], answer: str | None) -> Row:
        """A context with an answer to score, or to generate where it is None."""
        if answer is None:
            return Row(tuple(context), len(context))
        if self.leads_with_blank and not answer.startswith(" "):
            answer = f" {answer}"
        return Row((*context, *self.plain(answer)), len(context))

    def longest_answer(self, lines: Sequence[Line]) -> int:
        """The tokens of the longest right answer, with room for a longer chain of thought."""
        lengths = [
            len(self.tokenizer(self.answer({**line, "answer": answer}))["input_ids"])
            for line in lines
            for answer in (line["answer"], *line.get("aliases", []))
        ]
        return max(lengths) + (_SPARE_TOKENS if self.task.cot_delimiter else 0)
