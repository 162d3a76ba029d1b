"""Make labelled examples from Python's standard library, for the configs of the three heads.

lines      is a line code, or part of a docstring?             configs/mpt-text-classification.yaml
words      what is each word of a line of code?                configs/mpt-token-classification.yaml
functions  what is a function called, what does it return?     configs/mpt-question-answering.yaml

python scripts/labelled_examples.py [out=FOLDER] [FILE.py ...]
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = "quickstart/labelled"
KINDS = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string"}
SHORTEST_LINE, LONGEST_LINE, LONGEST_FUNCTION = 12, 100, 500
OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Examples = Iterator[dict[str, Any]]


def main(words: list[str]) -> None:
    """Write OUT/{lines,words,functions}/{train,val}.jsonl; a tenth, by its hash, is held out."""
    out = Path(next((word.removeprefix("out=") for word in words if word.startswith("out=")), OUT))
    files = [Path(word) for word in words if not word.startswith("out=")]
    files = files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    makers = {"lines": lines, "words": tagged_words, "functions": questions}
    for name, make in makers.items():
        rows: dict[str, list[str]] = {"train": [], "val": []}
        for file in files:
            for example in make(file.read_text(encoding="utf-8")):
                row = json.dumps(example)
                digest = hashlib.sha256(example.get("context", row).encode()).digest()
                rows["val" if digest[0] < 256 // 10 else "train"].append(row + "\n")
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, written in rows.items():
            (out / name / f"{split}.jsonl").write_text("".join(written), encoding="utf-8")
            print(f"{out / name / split}.jsonl: {len(written):,} examples")


def lines(source: str) -> Examples:
    """Each line once that is not too short, with what it is."""
    labels: dict[int, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, OWNERS) and ast.get_docstring(node) is not None:
            text = node.body[0]
            labels |= dict.fromkeys(range(text.lineno, (text.end_lineno or text.lineno) + 1), "docstring")
    seen = set()
    for number, line in enumerate(source.splitlines(), 1):
        line = line.strip().strip('"').strip()
        if len(line) >= SHORTEST_LINE and line[0] != "#" and line not in seen:
            seen.add(line)
            yield {"text": line[:LONGEST_LINE], "label": labels.get(number, "code")}


def tagged_words(source: str) -> Examples:
    """Each logical line that is not too long, word by word."""
    words: list[str] = []
    labels: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            words.append(token.string)
            labels.append("keyword" if keyword.iskeyword(token.string) else "name")
        elif token.type in KINDS:
            words.append(token.string)
            labels.append(KINDS[token.type])
        elif token.type == tokenize.NEWLINE:
            if len(words) > 2 and sum(map(len, words)) <= LONGEST_LINE and "\n" not in "".join(words):
                yield {"words": words, "labels": labels}
            words, labels = [], []


def questions(source: str) -> Examples:
    """Two questions about each function that is not too long, with answers as SQuAD gives them."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        context = "".join(lines[node.lineno - 1 : node.end_lineno])
        if len(context) > LONGEST_FUNCTION or not context.isascii():
            continue
        yield _question("What is the function called?", context, node.name, context.index("def ") + 4)
        last = node.body[-1]
        value = last.value if isinstance(last, ast.Return) else None
        if value is not None and value.lineno == value.end_lineno:
            start = sum(map(len, lines[node.lineno - 1 : value.lineno - 1])) + value.col_offset
            answer = lines[value.lineno - 1][value.col_offset : value.end_col_offset]
            yield _question("What does it return?", context, answer, start)


def _question(question: str, context: str, answer: str, start: int) -> dict[str, Any]:
    answers = {"text": [answer], "answer_start": [start]}
    return {"question": question, "context": context, "answers": answers}


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
