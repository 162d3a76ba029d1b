"""Train a small MPT from start to finish on text from this machine: `make quickstart` runs this.

It reads Python's standard library (or a folder: `text=FOLDER`), splits it into three streams, then runs the
project's own commands: tokenizer, prepare, train, eval, export, generate. Besides the loss it evaluates three
small tasks that are made from held-out text. It prints each command before it runs. If you run it again, it
continues where it stopped.

    python scripts/quickstart.py [text=FOLDER] [key=value of configs/mpt-tiny.yaml ...]
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from mptfoundry.errors import DataError, MPTFoundryError
from mptfoundry.run.metrics import mean_at_the_end

ROOT = Path(__file__).resolve().parent.parent
# Where the config looks for its shards and its tokenizer.
OUT = Path("quickstart")
CONFIG = "configs/mpt-tiny.yaml"
STREAMS = ("code", "docstrings", "documentation")
HELD_OUT = 0.05
PROSE_SUFFIXES = {".txt", ".md", ".rst"}
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "node_modules",
}
VOCAB_SIZE = 4096
TOKENIZER_BYTES = 6_000_000
PROMPTS = ("def read_file(path):", "Return the number of")


def main(words: list[str]) -> int:
    named = [word.removeprefix("text=") for word in words if word.startswith("text=")]
    folder = Path(named[-1]).resolve() if named and named[-1] else None
    os.chdir(ROOT)
    try:
        run(folder, [word for word in words if not word.startswith("text=")])
    except MPTFoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"error: this step failed, see above: {show(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def run(folder: Path | None, words: list[str]) -> None:
    """All steps in order; each is skipped or continued by its own command where it was done before."""
    started_at, out = time.monotonic(), OUT
    announce(1, "text: three streams out of " + (str(folder) if folder else "Python's standard library"))
    streams = write_streams(folder, out / "text")
    announce(2, f"tokenizer: byte-level BPE, {VOCAB_SIZE} tokens")
    train_tokenizer(streams, out / "tokenizer")
    announce(3, "prepare: MDS shards with a held-out part")
    for name, path in streams.items():
        prepare = ["prepare", str(path), f"out={out / 'shards' / name}", f"tokenizer={out / 'tokenizer'}"]
        command(["mptfoundry", *prepare, "max_seq_len=256", f"held_out={HELD_OUT}"])
    announce(4, "train")
    words = [
        *words,
        *(f"train_loader.dataset.streams.{name}=null" for name in STREAMS if name not in streams),
    ]
    words += [f"eval_loader.{i}=null" for i, name in enumerate(STREAMS) if name not in streams]
    run_folder = out / "run"
    command(["composer", "scripts/train.py", CONFIG, f"save_folder={run_folder}", *words])
    announce(5, "eval: held-out text, every token counted once")
    command(["composer", "scripts/eval.py", str(run_folder)])
    if write_tasks(streams, out):
        tasks = [f"icl_tasks={out / 'tasks' / 'tasks.yaml'}", f"out={out / 'tasks' / 'results'}"]
        command(["mptfoundry", "eval", str(run_folder), *tasks])
    announce(6, "export: a folder that stock transformers loads")
    command(["mptfoundry", "export", str(run_folder), str(out / "hf"), "dtype=fp32", "overwrite=true"])
    announce(7, "generate, from the exported folder")
    command(["mptfoundry", "generate", str(out / "hf"), *PROMPTS, "max_new_tokens=48", "temperature=0.7"])
    print(summary(run_folder, out, time.monotonic() - started_at))


def write_streams(folder: Path | None, out: Path) -> dict[str, Path]:
    """Writes one JSONL file a stream and returns those that have text; does nothing where they exist."""
    done = out / "source.txt"
    source = str(folder.resolve()) if folder else sysconfig.get_path("stdlib")
    if not (done.is_file() and done.read_text() == source):
        documents: dict[str, list[dict[str, str]]] = {name: [] for name in STREAMS}
        for stream, origin, text in split_folder(Path(source)):
            documents[stream].append({"text": text, "source": origin})
        if folder is None:
            documents["documentation"] += list(language_reference())
        if not any(documents.values()):
            raise DataError(f"text: {source} holds no .py, .txt, .md or .rst file. Name a folder that does.")
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in documents.items():
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done.write_text(source)
    paths = {name: out / f"{name}.jsonl" for name in STREAMS}
    for name, path in paths.items():
        print(f"  {name:14} {path.stat().st_size / 1e6:6.1f} MB  {path}")
    return {name: path for name, path in paths.items() if path.stat().st_size > 0}


def write_tasks(streams: dict[str, Path], out: Path) -> bool:
    """Writes tasks made from the held-out text into `out/tasks`; whether there is enough of it."""
    from quickstart_tasks import Functions, add_file, is_held_out
    from quickstart_tasks import write_tasks as write

    held_out: dict[str, set[str]] = {"code": set(), "docstrings": set()}
    for name in held_out.keys() & streams.keys():
        with streams[name].open() as lines:
            for row in map(json.loads, lines):
                if is_held_out(row["text"], HELD_OUT):
                    held_out[name].add(row["source"] if name == "code" else row["source"].rpartition(":")[0])
    functions, root = Functions(), Path((out / "text" / "source.txt").read_text())
    for file in sorted(held_out["code"] | held_out["docstrings"]):
        text = (root / file).read_text(encoding="utf-8")
        add_file(functions, text, HELD_OUT, is_file_held_out=file in held_out["code"])
    return bool(write(functions, out / "tasks"))


def split_folder(root: Path) -> Iterator[tuple[str, str, str]]:
    """(stream, file, text) of everything readable below `root`."""
    if not root.is_dir():
        raise DataError(f"text: {root} is not a folder. Name one that holds source files or prose.")
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(inside.parts) or path.suffix not in PROSE_SUFFIXES | {".py"}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if path.suffix in PROSE_SUFFIXES:
            yield "documentation", str(inside), text
        else:
            yield from split_python(str(inside), text)


def split_python(name: str, source: str) -> Iterator[tuple[str, str, str]]:
    """The code of one module without its docstrings, then each docstring of some length."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in [node for node in ast.walk(tree) if isinstance(node, owners)]:
        text = ast.get_docstring(node)
        if text is None:
            continue
        string = node.body[0]
        for number in range(string.lineno - 1, string.end_lineno or string.lineno):
            lines[number] = ""
        if len(text) > 80:
            yield "docstrings", f"{name}:{string.lineno}", text
    if code := "".join(lines).strip():
        yield "code", name, code + "\n"


def language_reference() -> Iterator[dict[str, str]]:
    """The chapters of the language reference that Python carries for `help()`."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield {"text": text, "source": f"topics/{name}"}


def train_tokenizer(streams: dict[str, Path], out: Path) -> None:
    """Trains on an equal share of every stream's text; does nothing where it was done before."""
    if (out / "tokenizer.json").is_file():
        print(f"  {out} is there already.")
        return
    from mptfoundry.tokenizer import train_bpe

    def texts() -> Iterable[str]:
        for path in streams.values():
            budget = TOKENIZER_BYTES // len(streams)
            with path.open() as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    budget -= len(text)
                    if budget < 0:
                        break
                    yield text

    train_bpe(texts(), VOCAB_SIZE, out)
    print(f"  {out}")


def command(words: list[str]) -> None:
    """Prints a command and runs it from this environment; a failure ends the quickstart."""
    print(f"  $ {show(words)}", flush=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    subprocess.run(words, check=True, env=environment)


def show(words: list[str]) -> str:
    return " ".join(word if " " not in word else f"'{word}'" for word in words)


def announce(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


def summary(run_folder: Path, out: Path, seconds: float) -> str:
    """The closing table, read from the run's metrics."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in steps]
    tokens_per_second = sorted(row["tokens_per_second"] for row in steps if row.get("tokens_per_second"))
    middle = tokens_per_second[len(tokens_per_second) // 2]
    tokens_per_step = steps[-1]["tokens"] / steps[-1]["batch"]
    table = {
        "training loss": f"{steps[0]['loss']:.2f} at first, {mean_at_the_end(losses):.2f} in the last 5 %",
        "steps, tokens": f"{steps[-1]['batch']}, {steps[-1]['tokens']:,}",
        "time per step": f"{tokens_per_step / middle * 1000:.0f} ms",
        "tokens per second": f"{middle:,.0f}",
        **task_rows(out),
        "this time, all steps": f"{seconds:.0f} s",
        "report with a picture": str(run_folder / "report.md"),
        "checkpoints, metrics": str(run_folder),
        "Hugging Face folder": str(out / "hf"),
        "talk to it": f"mptfoundry chat {out / 'hf'}",
    }
    width = max(map(len, table))
    return "\n" + "\n".join(f"  {key:{width}}  {value}" for key, value in table.items())


def task_rows(out: Path) -> dict[str, str]:
    """The accuracies of the tasks, with those of random answers."""
    from quickstart_tasks import accuracies

    results = out / "tasks" / "results" / "eval.json"
    return accuracies(results) if results.is_file() else {}


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
