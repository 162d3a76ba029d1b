"""Products in float8, emulated on a CPU, against plain ones; and what a run keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.plan.devices import Device
from mptfoundry.plan.gpus import GPU
from mptfoundry.plan.plan import make_plan
from tests.conftest import losses
from tests.runs import run

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mptfoundry[float8]'")
from mptfoundry.models.float8 import use_float8

__all__ = ["run"]

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
WORDS = ["max_duration=4ba", "save_interval=2ba", "log_to_console=false"]
KEY = "model.float8_recipe"


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_gradients_are_near_the_plain_ones_and_names_stay(recipe: str) -> None:
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=97)
    plain, narrow = (MPT(config, seed=0) for _ in range(2))
    use_float8(narrow, recipe)
    assert plain.state_dict().keys() == narrow.state_dict().keys()
    ids = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))
    for network in (plain, narrow):
        network(ids, labels=ids).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), narrow.parameters(), strict=True):
        error = (other.grad - one.grad).norm() / one.grad.norm()
        assert error < 0.3, (name, error)
        # e4m3 has three bits after the first one, so a product of rounded operands is never the plain one.
        assert error > 0 or "wte" in name or "norm" in name, name


def test_a_run_learns_as_a_plain_one_and_resumes_bit_for_bit(run: Callable[..., Path]) -> None:
    plain, narrow = run("plain"), run("narrow", f"{KEY}=tensorwise")
    assert losses(narrow) == pytest.approx(losses(plain), abs=0.02) and losses(narrow) != losses(plain)
    run("stopped", f"{KEY}=tensorwise", "max_duration=2ba")
    with pytest.raises(ConfigError, match=f"{KEY}: tensorwise in the run of .*, not given here"):
        run("stopped")
    run("stopped", f"{KEY}=tensorwise")
    ends = [
        torch.load(plain.parent / name / "ep0-ba4-rank0.pt", weights_only=False)
        for name in ("narrow", "stopped")
    ]
    one, other = (each["state"]["model"] for each in ends)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.soak
def test_shards_and_recomputed_blocks_have_the_same_losses(run: Callable[..., Path]) -> None:
    narrow = run("whole", f"{KEY}=rowwise")
    words = "fsdp_config={state_dict_type: sharded, activation_checkpointing: true}"
    assert losses(run("sharded", f"{KEY}=rowwise", words)) == pytest.approx(losses(narrow), abs=1e-3)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model.peft_config={r: 4}"], "is for weights that are trained"),
        (["model.d_model=40"], "needs sizes that are multiples of 16, and d_model is 40"),
        (["model.ffn_config.ffn_hidden_size=100"], "and ffn_config.ffn_hidden_size is 100"),
    ],
)
def test_what_has_no_float8_is_refused(tiny_runs: Path, words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_train_config(tiny_runs, [f"{KEY}=rowwise", *words])


def test_an_older_gpu_is_refused(tiny_runs: Path) -> None:
    config = load_train_config(tiny_runs, [f"{KEY}=rowwise", "save_interval=1ba"])[0]
    for name, capability in (("A100", (8, 0)), ("H100", (9, 0))):
        gpu = GPU(f"NVIDIA {name}", capability=capability)
        plan = make_plan(config, Device("gpu", name, gpus=(gpu,), memory=2**36, has_bf16=True))
        refused = plan.missing.get(KEY, "")
        assert ("compute capability 8.9 or newer, and this one has 8.0" in refused) == (name == "A100")
        assert not plan.bf16_weights
