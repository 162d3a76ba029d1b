"""The two pinned sets of packages that mptfoundry is tested with, and the one that is installed here.

Each set is a list in mptfoundry/requirements/, installed with `pip install --no-deps -r`. `current` has
today's packages; `composer-pins` is what pip resolves within the limits that Composer declares.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mptfoundry.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "requirements"
# set -> its oldest and newest Python
PYTHONS = {"current": ((3, 11), (3, 14)), "composer-pins": ((3, 10), (3, 13))}


def usual_set() -> str:
    """Return the set for this Python: `current`, unless it is too old."""
    return next((name for name in PYTHONS if why_not(name) is None), "current")


def why_not(name: str) -> str | None:
    """Return why this Python can't have a set, and what to do, or None."""
    oldest, newest = PYTHONS[name]
    here = sys.version_info[:2]
    if oldest <= here <= newest:
        return None
    others = [other for other, (low, high) in PYTHONS.items() if low <= here <= high]
    advice = f"Use the set {others[0]}, or" if others else "Use"
    return (
        f"the set {name} is for Python {_dotted(oldest)} to {_dotted(newest)}, and this is "
        f"{_dotted(here)}. {advice} another Python."
    )


def install_command(name: str) -> str:
    """Return the shell command that installs a set into this Python's environment.

    Raises:
        ConfigError: if this Python is too old or too new for the set.
    """
    if problem := why_not(name):
        raise ConfigError(f"install: {problem}")
    return shlex.join(
        [sys.executable, "-m", "pip", "install", "--no-deps", "-r", str(FOLDER / f"{name}.txt")]
    )


def pins(name: str) -> dict[str, str]:
    """Return package -> version for all that a run needs in a set, on this machine."""
    from packaging.requirements import Requirement

    return {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, lines_of(FOLDER / f"{name}.txt"))
        if requirement.marker is None or requirement.marker.evaluate()
    }


def lines_of(path: Path) -> Iterator[str]:
    """Yield the pins of a list, without comments and without those of the list that it includes."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "-")):
            yield line


def installed_set() -> tuple[str, list[str]]:
    """Return the set that is installed here, or is nearest to it, and what differs, one phrase a package."""
    differences = {name: list(_differences(pins(name))) for name in PYTHONS}
    nearest = min(differences, key=lambda name: len(differences[name]))
    return nearest, differences[nearest]


def _differences(wanted: dict[str, str]) -> Iterator[str]:
    for name, version in wanted.items():
        installed = version_of(name)
        if installed is None:
            yield f"{name} is not installed"
        # A local version such as 2.14.1+cpu is the same release.
        elif installed.split("+")[0] != version:
            yield f"{name} {installed} instead of {version}"


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare: 2.14.1+cu130 -> (2, 14, 1)."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.split("+")[0])[:3]) or (0,)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
