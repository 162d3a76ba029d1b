"""Three small in-context tasks from held-out Python text, for the quickstart.

* signature-docstring: which of four docstrings belongs to a signature. The docstrings are held out.
* last-word: the last word of a held-out docstring.
* body-signature: which of four signatures precedes the first statement of a function. The functions are of
  held-out files.

What is held out is decided by a hash of the text, as `mptfoundry prepare` does. All choices are drawn by a
fixed seed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mptfoundry.data.records.records import IDENTITY_BYTES

SEED = 17
CHOICES = 4
MOST_DOCUMENTS = 80
# With fewer, an accuracy says nothing.
FEWEST_DOCUMENTS = 20
SHOTS = (0, 2)
SHORTEST, LONGEST = 24, 160
# Task -> its type, its random baseline, and the text between a question and its answer.
TASKS = {
    "signature-docstring": ("multiple_choice", 1 / CHOICES, "\n"),
    "last-word": ("language_modeling", 0.0, " "),
    "body-signature": ("schema", 1 / CHOICES, "\n"),
}

Line = dict[str, Any]


@dataclass
class Functions:
    """What the tasks are made from.

    Attributes:
        described: (signature, first paragraph of its docstring).
        docstrings: First paragraphs of docstrings.
        bodies: (signature, first statement).
    """

    described: list[tuple[str, str]] = field(default_factory=list)
    docstrings: list[str] = field(default_factory=list)
    bodies: list[tuple[str, str]] = field(default_factory=list)


def is_held_out(text: str, share: float) -> bool:
    """Whether `mptfoundry prepare held_out=SHARE` holds a document out."""
    digest = hashlib.blake2b(text.encode()[:IDENTITY_BYTES], digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def add_file(functions: Functions, source: str, share: float, *, is_file_held_out: bool) -> None:
    """Add what is held out of a source file: its functions' code, or docstrings of them."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        paragraph = " ".join((docstring or "").split("\n\n")[0].split())
        is_text_held_out = docstring is not None and len(docstring) > 80 and is_held_out(docstring, share)
        if is_text_held_out and SHORTEST <= len(paragraph) <= LONGEST:
            functions.docstrings.append(paragraph)
        if isinstance(node, ast.ClassDef) or not (is_file_held_out or is_text_held_out):
            continue
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        if len(signature) > LONGEST:
            continue
        if is_text_held_out and SHORTEST <= len(paragraph) <= LONGEST:
            functions.described.append((signature, paragraph))
        statements = node.body[1:] if docstring is not None else node.body
        if is_file_held_out and statements:
            statement = ast.unparse(statements[0])
            if SHORTEST <= len(statement) <= LONGEST:
                functions.bodies.append((signature, statement))


def make_tasks(functions: Functions) -> dict[str, list[Line]]:
    """The documents of each task."""
    described = unique(functions.described)
    bodies = unique(functions.bodies)
    lines = {
        "signature-docstring": [
            {"query": signature, "choices": choices, "gold": gold}
            for signature, (choices, gold) in zip(
                (one for one, _ in described), with_distractors([text for _, text in described]), strict=True
            )
        ],
        "last-word": [line for text in dict.fromkeys(functions.docstrings) if (line := last_word(text))],
        "body-signature": [
            {"context_options": options, "continuation": body, "gold": gold}
            for (_, body), (options, gold) in zip(
                bodies, with_distractors([signature for signature, _ in bodies]), strict=True
            )
        ],
    }
    draw = random.Random(SEED)
    return {name: draw.sample(each, min(len(each), MOST_DOCUMENTS)) for name, each in lines.items()}


def unique(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of which neither text is in an earlier one."""
    kept: list[tuple[str, str]] = []
    seen: set[str] = set()
    for pair in pairs:
        if not seen.intersection(pair):
            kept.append(pair)
            seen.update(pair)
    return kept


def with_distractors(texts: list[str]) -> list[tuple[list[str], int]]:
    """Each text among others in random order, with its place."""
    draw, chosen = random.Random(SEED), []
    for text in texts if len(texts) >= CHOICES else []:
        choices = [text, *draw.sample([other for other in texts if other != text], CHOICES - 1)]
        draw.shuffle(choices)
        chosen.append((choices, choices.index(text)))
    return chosen


def last_word(text: str) -> Line | None:
    """A docstring without its last word, which is to be predicted; None if it does not end with a word."""
    context, _, word = text.rstrip(".").rpartition(" ")
    return {"context": context, "continuation": word} if context and word.isalpha() else None


def write_tasks(functions: Functions, out: Path) -> list[str]:
    """Write each task with enough documents, and `tasks.yaml`; returns their names."""
    out.mkdir(parents=True, exist_ok=True)
    names, entries = [], []
    for name, lines in make_tasks(functions).items():
        if len(lines) < FEWEST_DOCUMENTS:
            continue
        kind, _, delimiter = TASKS[name]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        entries.append(
            f"- {{label: {name}, dataset_uri: {out / name}.jsonl, icl_task_type: {kind}, "
            f"num_fewshot: {list(SHOTS)}, continuation_delimiter: {json.dumps(delimiter)}}}\n"
        )
        names.append(name)
    (out / "tasks.yaml").write_text("icl_tasks:\n" + "".join(entries) if entries else "")
    return names


def accuracies(results: Path) -> dict[str, str]:
    """The rows of the quickstart's table: each task's accuracy with each number of examples."""
    metrics = json.loads(results.read_text())["results"]
    rows = {}
    for name, (_, baseline, _) in TASKS.items():
        scores = [
            f"{next(iter(metrics[label].values())):.3f} with {shots} examples"
            for shots in SHOTS
            if (label := f"{name}/{shots}-shot") in metrics
        ]
        if scores:
            rows[name] = f"{', '.join(scores)} (random: {baseline:.3f})"
    return rows
