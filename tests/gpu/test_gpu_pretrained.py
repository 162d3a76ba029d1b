"""Where a model is sharded before it has weights, each device reads its own from disk; run by `make gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.config.load import load_train_config
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)
MODEL = MPTConfig(
    d_model=256, n_heads=4, n_layers=2, vocab_size=384, no_bias=True, attn_config=AttnConfig(alibi=True)
)
# In Composer the first step of a warm-up has a learning rate of zero: the weights stay as they were read.
CONFIG = """
max_seq_len: 32
model: {{name: mpt_causal_lm, pretrained_model_name_or_path: {there}}}
tokenizer: {{name: {shards}/tokenizer}}
train_loader: {{name: text, dataset: {{local: {shards}/a, split: train}}}}
optimizer: {{name: decoupled_lionw, lr: 1e-3}}
scheduler: {{name: constant_with_warmup, t_warmup: 1ba}}
max_duration: 1ba
eval_interval: 0
global_train_batch_size: 8
save_folder: {there}/run
save_interval: 1ba
log_to_console: false
"""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("init_device", ["meta", "cpu"])
def test_a_sharded_model_starts_from_the_weights_of_a_folder(
    tmp_path: Path, shards: Path, version: int, init_device: str
) -> None:
    from mptfoundry.train import train

    save_file(MPT(MODEL, seed=5).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**MODEL.to_dict(), "model_type": "mpt"}))
    (tmp_path / "run.yaml").write_text(CONFIG.format(there=tmp_path, shards=shards))
    fsdp = [f"fsdp_config.version={version}", "fsdp_config.state_dict_type=full"]
    words = [*fsdp, f"model.init_device={init_device}"]
    train(load_train_config(tmp_path / "run.yaml", words)[0])
    found = dict(open_model(tmp_path / "run").tensors())
    for name, tensor in MPT(MODEL, seed=5).state_dict().items():
        assert torch.equal(found[name].cpu(), tensor), name
