"""Run the export tests with another version of transformers than the installed one.

    python scripts/check_transformers.py version=5.23.0 [folder=ENVIRONMENT] [tests=PATH,...]
    python scripts/check_transformers.py version=newest [folder=ENVIRONMENT] [tests=PATH,...]
    python scripts/check_transformers.py python=OTHER/bin/python [tests=PATH,...]

The first two create an environment with that version, accelerate, PEFT and their dependencies; everything
else, such as torch, comes from this environment. `newest` is the version that pip would install today. The
environment is temporary unless `folder` is given. (pip warns that Composer's streaming needs another
transformers; the tests don't import it.) The third uses an existing environment. The exit code is pytest's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "tests/mpt/test_hf.py,tests/mpt/test_hf_generation.py,tests/export"


def main(words: list[str]) -> int:
    options = {"version": "", "python": "", "folder": "", "tests": TESTS}
    given = dict(word.split("=", 1) for word in words)
    if given.keys() - options.keys() or bool(given.get("version")) == bool(given.get("python")):
        print("error: give version=... or python=..., as the head of this file says.", file=sys.stderr)
        return 2
    options.update(given)
    with tempfile.TemporaryDirectory() as temporary:
        python = options["python"]
        if not python:
            python = str(environment(Path(options["folder"] or temporary), options["version"]))
        return check(python, options["tests"].split(","))


def environment(folder: Path, version: str) -> Path:
    """Make an environment around this one with a version of transformers; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        Path(own, "around.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if version == "newest":
        version = newest(str(python))
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"transformers=={version}", "accelerate", "peft"], check=True)
    # This environment's may be too old for that version of transformers, or too new.
    for package, fitting in (("peft", "peft"), ("datasets", "datasets<5")):
        if subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode:
            subprocess.run([*pip, "--upgrade", f"transformers=={version}", fitting], check=True)
    return python


def newest(python: str) -> str:
    """Ask pip for the newest version of transformers that this Python can use."""
    pip = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    answer = subprocess.run(
        [*pip, "--report", "-", "transformers"], check=True, stdout=subprocess.PIPE, text=True
    )
    return str(json.loads(answer.stdout)["install"][0]["metadata"]["version"])


def check(python: str, tests: list[str]) -> int:
    show = "import torch, transformers as t; print('transformers', t.__version__, 'torch', torch.__version__)"
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([python, "-c", show], env=paths, cwd=ROOT, check=True)
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    return subprocess.run(pytest, env=paths, cwd=ROOT).returncode


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
