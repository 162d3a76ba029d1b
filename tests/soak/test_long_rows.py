"""A step over long rows: its memory is far from that of a matrix of all pairs of tokens."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOKENS, HEADS = 4096, 4


def test_a_storywriters_step_has_no_matrix_of_all_pairs() -> None:
    measured = runpy.run_path(str(ROOT / "scripts" / "bench_long_context.py"))["in_a_process_of_its_own"]
    row = measured(TOKENS, [f"model.n_heads={HEADS}", "model.vocab_size=512"])
    assert row["peak"] - row["before"] < HEADS * TOKENS**2 * 4
