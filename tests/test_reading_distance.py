"""How many lines a reader has to walk through to follow a run, held so that it only shrinks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.measure_run import STORY
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

# Lines of the functions that a run enters: of the story, of everything. They are lowered, never raised.
# The run is forked from a process that has imported everything, so functions that only imports call are not
# among them: `python scripts/measure_run.py` counts 11 lines of the story and 20 of everything more.
LIMITS = {"pretraining": (2190, 4980), "finetuning": (3015, 5880)}


@pytest.mark.parametrize("run", ["pretraining", pytest.param("finetuning", marks=pytest.mark.soak)])
def test_a_run_enters_no_more_lines_than_it_did(run: str, tmp_path: Path) -> None:
    words = f"run={run}", f"json={tmp_path / 'found.json'}"
    done = run_on_ranks("scripts/measure_run.py", *words, ranks=1)
    assert done.returncode == 0, done.stdout
    rooms = json.loads((tmp_path / "found.json").read_text())["rooms"]
    story = sum(counts["of functions"] for room, counts in rooms.items() if room in STORY)
    everything = sum(counts["of functions"] for counts in rooms.values())
    assert story <= LIMITS[run][0] and everything <= LIMITS[run][1], (story, everything)
