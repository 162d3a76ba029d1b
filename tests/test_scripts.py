"""Every script answers `--help` with what it is, and does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
STARTED = [path for path in sorted(SCRIPTS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.name)
def test_a_script_takes_its_words_from_what_answers_help(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    )
    text = ast.unparse(block)
    assert "given_words(__doc__)" in text or "main(['" in text, text


@pytest.mark.parametrize("name", ["quickstart.py", "gpu.py"])
def test_help_prints_the_scripts_head_and_runs_no_step(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / name), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    head = ast.get_docstring(ast.parse((SCRIPTS / name).read_text()))
    assert found.returncode == 0 and found.stdout.strip() == head
    assert list(tmp_path.iterdir()) == []
