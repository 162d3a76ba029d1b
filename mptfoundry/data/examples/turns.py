"""Convert turns to an example: ids and a loss mask.

The rules match llm-foundry 0.22, so the same records give the same ids and labels:

- The prompt and response of a turn are tokenized separately.
- Each prompt-response pair gets the special tokens that the tokenizer adds to a text by default. A
  conversation gets only those that the chat template writes.
- The last response ends with EOS, which is in the loss.
- Examples that are too long are truncated at the end.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.examples.chat import CONVERSATIONS, RecordError, Turns, complete_forms, turns_of, unused
from mptfoundry.data.examples.tokens import COLUMNS, Ids, Masked, TokenReader, is_tokenized
from mptfoundry.data.jobs import MOST_PROBLEMS_KEPT
from mptfoundry.data.records.records import BadInput, Row, Unit, a_type, read_rows, text_of
from mptfoundry.errors import DataError, first_line
from mptfoundry.tokenizer import Borders, count_ids, own_borders

ROWS_AT_ONCE = 1000
MOST_COLUMNS_KEPT = 100


@dataclass(frozen=True)
class Targets:
    """Which tokens are in the loss.

    Attributes:
        prompts: Which prompts are in the loss: `none`, `all`, or `length>=N` for those with N or more tokens.
        responses: Which responses of a conversation are in the loss: `last` or `all`.
    """

    prompts: str = "none"
    responses: str = "last"

    def trains_on_prompt(self, tokens: int) -> bool:
        """Whether a prompt of this many tokens is in the loss."""
        if self.prompts.startswith("length>="):
            return tokens >= int(self.prompts.removeprefix("length>="))
        return self.prompts == "all"

    @property
    def is_last_answer(self) -> bool:
        """Whether only the last answer is in the loss."""
        return self.prompts == "none" and self.responses == "last"


@dataclass(frozen=True)
class ExamplePlan:
    """Settings for converting records to examples; sent to each worker.

    Attributes:
        tokenizer: A transformers fast tokenizer.
        max_seq_len: Maximum tokens in an example.
        targets: Which tokens are in the loss.
        preprocessing: `module:function` that converts a user's record to a supported form, or column names
            {prompt: ..., response: ...}.
        dtype: Unsigned integer type of the ids.
        datasets: Hugging Face datasets that parts refer to.
        token_encoding_type: Integer type of ids stored as bytes.
        as_text: Whether to encode special tokens spelled out in a prompt or response as text. A conversation
            that spells one out is then a bad record, because the template writes special tokens itself.
    """

    tokenizer: Any
    max_seq_len: int
    targets: Targets
    preprocessing: str | Mapping[str, str] | None
    dtype: str
    datasets: Sequence[Any] = ()
    token_encoding_type: str = "int64"
    as_text: bool = False


@dataclass
class Counts:
    """What happened to the records.

    Attributes:
        records: Number of records.
        bad: Number of invalid records.
        problems: The first of these, with their locations.
        dropped: Number of valid records that give no example: no token within max_seq_len is in the loss, or
            a prompt or response has no tokens.
        drops: The first of these, with their locations.
        cut: Number of records that were truncated and kept.
        chats: Number of records rendered with a chat template.
        ignored: Columns that were ignored, and in how many records.
        doubles: Number of records with more than one complete form; only the first form is read.
        choices: The first of these, with their locations.
    """

    records: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    dropped: int = 0
    drops: list[str] = field(default_factory=list)
    cut: int = 0
    chats: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    doubles: int = 0
    choices: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add the counts of the records that follow."""
        for name in ("records", "bad", "dropped", "cut", "chats", "doubles"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("problems", "drops", "choices"):
            setattr(self, name, (getattr(self, name) + getattr(other, name))[:MOST_PROBLEMS_KEPT])
        self.ignore(other.ignored)

    def ignore(self, columns: Mapping[str, int]) -> None:
        """Count ignored columns; only the first `MOST_COLUMNS_KEPT` names are kept."""
        for name, records in columns.items():
            if name in self.ignored or len(self.ignored) < MOST_COLUMNS_KEPT:
                self.ignored[name] = self.ignored.get(name, 0) + records


@dataclass
class UnitExamples:
    """A unit's examples, concatenated: `ids` and loss mask `marks` as bytes, and `lengths` in tokens."""

    ids: bytes
    marks: bytes
    lengths: list[int]
    counts: Counts
    weight: int

    def examples(self, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each example: ids (tokens,) and trained (tokens,) bool."""
        borders = np.cumsum(self.lengths)[:-1]
        ids, marks = np.frombuffer(self.ids, dtype), np.frombuffer(self.marks, bool)
        yield from zip(np.split(ids, borders), np.split(marks, borders), strict=True) if self.lengths else ()


class ExampleMaker:
    """Creates the examples of units.

    Raises:
        DataError: The user's function can't be imported.
    """

    def __init__(self, plan: ExamplePlan) -> None:
        self.plan = plan
        self._preprocess: Callable[[Any], Any] = _preprocessing(plan.preprocessing)
        self._tokens = TokenReader(count_ids(plan.tokenizer), plan.token_encoding_type)

    def __call__(self, unit: Unit) -> UnitExamples:
        """Read and tokenize all records of a unit; bad records are counted, not raised."""
        counts = Counts()
        made: list[tuple[np.ndarray, np.ndarray]] = []
        rows = (row for part in unit.parts for row in read_rows(part, self.plan.datasets))
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            counts.records += len(chunk)
            made += self._examples(chunk, counts)
        ids, marks = [ids for ids, _ in made], [marks for _, marks in made]
        return UnitExamples(
            np.concatenate(ids).astype(self.plan.dtype).tobytes() if ids else b"",
            np.concatenate(marks).tobytes() if marks else b"",
            [len(each) for each in ids],
            counts,
            unit.weight,
        )

    def _examples(
        self, rows: Sequence[Row | BadInput], counts: Counts
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        good: list[tuple[Row, Turns | list[Ids] | Masked]] = []
        for row in rows:
            try:
                if isinstance(row, BadInput):
                    raise row
                good.append((row, self._read(row, counts)))
            except (BadInput, RecordError) as error:
                place = "" if isinstance(row, BadInput) else f"{row.where()}: "
                _note(counts.problems, f"{place}{str(error).removesuffix('.')}.")
                counts.bad += 1
        tokenizer, limit = self.plan.tokenizer, self.plan.max_seq_len
        texts = [said for _, said in good if isinstance(said, Turns)]
        tokenized = iter(tokenize(texts, tokenizer, as_text=self.plan.as_text))
        for row, said in good:
            if isinstance(said, Masked):
                (ids, trained), is_whole, name = said, True, "labels"
            else:
                turns = next(tokenized) if isinstance(said, Turns) else said
                ids, trained = stitch(turns, self.plan.targets, tokenizer.eos_token_id)
                is_whole = all(map(all, turns))
                name = _field_of(said)
            # The first token is never predicted, so it doesn't count.
            if is_whole and trained[1:limit].any():
                counts.cut += len(ids) > limit
                yield ids[:limit], trained[:limit]
                continue
            counts.dropped += 1
            if len(counts.drops) < MOST_PROBLEMS_KEPT:
                reason = _why_dropped(trained, limit, is_masked=isinstance(said, Masked))
                _note(counts.drops, f"{row.where()}: {name}: {reason}.")

    def _read(self, row: Row, counts: Counts) -> Turns | list[Ids] | Masked:
        """Read a record as texts or as ids."""
        said: Turns | list[Ids] | Masked | None = self._tokens.read(row.values)
        record = row.values
        if said is None:
            try:
                record = self._preprocess(row.values)
            except RecordError:
                raise
            except Exception as error:
                raise RecordError(
                    "preprocessing_fn", f"{type(error).__name__}: {first_line(error)}"
                ) from error
            said = turns_of(record, self.plan.tokenizer, needs_all=not self.plan.targets.is_last_answer)
            if said.is_chat and self.plan.as_text:
                _refuse_special_tokens(record, said.ignored, self.plan.tokenizer)
            counts.chats += said.is_chat
        ignored = said.ignored if isinstance(said, Turns) else unused(record, COLUMNS)
        counts.ignore(dict.fromkeys(sorted(ignored), 1))
        forms = [("input_ids", "labels")] * is_tokenized(record) + [*complete_forms(record)]
        if len(forms) > 1:
            counts.doubles += 1
            if len(counts.choices) < MOST_PROBLEMS_KEPT:
                read, *others = (" and ".join(form) for form in forms)
                _note(counts.choices, f"{row.where()}: {read} is read, not {' or '.join(others)}.")
        return said


def tokenize(records: Sequence[Turns], tokenizer: Any, *, as_text: bool = False) -> list[list[Ids]]:
    """Tokenize each record's turns.

    Args:
        records: The turns of each record.
        tokenizer: A transformers fast tokenizer.
        as_text: Whether special tokens spelled out in a prompt or response are encoded as text.
    """
    ids: dict[bool, Iterator[list[int]]] = {}
    for is_chat in (False, True):
        texts = [text for turns, chat, _ in records if chat == is_chat for turn in turns for text in turn]
        options = {"add_special_tokens": not is_chat, "padding": False, "truncation": False, "verbose": False}
        if as_text and not is_chat:
            options["split_special_tokens"] = True
        given = tokenizer(texts, return_attention_mask=False, **options)["input_ids"] if texts else []
        ids[is_chat] = iter(given)
    made = []
    own = own_borders(tokenizer)
    for turns, is_chat, _ in records:
        pairs = [(next(ids[is_chat]), next(ids[is_chat])) for _ in turns]
        made.append(pairs if is_chat else [_as_one(*pair, own, tokenizer.bos_token_id) for pair in pairs])
    return made


def stitch(turns: Sequence[Ids], targets: Targets, eos_token_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Join turns into an example of any length: ids (tokens,) int64 and trained (tokens,) bool."""
    ids: list[int] = []
    trained: list[bool] = []
    for number, (prompt, response) in enumerate(turns, 1):
        is_last = number == len(turns)
        if is_last and eos_token_id is not None and response[-1:] != [eos_token_id]:
            response = [*response, eos_token_id]
        ids += [*prompt, *response]
        trained += [targets.trains_on_prompt(len(prompt))] * len(prompt)
        trained += [is_last or targets.responses == "all"] * len(response)
    return np.array(ids, np.int64), np.array(trained, bool)


def _as_one(prompt: list[int], response: list[int], own: Borders, bos_token_id: int | None) -> Ids:
    """Drop the special tokens between prompt and response; keep them around the pair."""
    before, after = map(list, own)
    before = before or [bos_token_id]
    if prompt[: len(before)] == response[: len(before)] == before:
        response = response[len(before) :]
    if after and prompt[-len(after) :] == after:
        prompt = prompt[: -len(after)]
    return prompt, response


def _refuse_special_tokens(record: Mapping[str, Any], ignored: frozenset[str], tokenizer: Any) -> None:
    """Raise RecordError if a conversation spells out a special token in a field that is read."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    field = next(name for name in CONVERSATIONS if record.get(name) is not None)
    texts: dict[str, Any] = {name: record.get(name) for name in ("system", "tools") if name not in ignored}
    for number, message in enumerate(record[field]):
        read = {key: text for key, text in message.items() if f"{field}[].{key}" not in ignored}
        texts |= {f"{field}[{number}].{key}": text for key, text in read.items()}
    for place, given in texts.items():
        is_nested = isinstance(given, (list, tuple, Mapping))
        text = json.dumps(given, default=str) if is_nested else "" if given is None else text_of(given)
        found = next((token for token in special if token in text), None)
        if found:
            raise RecordError(
                place,
                f"spells the special token {found}, which a conversation can't hold as text. Remove it, "
                "or use special_tokens: as_tokens",
            )


def _field_of(said: Turns | list[Ids]) -> str:
    if isinstance(said, Turns):
        return "messages" if said.is_chat else "prompt"
    return "input_ids"


def _why_dropped(trained: np.ndarray, limit: int, *, is_masked: bool) -> str:
    # Counted from 1, and past the example's first token, which is never predicted.
    first = 2 + int(trained[1:].argmax()) if trained[1:].any() else 0
    if first > limit:
        return f"the first token in the loss is token {first:,}, past max_seq_len: {limit:,}"
    return "none of them is in the loss" if is_masked else "a prompt or a response has no tokens"


def _note(notes: list[str], text: str) -> None:
    if len(notes) < MOST_PROBLEMS_KEPT:
        notes.append(text)


def _preprocessing(given: str | Mapping[str, str] | None) -> Callable[[Any], Any]:
    if given is None:
        return lambda record: record
    if isinstance(given, str):
        return load_function(given)
    columns = given

    def rename(record: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(record, Mapping):
            raise RecordError("", f"this is {a_type(record)}, not an object with fields")
        for column in columns.values():
            if record.get(column) is None:
                raise RecordError(column, "is missing or null")
        return {name: record[column] for name, column in columns.items()}

    return rename


def load_function(name: str) -> Callable[[Any], Any]:
    """Import `module:function`; the module may be in the current folder.

    Raises:
        DataError: The function can't be imported.
    """
    module, _, function = name.partition(":")
    _with_here()
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        raise DataError(f"preprocessing_fn: {name} can't be imported: {error}.") from error


def source_of(name: str) -> str | None:
    """Find the file of the module in `module:function` without running it."""
    _with_here()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return spec.origin if spec else None


def _with_here() -> None:
    """Make modules in the current folder importable, like `python -m`."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
