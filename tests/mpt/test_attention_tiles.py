"""The kernels with the tiles that ship, compiled for GPUs that are not here, and the table's own rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.mpt.attention_tiles import TILES, Tile, padded, tile_of

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# The width of the published models. `make soak` compiles ESSENTIAL for all architectures, the script all.
PUBLISHED = "arch=90 group=1 dtype=bfloat16 head_dim=128 features=alibi+documents"
ESSENTIAL = (
    "group=1 dtype=bfloat16 head_dim=64,80,128,256 features=alibi+documents "
    "and group=1 dtype=bfloat16 head_dim=128 features=causal,alibi,alibi+gaps "
    "and group=1 dtype=bfloat16 head_dim=64,128 features=everything "
    "and group=4 dtype=bfloat16 head_dim=128 features=alibi+documents "
    "and group=1 dtype=float32 head_dim=64 features=alibi+documents"
)
IS_SOAK = os.environ.get("MPTFOUNDRY_SOAK") == "1"
LION = "and arch=80,90 features=lion head_dim=0 group=1 dtype=float32"
REFUSED = """
import sys

import compile_kernels
from compile_kernels import TRITON, Case, compile_case, triton, why_refused
from mptfoundry.mpt.attention_tiles import Tile

if __name__ == "__main__":
    assert not compile_kernels.main(sys.argv[1:])
    print("REFUSED")
    tile = ("forward", Tile(128, 128, 4, 2))
    (row,) = compile_case(Case(90, 64, "causal", kernels=("forward_kernel",), tiles=(tile,)))
    # Another Triton may compile it without spills, and is not judged by them.
    print(row["spilled"] > 0 or not triton.__version__.startswith(TRITON))
    compile_kernels.TRITON = triton.__version__
    print(why_refused(row | {"spilled": 8}))
    serial = row | {"spilled": 0, "warnings": ["C7515"]}
    for compile_kernels.SERIAL in (triton.__version__, "another"):
        print(why_refused(serial))
    key = (compile_kernels.VERSION, *compile_kernels._key(row))
    compile_kernels.recorded = lambda: {key: {"spilled": "0", "loop": "100"}}
    for change in ({}, {"spilled": 8}, {"loop": 103}):
        print(compile_kernels.why_worse(row | {"tiles": (), "spilled": 0, "loop": 102} | change))
    row["warnings"] = []
    for change in ({"dots_on_cores": 3}, {"dots": 2}, {"mma": 8}, {"shared": 240_000}):
        print(why_refused(row | {"spilled": 0} | change))
"""


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """In a process that compiles kernels instead of interpreting them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """What `scripts/compile_kernels.py` finds, and then what REFUSED prints, of one process."""
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    words = f"{ESSENTIAL} processes=2" if IS_SOAK else f"{PUBLISHED} processes=1"
    done = run(["-c", REFUSED, *words.split(), *LION.split(), f"out={out}"], timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout.partition("REFUSED\n")[2].splitlines()


def test_what_training_uses_compiles_without_spills_onto_tensor_cores(
    compiled: tuple[list[dict[str, Any]], list[str]],
) -> None:
    rows = compiled[0]
    lion = [row for row in rows if row["kernel"] == "lion_kernel"]
    assert [(row["arch"], row["spilled"]) for row in lion] == [(80, 0), (90, 0)]
    # A bfloat16 gradient takes the layout of the float32 weights there.
    assert all(row["shared"] <= 8192 for row in lion)
    rows = [row for row in rows if row not in lion]
    assert {row["kernel"] for row in rows} == {
        f"{name}_kernel" for name in ("forward", "backward_query", "backward_key", "decode", "join")
    }
    architectures = {row["arch"] for row in rows}
    assert architectures >= {80, 90} if IS_SOAK else architectures == {90}
    assert len(rows) == (len(architectures) * (11 * 5 - 2 * 2) if IS_SOAK else 5)
    assert all(row["loop"] > 0 for row in rows if row["wgmma"] or row["mma"])


def test_a_spill_a_lost_product_and_too_much_shared_memory_are_refused(
    compiled: tuple[list[dict[str, Any]], list[str]],
) -> None:
    assert compiled[1] == [
        "True",
        "8 bytes are spilled, 0 may be",
        "None",
        "the assembler waits for each wgmma before the next (C7515)",
        "None",
        "8 bytes are spilled, 0 were",
        "its loop has 103 instructions, 100 were in it",
        "1 of its matrix products are not done by tensor cores",
        "it has 2 matrix products, not 4",
        "its matrix products are not done by wgmma",
        "it takes 240000 bytes of shared memory, there are 232448",
    ]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((10, 3), "sm_90"),
        ((11, 0), "sm_80"),
        ((12, 0), "sm_80"),
        ((12, 1), "sm_80"),
    ],
)
def test_a_gpu_of_little_shared_memory_has_the_smaller_tiles(capability: tuple[int, int], name: str) -> None:
    assert tile_of("forward", 128, capability, 2) == TILES[name]["forward"][128]


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("name", TILES)
def test_every_width_has_tiles_whose_blocks_of_queries_fit_forwards(name: str, has_dropout: bool) -> None:
    capability, number_bytes = {"sm_90": ((9, 0), 2), "sm_80": ((8, 0), 2), "float32": ((9, 0), 4)}[name]
    for head_dim in range(16, 257):
        device = (head_dim, capability, number_bytes)
        tiles = {kernel: tile_of(kernel, *device, has_dropout=has_dropout) for kernel in TILES[name]}
        table = TILES[name]["forward"][padded(head_dim)]
        assert tiles["forward"].block_q == table.block_q
        assert (tiles["forward"] == table) or has_dropout
        assert min(min(tile[:2]) for tile in tiles.values()) >= 16
        # Backward goes by where forward's block stopped, so a block of its queries lies in one of them.
        assert tiles["forward"].block_q % tiles["backward_query"].block_q == 0


def test_a_tile_that_is_tuned_for_forward_leaves_backward_one_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from tune_attention import fit_backward

    table = {"forward": {64: Tile(32, 64, 4, 3)}, "backward_query": {64: Tile(128, 64, 8, 3)}}
    fit_backward(table, 64)
    assert table["backward_query"] == {64: Tile(32, 64, 8, 3)}
