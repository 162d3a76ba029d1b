"""Teach the quickstart's model to write docstrings: `make finetune-demo` runs this after `make quickstart`.

It makes examples from Python's standard library, a function's signature and the first paragraph of its
docstring, and runs the project's own commands: generate, train, export, generate. If you run it again, it
continues where it stopped.

    python scripts/finetune_demo.py [key=value of configs/finetune-demo.yaml ...]
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from quickstart import OUT, ROOT, SKIPPED_FOLDERS, command, show

CONFIG = "configs/finetune-demo.yaml"
BASE, EXAMPLES, RUN, FOLDER = OUT / "run", OUT / "finetune", OUT / "finetuned", OUT / "finetuned-hf"
LONGEST_DOCSTRING = 300
HELD_OUT_OF_256 = 13
PROMPTS = (
    'def read_text(path, encoding=None):\n    """',
    'def is_closed(self):\n    """',
    'def remove(self, key, default=None):\n    """',
)


def main(words: list[str]) -> int:
    os.chdir(ROOT)
    if not (BASE / "config.yaml").is_file():
        print(f"error: {BASE} is missing. Run `make quickstart` first.", file=sys.stderr)
        return 1
    try:
        run(words)
    except subprocess.CalledProcessError as error:
        print(f"error: this step failed, see above: {show(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def run(words: list[str]) -> None:
    """All steps in order."""
    print("\n[1/5] examples: signature -> docstring, out of Python's standard library")
    write_examples(EXAMPLES)
    print("\n[2/5] before: the quickstart's model continues three signatures", flush=True)
    generate(BASE)
    print("\n[3/5] train", flush=True)
    command(["composer", "scripts/train.py", CONFIG, f"save_folder={RUN}", *words])
    print("\n[4/5] export: a folder that stock transformers loads", flush=True)
    command(["mptfoundry", "export", str(RUN), str(FOLDER), "dtype=fp32", "overwrite=true"])
    print("\n[5/5] after: the exported folder continues the same signatures", flush=True)
    generate(FOLDER)
    print(f"\n  report with a picture  {RUN / 'report.md'}")
    print(f"  what it learned from   mptfoundry preview {CONFIG}")


def generate(model: Path) -> None:
    options = ["max_new_tokens=48", "temperature=0.3"]
    command(["mptfoundry", "generate", str(model), *PROMPTS, *options])


def write_examples(out: Path) -> None:
    """Writes train.jsonl and val.jsonl; the same text always goes to the same one of them."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "val": []}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            for prompt, response in examples_of(path):
                row = json.dumps({"prompt": prompt, "response": response, "source": path.name}) + "\n"
                is_held_out = hashlib.sha256(row.encode()).digest()[0] < HELD_OUT_OF_256
                rows["val" if is_held_out else "train"].append(row)
    for split, written in rows.items():
        (out / f"{split}.jsonl").write_text("".join(written), encoding="utf-8")
        print(f"  {out / split}.jsonl: {len(written):,} examples")


def examples_of(path: Path) -> Iterator[tuple[str, str]]:
    """The functions of a module: what stands before a docstring, and its first paragraph."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        if 0 < len(paragraph) <= LONGEST_DOCSTRING:
            yield f'def {node.name}({ast.unparse(node.args)}):\n    """', f'{paragraph}"""'


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
