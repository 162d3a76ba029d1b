"""Measure how much code a tiny run uses: the files that it imports and the functions that it calls.

    python scripts/measure_run.py [run=pretraining|finetuning] [json=FILE]

It prints a table with a row per folder: files and lines imported, files entered, and the lines of the
functions called (from `def` to the end, with docstrings, nested functions once). The story is the code that a
reader follows to understand training: the build, data, model, optimizer, loss, evaluation and tokenizer. The
numbers depend on the two runs below and on the Python version, but not on the machine or the time.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mptfoundry"
STORY = {"build", "loaders", "data", "models", "mpt", "optim", "evals", "tokenizer"}
LIBRARIES = ("torch", "composer", "streaming", "transformers", "matplotlib.figure")
HEADS = ("room", "imported", "lines", "entered", "of functions")
CONFIG = """
max_seq_len: 64
model: {{name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384,
  attn_config: {{alibi: true}}}}
tokenizer: {{name: {folder}/tokenizer}}
train_loader: {{name: {loader}, num_workers: 0, dataset: {{{train}}}}}
eval_loader: {{name: {loader}, num_workers: 0, label: held_out, dataset: {{{held_out}}}}}
optimizer: {{name: decoupled_lionw, lr: 1e-3}}
scheduler: {{name: cosine_with_warmup, t_warmup: 1ba}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
max_duration: 2ba
eval_interval: 2ba
global_train_batch_size: 4
save_folder: {folder}/runs/{{run_name}}
save_interval: 2ba
"""
LOADERS = {
    "pretraining": ("text", "local: {folder}/shards, split: train", "local: {folder}/shards, split: val"),
    "finetuning": (
        "finetuning",
        "local: {folder}/records.jsonl, cache_folder: {folder}/cache",
        "local: {folder}/held_out.jsonl, cache_folder: {folder}/cache",
    ),
}


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words)
    if "make" in options:
        make_inputs(Path(options["make"]))
        return
    kind = options.get("run", "pretraining")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, f"make={folder}"], check=True)
        rows = measure(write_config(Path(folder), kind))
    if "json" in options:
        Path(options["json"]).write_text(json.dumps({"run": kind, "python": sys.version, "rooms": rows}))
    print(f"{kind}, Python {sys.version_info.major}.{sys.version_info.minor}", table(rows), sep="\n")


def make_inputs(folder: Path) -> None:
    """A tokenizer, shards of text and finetuning records, out of the functions of one module of Python."""
    import inspect

    from mptfoundry.data.prepare.prepare import prepare
    from mptfoundry.tokenizer import train_bpe

    texts = [inspect.getsource(function) for _, function in inspect.getmembers(inspect, inspect.isfunction)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(texts, 384, folder / "tokenizer")
    prepare(
        [str(folder / "text.jsonl")],
        folder / "shards",
        tokenizer=str(folder / "tokenizer"),
        max_seq_len=64,
        held_out=0.2,
        workers=1,
        progress=False,
    )
    records = [
        json.dumps({"prompt": text[:40], "response": text[40:80]}) + "\n" for text in texts if text[80:]
    ]
    (folder / "records.jsonl").write_text("".join(records[:24]))
    (folder / "held_out.jsonl").write_text("".join(records[24:32]))


def write_config(folder: Path, kind: str) -> Path:
    """The YAML of a run of two batches with one evaluation and one checkpoint."""
    loader, train, held_out = (text.format(folder=folder) for text in LOADERS[kind])
    path = folder / f"{kind}.yaml"
    path.write_text(CONFIG.format(folder=folder, loader=loader, train=train, held_out=held_out))
    return path


def measure(config: Path) -> dict[str, dict[str, int]]:
    """Runs `mptfoundry train CONFIG` in this process and counts by room."""
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    # Other runs on this machine start and leave files there, too.
    tempfile.tempdir = str(config.parent)
    # A killed run's lock, since every start removes such leftovers where there are any.
    (Path(tempfile.gettempdir()) / "999999_cache_filelock").touch()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    from mptfoundry.cli import main as run

    for library in LIBRARIES:  # their imports call millions of functions, none of them ours
        importlib.import_module(library)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        code = run(["train", str(config)])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert code == 0, "the run failed; see above"
    lines: dict[Path, set[int]] = defaultdict(set)
    for each in tuple(entered):  # threads of the run may still add to it
        path = Path(each.co_filename)
        if PACKAGE in path.parents and each.co_name not in ("<module>", "<lambda>"):
            lines[path] |= lines_of(path, each)
    return by_room(lines)


def lines_of(path: Path, code: CodeType) -> set[int]:
    """The lines of the function that `code` belongs to; of a comprehension or a class body, none."""
    return functions_of(path).get((code.co_name, code.co_firstlineno), set())


@cache
def functions_of(path: Path) -> dict[tuple[str, int], set[int]]:
    """The lines of each function of a file, by its name and its first line, decorators included."""
    functions = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            assert node.end_lineno is not None
            functions[node.name, first] = set(range(node.lineno, node.end_lineno + 1))
    return functions


def by_room(lines: dict[Path, set[int]]) -> dict[str, dict[str, int]]:
    """Counts for each room: files and lines imported, files entered, lines of the functions entered."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if PACKAGE in path.parents and path.name != "__init__.py":
            counts = rooms[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
            counts["imported"] += 1
            counts["lines"] += path.read_text().count("\n")
            counts["entered"] += bool(lines.get(path))
            counts["of functions"] += len(lines.get(path, ()))
    return {room: dict(counts) for room, counts in sorted(rooms.items())}


def table(rows: dict[str, dict[str, int]]) -> str:
    """The counts as aligned text, the story's rooms first, with sums."""
    story = {room: counts for room, counts in rows.items() if room in STORY}
    others = {room: counts for room, counts in rows.items() if room not in STORY}
    lines = ["".join(f"{head:>14}" for head in HEADS)]
    for title, part in (("story", story), ("everything else", others), ("all", {})):
        lines += [
            "".join(f"{cell:>14}" for cell in (room, *(c[h] for h in HEADS[1:]))) for room, c in part.items()
        ]
        summed = rows if title == "all" else part
        totals = [f"{sum(c[head] for c in summed.values()):,}" for head in HEADS[1:]]
        lines.append("".join(f"{cell:>14}" for cell in (title[:14], *totals)))
    return "\n".join(lines)


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
