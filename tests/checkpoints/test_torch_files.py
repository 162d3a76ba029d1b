from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mptfoundry.checkpoints.torch_files import load_plain, open_composer_file, open_state_dict
from mptfoundry.errors import CheckpointError
from tests.conftest import RunsCode


def test_a_pickle_that_runs_code_is_refused_by_the_name_of_what_it_calls(tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save(
        {"state": {"model": {"model.a": torch.ones(2)}, "callbacks": RunsCode(f"touch {trace}")}}, file
    )
    with pytest.raises(CheckpointError) as error:
        open_composer_file(file)
    assert str(error.value) == (
        f"{file}: refused, since loading it would call {os.system.__module__}.system. Only tensors and plain "
        "values are read from a checkpoint."
    )
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_one_sentence(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "cut.pt"
    torch.save({"state": {"model": {"model.a": torch.ones(2000)}}}, file)
    os.truncate(file, int(file.stat().st_size * kept))
    with pytest.raises(CheckpointError, match=r"cut.pt: damaged or cut short at [\d,]+ bytes \([^\n]*\)\.$"):
        open_composer_file(file)


def test_a_file_of_torch_before_1_6_is_called_that_and_the_advice_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"written in the format of torch before 1.6") as error:
        open_state_dict(file)
    exec(str(error.value).split("today's, by ")[1].removesuffix("."), {"torch": torch})
    assert torch.equal(open_state_dict(file).read("a"), torch.arange(3.0))


def test_a_damaged_outline_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "flipped.pt"
    torch.save({"state": {"model": {"model.a": torch.ones(20)}}}, file)
    content = bytearray(file.read_bytes())
    start = content.find(b"state")
    content[start - 8 : start + 8] = b"\xff" * 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flipped.pt: damaged, [^\n]*$"):
        open_composer_file(file)


def test_a_file_of_something_else_is_said(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"not a Composer checkpoint; it holds no state.model"):
        open_composer_file(tmp_path / "other.pt")


def test_tensors_are_copies_in_the_dtype_asked_for(tmp_path: Path) -> None:
    values = torch.arange(6000, dtype=torch.float32).reshape(2, 3000)
    torch.save({"state": {"model": {"model.a": values.T, "metric": values}}}, tmp_path / "a.pt")
    weights = open_composer_file(tmp_path / "a.pt")
    assert list(weights.outlines) == ["a"]
    assert weights.note("model") == {}
    for _ in range(2):
        torch.testing.assert_close(weights.read("a"), values.T, rtol=0, atol=0)
    assert weights.read("a", torch.bfloat16).dtype is torch.bfloat16
    weights.read("a").zero_()
    assert weights.read("a")[1, 1] == 3001


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_reading_all_tensors_keeps_one_in_memory(tmp_path: Path) -> None:
    """48 MiB of weights and 48 MiB of moments, 4 MiB each: far less than half stays resident."""
    tensors = {f"model.{n}": torch.ones(1 << 20) for n in range(12)}
    moments = {f"m{n}": torch.ones(1 << 20) for n in range(12)}
    torch.save({"state": {"model": tensors, "optimizers": moments}}, tmp_path / "big.pt")
    code = f"""
import resource, torch
from pathlib import Path
from mptfoundry.checkpoints.torch_files import open_composer_file
weights = open_composer_file(Path({str(tmp_path / "big.pt")!r}))
weights.read("0", torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in weights.outlines:
    weights.read(name, torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(grown.stdout) * 1024 < 16 << 20


def test_random_states_of_numpy_and_times_are_read(tmp_path: Path) -> None:
    import datetime

    import numpy as np

    content = {
        "numpy": np.random.get_state(),
        "scalar": np.float64(1.5),
        "time": datetime.timedelta(seconds=2),
    }
    torch.save(content, tmp_path / "plain.pt")
    found = load_plain(tmp_path / "plain.pt")
    assert (found["scalar"], found["time"]) == (1.5, datetime.timedelta(seconds=2))
    np.testing.assert_array_equal(found["numpy"][1], content["numpy"][1])
