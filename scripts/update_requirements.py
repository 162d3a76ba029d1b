"""Resolve the pinned lists in mptfoundry/requirements/ again and print what changed.

    python scripts/update_requirements.py [set=current|composer-pins]

It needs uv (part of the `dev` extra) and a package index. `composer-pins` is what pip resolves from
pyproject.toml alone. `current` ignores the limits that Composer and StreamingDataset declare for the packages
in OVERRIDES: neither library has had a release since, and the tests show that the newer packages work. Each
set is two files: NAME.txt, all that a run needs, and NAME-dev.txt, what tests, docs and extras need in
addition. Run the tests after an update: they also compare the lists with pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from mptfoundry.plan.install_sets import FOLDER, PYTHONS

ROOT = Path(__file__).resolve().parent.parent
# Versions are those that the tests last passed with; no version means the newest.
OVERRIDES = [
    "torch==2.14.1",
    "torchvision==0.29.1",
    "transformers==5.24.0",
    "mosaicml-streaming==0.13.0",
    "numpy==2.4.6",  # Triton's interpreter, which tests the kernels, has not been tried with 2.5
    "datasets",
    "huggingface-hub",
    "pillow",
    "torchmetrics",
]
# Extras whose packages are in NAME-dev.txt. Without flash (compiled against an installed torch), spark (needs
# Java), bitsandbytes (needs a GPU for most of what it does), float8 (transformers imports torchao wherever it
# is installed, which takes two seconds) and cometml (its server has not been tried).
EXTRAS = ("peft", "eval", "tensorboard", "wandb", "mlflow", "dev")
HEAD = {
    "current": "# Today's packages, for Python 3.11 to 3.14: what `make install` installs.",
    "composer-pins": "# What pip resolves within Composer's own limits, for Python 3.10 to 3.13.",
}
NOTE = "# Written by scripts/update_requirements.py. Install with: pip install --no-deps -r"


def main(words: list[str]) -> int:
    names = [word.removeprefix("set=") for word in words] or list(PYTHONS)
    if not set(names) <= PYTHONS.keys():
        print("error: the only words are set=current and set=composer-pins.", file=sys.stderr)
        return 2
    for name in names:
        whole = resolve(name, EXTRAS)
        # Both files agree: a run's packages are resolved among the pins of the whole.
        needed = resolve(name, (), constraints=whole)
        write(FOLDER / f"{name}.txt", [HEAD[name], f"{NOTE} {name}.txt", *needed])
        more = [line for line in whole if line not in needed]
        write(FOLDER / f"{name}-dev.txt", [HEAD[name], f"{NOTE} {name}-dev.txt", f"-r {name}.txt", *more])
    return 0


def resolve(name: str, extras: Sequence[str], constraints: Sequence[str] = ()) -> list[str]:
    """The pins of all packages that the project and `extras` need in a set, Linux only."""
    oldest, newest = PYTHONS[name]
    words = ["--universal", "--python-version", "{}.{}".format(*oldest)]
    words += [word for extra in extras for word in ("--extra", extra)]
    overrides = OVERRIDES if name == "current" else ()
    done = uv_compile(ROOT / "pyproject.toml", words, constraints, overrides)
    if done.returncode:
        raise SystemExit(f"error: uv could not resolve the set {name}:\n{done.stderr}")
    return [line for line in done.stdout.splitlines() if used_on_linux(line, oldest, newest)]


def uv_compile(
    requirements: Path | Sequence[str],
    words: Sequence[str],
    constraints: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Resolve a pyproject.toml, or a list of requirements, with uv; the pins are its output, one a line."""
    with tempfile.TemporaryDirectory() as folder:

        def file(name: str, lines: Sequence[str]) -> str:
            Path(folder, name).write_text("\n".join(lines) + "\n")
            return name

        source = str(requirements) if isinstance(requirements, Path) else file("in.txt", requirements)
        command = ["uv", "pip", "compile", source, "--quiet", "--no-header", "--no-annotate", *words]
        command += ["--constraint", file("constraints.txt", constraints)]
        command += ["--override", file("overrides.txt", overrides)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def used_on_linux(line: str, oldest: tuple[int, int], newest: tuple[int, int]) -> bool:
    """Whether some Linux machine with a Python from `oldest` to `newest` installs this pin."""
    marker = Requirement(line).marker
    return marker is None or any(marker.evaluate(each) for each in environments(oldest, newest))


def environments(oldest: tuple[int, int], newest: tuple[int, int]) -> Iterator[dict[str, str]]:
    """The environments that a set is made for, as pip's markers see them."""
    for minor in range(oldest[1], newest[1] + 1):
        for machine in ("x86_64", "aarch64"):
            yield {
                "python_version": f"3.{minor}",
                "python_full_version": f"3.{minor}.1",
                "platform_machine": machine,
                "sys_platform": "linux",
                "platform_system": "Linux",
                "os_name": "posix",
                "implementation_name": "cpython",
                "platform_python_implementation": "CPython",
                "extra": "",
            }


def write(path: Path, lines: list[str]) -> None:
    """Write a list and print each pin that is new, gone or changed."""
    old = set(path.read_text().splitlines()) if path.exists() else set()
    path.write_text("\n".join(lines) + "\n")
    changes = [f"  - {line}" for line in sorted(old - set(lines))]
    changes += [f"  + {line}" for line in sorted(set(lines) - old)]
    print(f"{path.relative_to(ROOT)}: {len(changes) or 'no'} changes")
    for line in sorted(changes, key=lambda line: line[4:]):
        print(line)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
