"""Where a model is sharded before it has weights, each device reads its own from disk; run by `make gpu`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("init_device", ["meta", "cpu"])
def test_a_sharded_model_starts_from_the_weights_of_a_folder(
    tmp_path: Path, tiny_run: Path, version: int, init_device: str
) -> None:
    from mptfoundry.train import train

    model = replace(TINY, resid_pdrop=0.1, max_seq_len=32)
    weights = MPT(model, seed=5).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.to_dict(), "model_type": "mpt"}))
    words = [f"model.pretrained_model_name_or_path={tmp_path}", f"model.init_device={init_device}"]
    # In Composer the first step of a warm-up has a learning rate of zero: the weights stay as they were read.
    words += ["run_name=started", "max_duration=1ba", "save_interval=1ba"]
    words += [f"fsdp_config.version={version}", "fsdp_config.state_dict_type=sharded"]
    train(load_train_config(tiny_run, words)[0])
    found = dict(open_model(tmp_path / "started").tensors())
    for name, tensor in weights.items():
        assert torch.equal(found[name].cpu(), tensor), name
