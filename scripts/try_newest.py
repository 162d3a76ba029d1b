"""Try the newest release of each dependency and print a table.

    python scripts/try_newest.py [packages=torch,transformers] [tests=PATH,...]

Each package that is newer than in the list of the installed set goes, alone with what it needs, into a
temporary folder before this environment on PYTHONPATH, and the tests run with it. The others are listed as
newest. It needs uv and a package index; a new torch takes gigabytes and minutes. The exit code is 3 if a test
failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from tabulate import tabulate
from update_requirements import uv_compile

from mptfoundry.plan.install_sets import installed_set, pins

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch,torchvision,transformers,tokenizers,safetensors,mosaicml,mosaicml-streaming,omegaconf,datasets,"
    "huggingface-hub,numpy,matplotlib"
)
TESTS = "tests/test_train.py,tests/test_generation.py,tests/mpt/test_hf.py"


def main(words: list[str]) -> int:
    options = {"packages": PACKAGES, "tests": TESTS}
    try:
        given = dict(word.split("=", 1) for word in words)
    except ValueError:
        given = {"": ""}
    if given.keys() - options.keys():
        print("error: the words are packages=... and tests=..., as --help says.", file=sys.stderr)
        return 2
    options.update(given)
    name, _ = installed_set()
    pinned, rows, failed = pins(name), [], False
    for package in options["packages"].split(","):
        newest = resolve([package], deep=False)[package]
        if newest == pinned.get(package):
            rows.append([package, newest, newest, "is the newest"])
        else:
            result, passed = try_package(package, newest, pinned, options["tests"].split(","))
            rows.append([package, pinned.get(package, ""), newest, result])
            failed |= not passed
        print(f"{package}: {rows[-1][-1]}", file=sys.stderr, flush=True)
    print(tabulate(rows, headers=["package", f"in {name}", "newest", "tests"], disable_numparse=True))
    return 3 if failed else 0


def resolve(
    requirements: list[str], constraints: list[str] | None = None, deep: bool = True
) -> dict[str, str]:
    """Package -> version as uv resolves it, with dependencies if `deep`; empty if it finds none."""
    words = ["--python", sys.executable, *([] if deep else ["--no-deps"])]
    done = uv_compile(requirements, words, constraints or [])
    chosen = map(Requirement, done.stdout.splitlines()) if done.returncode == 0 else ()
    return {each.name: str(each.specifier).removeprefix("==") for each in chosen}


def try_package(package: str, version: str, pinned: dict[str, str], tests: list[str]) -> tuple[str, bool]:
    """Run the tests with one package replaced; returns how they ended in words, and whether all passed."""
    others = [f"{name}=={each}" for name, each in pinned.items() if name != package]
    wanted = [f"{package}=={version}"]
    needs = resolve(wanted, constraints=others) or resolve(wanted)
    changed = [f"{name}=={each}" for name, each in needs.items() if pinned.get(name) != each]
    with tempfile.TemporaryDirectory() as folder:
        install = ["uv", "pip", "install", "--quiet", "--no-deps"]
        install += ["--target", folder, "--python", sys.executable]
        subprocess.run([*install, *(changed or wanted)], check=True)
        paths = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env=paths, cwd=ROOT, capture_output=True, text=True)
    ends = re.findall(r"^(?:FAILED|ERROR) .*|^\d+ .*in [\d.]+s.*", done.stdout, re.MULTILINE)
    also = f" (with {', '.join(changed[1:])})" if len(changed) > 1 else ""
    return (
        ends[-1] if done.returncode == 0 else "; ".join(ends[-1:] + ends[:1])
    ) + also, done.returncode == 0


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
