"""`scripts/bench_train.py`, and what it shares with the roofline: operators, their bytes and FLOPs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_train
from operators import PARTS, Recorder, accesses, bytes_of

ROOT = Path(__file__).parent.parent
TINY = ["max_seq_len=64", "model.d_model=32", "model.n_heads=2", "model.n_layers=2", "model.vocab_size=128"]
TINY += ["global_train_batch_size=4", "device_train_microbatch_size=2", "precision=fp32"]


def test_a_run_is_measured_by_part_with_its_peers_and_the_hardwares_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "train.json", tmp_path / "train.png"
    words = ["steps=2", "repeats=1", f"out={out}", f"picture={picture}", *TINY]
    assert bench_train.main([str(ROOT / "configs/mpt-tiny.yaml"), *words]) == 0
    result = json.loads(out.read_text())
    step, parts = result["step"], {part["part"]: part for part in result["parts"]}
    assert step["microbatch"] == 2 and step["batch x seq_len"] == "4 x 64"
    assert step["tokens per second"] > 0 and step["step over the limit"] > 0 and step["peak GiB"] > 0
    assert list(parts) == list(PARTS)
    # 2 microbatches of 128 tokens: 6 per weight of a matrix, of which 12 * 32 * 32 are in a layer.
    assert parts["matrix products"]["gflops"] * 1e9 == 6 * 256 * (2 * 12 * 32 * 32 + 128 * 32)
    assert all(parts[name]["milliseconds"] > 0 for name in PARTS if name != "casts and copies")
    expected = {"bare matrix products", "attention, SDPA, bias tensor", "attention, SDPA, causal, no bias"}
    assert expected | {"attention, ours, torch (auto)"} <= result["peers"].keys()
    assert picture.stat().st_size > 1000 and "tokens per second" in capsys.readouterr().out


def test_a_benchmark_without_a_config_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_train.main(["steps=2"]) == 2
    assert "give the config first" in capsys.readouterr().err


def test_an_operator_counts_what_it_reads_and_writes() -> None:
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    table, rows = torch.ones(1000, 8), torch.tensor([1, 2])
    with Recorder() as recorder:
        x + y
        x.add_(y)
        x.copy_(y)
        x.view(8, 4)
        table[rows]
        torch.mm(x, y.T)
        recorder.phase = "optimizer"
        torch._foreach_add_([x, y], 1.0)
    counted = [(each.part, each.name, each.bytes, each.flops) for each in recorder.operators]
    assert counted == [
        ("elementwise and norms", "aten::add.Tensor", 3 * 128, 0),
        ("elementwise and norms", "aten::add_.Tensor", 3 * 128, 0),
        ("casts and copies", "aten::copy_", 2 * 128, 0),
        ("elementwise and norms", "aten::index.Tensor", 2 * 64, 0),
        ("matrix products", "aten::mm", 2 * 128 + 64, 2 * 4 * 4 * 8),
        ("optimizer", "aten::_foreach_add_.Scalar", 2 * 2 * 128, 0),
    ]
    expanded = torch.ones(1, 8).expand(100, 8)
    assert bytes_of("aten::sum", [expanded], [], []) == 32


def kernel(weight_pointer, grad_pointer, out_pointer, n, BLOCK):  # type: ignore[no-untyped-def]
    import triton.language as tl

    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = weight_pointer + places
    weight = tl.load(weights, mask=places < n)
    grad = tl.load(grad_pointer + places, mask=places < n)
    weights += 0
    tl.store(weights, weight - grad, mask=places < n)
    tl.store(out_pointer + places, grad, mask=places < n)


class Jitted:
    """What is asked of a Triton kernel."""

    fn = staticmethod(kernel)
    arg_names = ("weight_pointer", "grad_pointer", "out_pointer", "n", "BLOCK")


def test_a_kernels_launch_counts_what_its_code_loads_and_stores() -> None:
    reads, writes = accesses(Jitted)
    pointers = {"weight_pointer", "grad_pointer", "out_pointer"}
    assert reads & pointers == {"weight_pointer", "grad_pointer"}
    assert writes & pointers == {"weight_pointer", "out_pointer"}
    recorder = Recorder()
    recorder.launch(Jitted, {name: torch.ones(16) for name in pointers} | {"n": 16, "BLOCK": 16})
    assert [(each.name, each.bytes) for each in recorder.operators] == [("triton::kernel", 4 * 64)]
