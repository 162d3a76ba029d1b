"""Run everything that needs a GPU with one command: `make gpu`. Kernels are compiled in parallel first, so
that tests and benchmarks find them in Triton's cache.

    python scripts/gpu.py [out=FILE.json]

It takes less than ten minutes on one GPU and prints a table; `out` gets the same as JSON, with the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the tests and benchmarks launch.
KERNELS = (
    "arch={arch} dtype=bfloat16 group=1 features=alibi+documents "
    "and arch={arch} dtype=bfloat16 group=1 head_dim=64,128 "
    "features=causal,alibi,alibi+unskipped,alibi+documents+unskipped "
    "and arch={arch} dtype=bfloat16 group=1 head_dim=128 features=alibi+window,alibi+softcap,alibi+prefix "
    "and arch={arch} dtype=bfloat16 group=4 head_dim=128 "
    "features=alibi+documents,alibi+documents+window+prefix+softcap "
    "and arch={arch} dtype=float16,float32 group=1 head_dim=64,128 features=alibi+documents"
)
# Name, command, seconds it may take. A benchmark writes its rows as JSON to the file it is given as `out`.
STEPS = [
    ("kernels", [sys.executable, "scripts/compile_kernels.py", *KERNELS.split(), "out={out}"], 100),
    ("tests", [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider"], 180),
    ("attention", [sys.executable, "scripts/bench_attention.py", "out={out}"], 170),
    ("training step", [sys.executable, "scripts/bench_step.py", "out={out}"], 150),
]


def main(words: list[str]) -> int:
    import torch

    from mptfoundry.mpt.attention_tiles import generation_of

    if not torch.cuda.is_available():
        print("error: no GPU found here. Run this on a machine with one.", file=sys.stderr)
        return 1
    options = dict(word.split("=", 1) for word in words)
    arch = int(generation_of(torch.cuda.get_device_capability()).removeprefix("sm_"))
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": [run(name, command, seconds, arch) for name, command, seconds in STEPS],
    }
    print(table(report))
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(step["exit_code"] == 0 for step in report["steps"]) else 1  # type: ignore[attr-defined]


def run(name: str, command: list[str], seconds: int, arch: int) -> dict[str, object]:
    """Runs one step with its output visible; what it wrote to `out` comes back under `rows`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        words = [word.format(out=out, arch=arch) for word in command]
        print(f"\n== {name}: {' '.join(words)}", flush=True)
        started_at = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        try:
            exit_code = subprocess.run(words, cwd=ROOT, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            exit_code = 124
        return {
            "name": name,
            "exit_code": exit_code,
            "seconds": round(time.monotonic() - started_at, 1),
            "rows": json.loads(out.read_text()) if out.is_file() else None,
        }


def table(report: dict[str, object]) -> str:
    lines = [f"\n{report['device']}, torch {report['torch']}"]
    for step in report["steps"]:  # type: ignore[attr-defined]
        result = "ok" if step["exit_code"] == 0 else f"failed ({step['exit_code']})"
        lines.append(f"  {step['name']:16} {result:14} {step['seconds']:6.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
