"""The tree is the diagram: imports go down, rooms of one floor don't see one another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mptfoundry"
FLOORS = [
    ["errors", "mpt", "ranks", "signals", "leftovers", "curves", "places"],
    ["config", "devices", "resolve", "plan", "tokenizer", "checkpoints"],
    ["models", "data", "optim", "callbacks", "evals", "generation", "export"],
    ["build", "loaders", "resuming", "facts"],
    ["train", "evaluate", "preview", "doctor", "check"],
    ["cli"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """All modules that a file names in its imports, absolute, also inside functions."""
    package = ["mptfoundry", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in FILES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room_of(path)
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "mptfoundry" or len(parts) < 2 or parts[1] in (own, "__version__"):
            continue
        same_floor_allowed = FLOOR_OF[own] == 1 or parts[1] == "errors"
        assert FLOOR_OF[parts[1]] < FLOOR_OF[own] or (
            same_floor_allowed and FLOOR_OF[parts[1]] == FLOOR_OF[own]
        ), f"{path.name} on floor {FLOOR_OF[own]} imports {module} of floor {FLOOR_OF[parts[1]]}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "mpt"], ids=lambda path: path.name)
def test_the_network_imports_torch_and_its_siblings_only(path: Path) -> None:
    """An export copies this folder: it must live without mptfoundry, and flat; kernels may be missing."""
    always = set(sys.stdlib_module_names) | {"torch"}
    if path.name == "hf.py":
        always |= {"transformers"}
    tried = always | {"flash_attn" if path.name == "attention_flash.py" else "triton"}
    tree = ast.parse(path.read_text())
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    within_try = {node for each in tries for statement in each.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        allowed = tried if node in within_try else always
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and "." not in (node.module or ""), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize(
    "modules",
    ["mptfoundry.cli", "mptfoundry.check", "mptfoundry.config.load, mptfoundry.config.explain"],
)
def test_what_answers_at_once_imports_nothing_heavy(modules: str) -> None:
    heavy = "{'torch', 'composer', 'transformers', 'streaming', 'matplotlib', 'numpy'}"
    code = f"import sys, {modules}; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            docstring = node.body[0] if ast.get_docstring(node) else None
            described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0  # type: ignore[operator]
            assert node.end_lineno - node.lineno - described < 60, node.name


@pytest.mark.parametrize("path", list(PACKAGE.rglob("*/__init__.py")), ids=str)
def test_packages_hold_no_logic(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, (ast.Expr, ast.Assign)) for node in body)
