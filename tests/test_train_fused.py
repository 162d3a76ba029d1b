"""A run whose optimizer makes its step in one pass, or stores its momentum in bfloat16: its numbers, and what
a resumed run does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import ConfigError
from mptfoundry.plan.devices import Device
from mptfoundry.plan.gpus import GPU
from mptfoundry.plan.plan import make_plan
from mptfoundry.run.changes import RunNotes, read_notes
from mptfoundry.run.start import Start
from mptfoundry.train import keep_fused
from tests.conftest import losses
from tests.mpt.conftest import triton_runs
from tests.runs import run, stopped, whole

__all__ = ["run", "stopped", "triton_runs", "whole"]

pytestmark = pytest.mark.usefixtures("triton_runs")
WORDS = ["max_duration=4ba", "save_interval=2ba", "optimizer.fused=true", "log_to_console=false"]
H100 = Device("gpu", "H100", gpus=(GPU("NVIDIA H100", capability=(9, 0)),), memory=2**36, has_bf16=True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=False)["state"]["model"]


def momenta(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=False)["state"]["optimizers"]["DecoupledLionW"]["state"]
    return {name: moments["exp_avg"] for name, moments in state.items()}


def test_a_fused_run_has_the_plain_runs_losses(whole: Path, run: Callable[..., Path]) -> None:
    plain = run("plain", "optimizer.fused=auto")
    assert losses(whole) == pytest.approx(losses(plain), abs=1e-4)
    notes = [read_notes(folder / "ep0-ba2-rank0.pt") for folder in (whole, plain)]
    assert [each is not None and each.fused for each in notes] == [True, False]


def test_a_resumed_run_keeps_the_step_that_its_checkpoint_names(
    stopped: Path, whole: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(stopped.name, "optimizer.fused=auto")
    said = capsys.readouterr().out
    assert "as this run's earlier steps" in said and "optimizer.fused: True -> auto" in said
    one, other = weights(whole / "ep0-ba4-rank0.pt"), weights(stopped / "ep0-ba4-rank0.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("notes", "fused"), [(RunNotes(""), False), (None, False), (RunNotes("", fused=True), True)]
)
def test_a_run_that_was_plain_stays_so_on_a_gpu_unless_the_config_says_otherwise(
    notes: RunNotes | None, fused: bool, tiny_runs: Path
) -> None:
    config = load_train_config(tiny_runs)[0]
    plan = make_plan(config, H100)
    start = Start(tiny_runs, is_own=True, notes=notes)
    assert plan.fused and plan.bf16_weights
    kept = keep_fused(config, plan, start)
    assert kept.fused is kept.bf16_weights is fused
    config = replace(config, optimizer=replace(config.optimizer, fused=True))
    assert keep_fused(config, make_plan(config, H100), start).fused


def test_a_machine_that_cannot_go_on_fused_says_so(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CXX", "no-such-g++")
    config = load_train_config(tiny_runs)[0]
    plan = make_plan(config, Device("cpu", "CPU", memory=2**34))
    kept = keep_fused(config, plan, Start(tiny_runs, is_own=True, notes=RunNotes("", fused=True)))
    assert not kept.fused
    reason = "not fused as this run's earlier steps: it is compiled, and there is no C++ compiler no-such-g++"
    assert kept.choices["optimizer.fused"].reason == reason
    plan = make_plan(replace(config, optimizer=replace(config.optimizer, fused=True)), plan.device)
    assert plan.missing["optimizer.fused"].startswith(
        "true can't be used: it is compiled, and there is no C++"
    )


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch needs a C++ compiler, and there is none")
def test_a_run_with_the_compiled_step_has_the_plain_runs_losses_and_resumes_bit_for_bit(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plain, compiled = run("of-plain", "optimizer.fused=false"), run("of-compiled")
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    run("of-resumed", "max_duration=2ba")
    run("of-resumed", "optimizer.fused=auto")
    one, other = (
        weights(folder / "ep0-ba4-rank0.pt") for folder in (compiled, compiled.parent / "of-resumed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("words", "last", "link"),
    [
        (["model.d_model=64"], "ep0-ba4-rank0.pt", "latest-rank0.pt"),
        (
            ["model.d_model=64", "optimizer.fused=false", "fsdp_config={state_dict_type: sharded}"],
            "ep0-ba4",
            None,
        ),
    ],
    ids=["fused", "sharded"],
)
def test_a_run_with_a_stored_momentum_resumes_bit_for_bit(
    words: list[str], last: str, link: str | None, dtype: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    words = [*words, f"optimizer.momentum_dtype={dtype}"]
    folder = run(f"{dtype}-{last}", *words)
    stored_as = {torch.bfloat16} if dtype == "bfloat16" else {torch.int8, torch.float32}
    expected = losses(folder)
    (folder / last).rename(tmp_path / last)
    if link is not None:
        (folder / link).unlink()
    run(folder.name, *words)
    assert losses(folder) == expected and len(expected) == 4
    if (folder / last).is_dir():
        stored = FileSystemReader(folder / last).read_metadata().state_dict_metadata
        dtypes = {stored[key].properties.dtype for key in stored if key.endswith("exp_avg")}
        assert dtypes == stored_as
        shutil.rmtree(tmp_path / last)
        return
    for read in (weights, momenta):
        one, other = read(tmp_path / last), read(folder / last)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {momentum.dtype for momentum in other.values()} == stored_as


def test_a_run_takes_another_dtype_of_its_momentum_only_where_that_is_allowed(
    stopped: Path, run: Callable[..., Path]
) -> None:
    key = "optimizer.momentum_dtype"
    with pytest.raises(ConfigError, match=rf"{key}: float32 in the run of .*, bfloat16 here"):
        run(stopped.name, f"{key}=bfloat16")
    run(stopped.name, f"{key}=bfloat16", f"allow_changes=[{key}]")
    after = momenta(stopped / "ep0-ba4-rank0.pt").values()
    assert {momentum.dtype for momentum in after} == {torch.bfloat16}
    before = momenta(stopped / "ep0-ba2-rank0.pt").values()
    assert {momentum.dtype for momentum in before} == {torch.float32}
