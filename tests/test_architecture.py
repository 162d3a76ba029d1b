"""The tree is the diagram: imports go down, rooms of one floor don't see one another."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mptfoundry"
# A room is a folder of the package, with the name of its parent before it, or a file at the top.
FLOORS = [
    ["errors", "places", "mpt"],
    ["files", "ranks", "plugins", "config/engine", "data/shards"],
    ["stores", "architecture"],
    ["config", "tokenizer"],
    ["plan", "checkpoints", "generation", "optim", "evals", "data", "data/records"],
    ["models", "run", "forecast", "data/text", "data/prepare", "data/examples"],
    [
        "export",
        "callbacks",
        "data/views",
        "data/own",
        "tasks",
        "explain",
        "doctor",
        "cluster_health",
        "completion",
        "vocabulary",
    ],
    ["build", "loaders", "check"],
    ["train", "evaluate", "preview", "compare", "cluster_plan", "launch"],
    ["commands"],
    ["cli"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    folder = path.relative_to(PACKAGE).parent
    return path.stem if folder == Path() else folder.as_posix()


def file_of(module: str) -> Path | None:
    """The file of a module of ours, or of one that a name was imported from; None for other people's."""
    parts = module.split(".")
    while parts and parts[0] == "mptfoundry":
        path = PACKAGE.joinpath(*parts[1:]).with_suffix(".py")
        if path in FILES:
            return path
        parts.pop()
    return None


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


IMPORTS = {path: {file_of(module) for module in imported_modules(path)} - {None, path} for path in FILES}


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in FILES} == set(FLOOR_OF)


def test_imports_go_down() -> None:
    """No exceptions: what two rooms of one floor share lies below both."""
    up = [
        f"{path.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}"
        for path, others in IMPORTS.items()
        for other in others
        if room_of(path) != room_of(other) and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(path)]
    ]
    assert not up


def test_files_of_a_room_import_one_another_in_no_circle() -> None:
    left = {path: set(others) for path, others in IMPORTS.items()}
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    assert not left


def test_a_room_has_at_most_twelve_files() -> None:
    """`mpt` is flat because an export copies it."""
    counts = Counter(room_of(path) for path in FILES if path.parent != PACKAGE)
    assert not {room: n for room, n in counts.items() if n > (24 if room == "mpt" else 12)}


def test_two_files_of_one_name_mean_the_same() -> None:
    names = Counter(path.name for path in FILES)
    assert {name for name, count in names.items() if count > 1} <= {"heads.py", "streams.py"}


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
    [
        "mptfoundry.cli",
        "mptfoundry.check",
        "mptfoundry.config.load, mptfoundry.explain",
        "mptfoundry.compare.compare",
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(modules: str) -> None:
    heavy = "{'torch', 'composer', 'transformers', 'streaming', 'matplotlib', 'numpy'}"
    code = f"import sys, {modules}; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in FILES:
        text, name = path.read_text(), str(path.relative_to(PACKAGE))
        if text.count("\n") > (900 if name == "mpt/attention_kernels.py" else 600):
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0  # type: ignore[operator]
                if node.end_lineno - node.lineno - described >= 60:  # type: ignore[operator]
                    long.append(f"{name}: {node.name}")
    assert not long


def test_there_is_one_way_to_ask_for_the_rank() -> None:
    """`ranks.py` knows it without torch; streaming's own world is asked where its code is replaced."""
    asks = re.compile(r"dist\.get_(global_rank|local_rank|world_size)\(|environ\S*[\"'](LOCAL_)?RANK[\"']")
    others = [path for path in FILES if path.stem not in ("ranks", "shared_names")]
    assert not [str(path) for path in others if asks.search(path.read_text())]


def test_packages_hold_no_logic() -> None:
    for path in PACKAGE.rglob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, (ast.Expr, ast.Assign)) for node in body), path


def test_the_repository_holds_nothing_that_a_run_wrote() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, so what is tracked is not known")
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    folders = ["clusters", "configs", "docker", "docs", "mptfoundry", "scripts", "tests", ".ci"]
    texts = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"]
    assert names <= {
        *folders,
        *texts,
        "Makefile",
        "mkdocs.yml",
        "pyproject.toml",
        ".gitignore",
        ".dockerignore",
    }
