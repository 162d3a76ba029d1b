"""A run that starts from another model: its weights, its resumption, its vocabulary, and two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mptfoundry.build import open_pretrained
from mptfoundry.checkpoints.reading import open_model
from mptfoundry.config.load import load_train_config
from mptfoundry.config.model import ModelConfig
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.export.importing import import_model
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.train import train
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
MODEL = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=16,
    vocab_size=400,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
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
save_folder: {folder}/{{run_name}}
save_interval: 1ba
log_to_console: false
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    save_file(MPT(MODEL, seed=5).bfloat16().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**MODEL.to_dict(), "model_type": "mpt"}))
    return folder


@pytest.fixture
def run(there: Path, shards: Path, tmp_path: Path) -> Callable[..., Path]:
    def start(*words: str) -> Path:
        (tmp_path / "run.yaml").write_text(CONFIG.format(there=there, shards=shards, folder=tmp_path))
        train(load_train_config(tmp_path / "run.yaml", words)[0])
        return tmp_path / "run"

    return start


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_model(folder).tensors())


def test_a_run_starts_from_the_weights_of_the_folder(run: Callable[..., Path]) -> None:
    found = weights_of(run())
    for name, tensor in MPT(MODEL, seed=5).bfloat16().state_dict().items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], tensor.float()), name


def test_a_resumed_run_takes_its_checkpoint_and_reads_no_weights_again(
    run: Callable[..., Path], there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("max_duration=2ba")
    assert f"weights: from {there}; the optimizer starts new" in capsys.readouterr().out
    (there / "model.safetensors").unlink()
    folder = run("max_duration=3ba")
    assert "weights: from" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows if "loss" in row] == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"there: no weights. Looked for"):
        run("run_name=another")


def test_the_architecture_alone_can_be_taken(run: Callable[..., Path], there: Path) -> None:
    (there / "model.safetensors").unlink()
    found = weights_of(run("model.pretrained=false", "seed=3"))
    fresh = MPT(MODEL, seed=3).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in fresh.items())


def test_a_vocabulary_is_padded_only_when_asked(run: Callable[..., Path], there: Path) -> None:
    found = weights_of(run("model.config_overrides.vocab_size=512"))
    embedding = MPT(MODEL, seed=5).bfloat16().transformer.wte.weight.float()
    assert torch.equal(found["transformer.wte.weight"][:400], embedding)
    assert found["transformer.wte.weight"].shape == (512, 32)
    with pytest.raises(ConfigError, match=r"512 is not what .*there says, 400"):
        run("model.vocab_size=512", "run_name=another")


def test_a_folder_that_changed_after_its_config_was_resolved_is_noticed(
    run: Callable[..., Path], there: Path
) -> None:
    resolved = run() / "config.yaml"
    (there / "config.json").write_text(json.dumps({**MODEL.to_dict(), "norm_eps": 1e-6}))
    (resolved.parent / "latest-rank0.pt").unlink()
    with pytest.raises(ConfigError, match=r"model.norm_eps: 1e-05 is not what .*there says, 1e-06"):
        load_train_config(resolved)


def test_the_model_is_compared_again_when_its_weights_are_read(there: Path) -> None:
    said = {"pretrained_model_name_or_path": str(there), **vars(MODEL)}
    assert open_pretrained(ModelConfig(**said)).config == MODEL
    with pytest.raises(ConfigError, match=r"model.norm_eps: 1e-06 is not what .*there says, 1e-05"):
        open_pretrained(ModelConfig(**{**said, "norm_eps": 1e-6}))


def test_a_run_starts_from_an_imported_folder_and_load_path_refuses_it(
    run: Callable[..., Path], there: Path, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    import_model(str(there), imported, progress=False)
    found = weights_of(run(f"model.pretrained_model_name_or_path={imported}"))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in weights_of(there).items())
    with pytest.raises(CheckpointError, match=r"Name it in model.pretrained_model_name_or_path instead.$"):
        run("model.pretrained=false", f"load_path={imported}", "load_weights_only=true", "run_name=another")


def test_a_composer_file_of_weights_alone_is_loaded_by_its_path(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "weights" / "ep0-ba0-rank0.pt"
    checkpoint.parent.mkdir()
    stored = MPT(MODEL, seed=5).state_dict()
    torch.save({"state": {"model": {f"model.{name}": tensor for name, tensor in stored.items()}}}, checkpoint)
    words = ["model.pretrained=false", f"load_path={checkpoint}", "load_weights_only=true", "seed=3"]
    found = weights_of(run(*words))
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    with pytest.raises(CheckpointError, match=r"is one file, and fsdp_config.state_dict_type: sharded loads"):
        run(*words, "fsdp_config.state_dict_type=sharded", "run_name=sharded")


def test_two_ranks_that_shard_start_from_the_same_weights(
    run: Callable[..., Path], there: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG.format(there=there, shards=shards, folder=tmp_path))
    words = [tmp_path / "run.yaml", "fsdp_config.state_dict_type=full", "run_name=run"]
    done = run_on_ranks("scripts/train.py", *words)
    assert done.returncode == 0, done.stdout
    found = weights_of(tmp_path / "run")
    for name, tensor in MPT(MODEL, seed=5).bfloat16().state_dict().items():
        assert torch.equal(found[name], tensor.float()), name
