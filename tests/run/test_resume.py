"""A resumed run is the run that was never stopped, bit for bit, dropout included."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composer import Trainer

from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.checkpoints.training_state import compare_weights
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.network import MPT
from mptfoundry.run.resume import Resume
from tests.conftest import composer_state
from tests.trainers import CONFIG

MakeTrainer = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


def run(make_trainer: MakeTrainer, folder: Path, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    trainer = make_trainer(
        max_duration="10ba",
        save_folder=str(folder),
        save_interval="1ba",
        save_overwrite=True,
        callbacks=[Resume(checkpoint)] if checkpoint else [],
    )
    trainer.fit()
    trainer.close()
    return weights(trainer)


@pytest.mark.parametrize("stopped_after", [4, 6, 8])
def test_interrupted_and_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, tmp_path: Path, stopped_after: int
) -> None:
    """In the middle of the first epoch, at its very end, and in the middle of the second."""
    whole = run(make_trainer, tmp_path / "whole")
    epoch = 0 if stopped_after <= 6 else 1
    checkpoint = tmp_path / "whole" / f"ep{epoch}-ba{stopped_after}-rank0.pt"
    resumed = run(make_trainer, tmp_path / "resumed", checkpoint)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_without_it_dropout_differs(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Composer alone doesn't restore the state; once it does, this room is no longer needed."""
    whole = run(make_trainer, tmp_path / "whole")
    trainer = make_trainer(max_duration="10ba", load_path=str(tmp_path / "whole" / "ep0-ba4-rank0.pt"))
    trainer.fit()
    trainer.close()
    resumed = weights(trainer)
    assert any(not torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.fixture
def other(make_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of the network that `make_trainer` trains, with some sizes changed."""

    def write(**sizes: int) -> Path:
        network = MPT(replace(CONFIG, **sizes), seed=2)  # type: ignore[arg-type]
        torch.save(composer_state(network, 3), tmp_path / "other.pt")
        return tmp_path / "other.pt"

    return write


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"n_layers": 2},
            "model.n_layers is 2 there and 1 here. Make them equal, or take what both have with load_strict",
        ),
        ({"vocab_size": 40}, "model.vocab_size is 40 there and 32 here. Make them equal."),
        ({"d_model": 32}, "model.d_model is 32 there and 16 here. Make them equal."),
        ({"expansion_ratio": 2}, "ffn.up_proj.weight is (32, 16) there and (64, 16) here. Make them equal."),
    ],
)
def test_weights_that_do_not_fit_name_the_key_that_differs(
    make_trainer: MakeTrainer, other: Callable[..., Path], sizes: dict[str, int], said: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)):
        make_trainer(callbacks=[Resume(other(**sizes), weights_only=True)])


def test_without_strictness_it_is_said_what_is_new_and_what_is_left_over(
    make_trainer: MakeTrainer, other: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = other(n_layers=2)
    content = load_plain(file, mapped=False)
    moved = content["state"]["model"].pop("model.transformer.norm_f.weight")
    torch.save(content, file)
    trainer = make_trainer(callbacks=[Resume(file, weights_only=True, strict=False)])
    said = capsys.readouterr().out
    assert f"load_path: {file}: model.transformer.norm_f.weight is not in it; " in said
    assert "blocks.1.attn.out_proj.weight and 3 more are not in the model" in said
    found = weights(trainer)
    assert not torch.equal(found["model.transformer.wte.weight"], moved)
    stored = content["state"]["model"]
    assert all(torch.equal(value, stored[name]) for name, value in found.items() if name in stored)


def test_without_strictness_an_optimizer_of_other_weights_is_told_to_be_left_out(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        "1ba", save_folder=str(tmp_path), save_interval="1ba", save_filename="all.pt", save_overwrite=True
    )
    trainer.fit()
    trainer.close()
    content = load_plain(tmp_path / "all.pt", mapped=False)
    name = "model.transformer.norm_f.weight"
    del content["state"]["model"][name]
    for optimizer in content["state"]["optimizers"].values():
        del optimizer["state"][name]
    torch.save(content, tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match="set load_weights_only: true for the weights alone"):
        make_trainer(callbacks=[Resume(tmp_path / "some.pt", strict=False)])
    make_trainer(callbacks=[Resume(tmp_path / "some.pt", strict=False, weights_only=True)])


def test_weights_of_which_nothing_fits_are_an_error_without_strictness_too(
    make_trainer: MakeTrainer, other: Callable[..., Path]
) -> None:
    file = other()
    content = load_plain(file, mapped=False)
    content["state"]["model"] = {f"x.{name}": value for name, value in content["state"]["model"].items()}
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="holds none of the model's"):
        make_trainer(callbacks=[Resume(file, weights_only=True, strict=False)])


def test_a_folder_of_shards_is_compared_as_well() -> None:
    """Where shards are loaded, what they hold besides would not even be looked at."""
    stored = {"model.transformer.wte.weight": (8, 4), "model.transformer.blocks.0.a": (4,)}
    here = {"model.transformer.wte.weight": (8, 4)}
    with pytest.raises(CheckpointError, match=r"model.n_layers is 1 there and 0 here"):
        compare_weights(Path("ep0-ba1"), stored, here, strict=True)
    assert compare_weights(Path("ep0-ba1"), here, here, strict=True) is None
