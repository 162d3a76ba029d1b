"""Check llm-foundry's own YAMLs for MPT, unchanged and with a misspelt key, as its users would bring them.

    python scripts/check_llmfoundry.py CLONE [tags=v0.1.0,v0.7.0]

CLONE is the path of a clone of https://github.com/mosaicml/llm-foundry; its files are read with `git show`,
so nothing is checked out. `tags` are the versions to read, next to HEAD (default: v0.1.0 to v0.7.0).
Each file has to pass `mptfoundry check` on this machine, and its copy with a misspelt key must not. The
script exits with 1 if one does not behave so.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mptfoundry.cli import main as run_mptfoundry

TAGS = "v0.1.0,v0.2.0,v0.3.0,v0.4.0,v0.5.0,v0.6.0,v0.7.0"
FINETUNING = "mpt-7b_dolly_sft mpt-30b-instruct 1b_local_data_sft 7b_dolly_sft mpt-7b_domain_adapt"
# The layout of v0.1, then that of all later versions.
NAMES = [
    r"scripts/train/yamls/mpt/(?!testing)\w+\.yaml",
    r"scripts/train/yamls/mpt/finetune/\w+\.yaml",
    r"scripts/train/yamls/pretrain/mpt-[\w-]+\.yaml",
    rf"scripts/train/yamls/finetune/({'|'.join(FINETUNING.split())})\.yaml",
    r"scripts/eval/yamls/mpt_eval\.yaml",
]
# (what is written, what a user might type instead); the first that a file has is misspelt.
MISSPELT = [("max_duration:", "max_durations:"), ("device_eval_batch_size:", "device_eval_batchsize:")]


def main(words: list[str]) -> int:
    clone, options = words[0], dict(word.split("=", 1) for word in words[1:])
    versions = [tag for tag in options.get("tags", TAGS).split(",") if tag]
    wrong = 0
    for version in [*versions, "HEAD"]:
        files = [path for path in listed(clone, version) if any(re.fullmatch(name, path) for name in NAMES)]
        results = [tried(clone, version, path) for path in files]
        failed = [(path, why) for path, why in zip(files, results, strict=True) if why]
        wrong += len(failed)
        print(f"{version}: {len(files) - len(failed)} of {len(files)} files behave", flush=True)
        for path, why in failed:
            print(f"  {path}: {why}", flush=True)
    return 1 if wrong else 0


def listed(clone: str, version: str) -> list[str]:
    return git(clone, "ls-tree", "-r", "--name-only", version).splitlines()


def tried(clone: str, version: str, path: str) -> str:
    """What is wrong with how `check` judges a file and its misspelt copy; empty if nothing is."""
    text = git(clone, "show", f"{version}:{path}")
    code, said = check(text, Path(path).name)
    if code:
        return f"is refused with {code}: {said}"
    for right, wrong in MISSPELT:
        if right in text:
            code, said = check(text.replace(right, wrong), Path(path).name)
            return "" if code == 2 and wrong[:-1] in said else f"{wrong} passes: {code}, {said}"
    return "has no key that is misspelt"


def check(text: str, name: str) -> tuple[int, str]:
    """The exit code of `mptfoundry check`, and its errors."""
    errors = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_text(text)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = run_mptfoundry(["check", str(file)])
    return code, errors.getvalue().strip()


def git(clone: str, *words: str) -> str:
    return subprocess.run(["git", "-C", clone, *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
