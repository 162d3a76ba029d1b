from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from mptfoundry.checkpoints.reading import load_network, network_of, open_model
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

TINY = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    vocab_size=384,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)
WriteRun = Callable[..., Path]


def assert_same_weights(network: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = network.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_a_run_gives_its_newest_network_and_its_tokenizer(write_run: WriteRun, tiny_tokenizer: Any) -> None:
    newest = MPT(TINY, seed=5)
    write_run(batch=100, network=newest)
    network, tokenizer = load_network(write_run(batch=20))
    assert_same_weights(network, newest)
    assert network.config == TINY
    assert not network.training
    assert tokenizer("for key in table")["input_ids"] == tiny_tokenizer("for key in table")["input_ids"]


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, no_bias=False, tie_word_embeddings=False, norm_type="rmsnorm"),
        replace(TINY, attn_config=AttnConfig(qk_ln=True), max_seq_len=32),
        replace(TINY, attn_config=AttnConfig(attn_type="multiquery_attention", rope=True)),
    ],
    ids=["untied with biases", "learned positions, qk_ln", "multi-query, rotary"],
)
def test_every_kind_of_network_comes_back(write_run: WriteRun, config: MPTConfig) -> None:
    expected = MPT(config, seed=2).eval()
    network, _ = load_network(write_run(config, expected))
    assert_same_weights(network, expected)
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(network(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_a_sharded_checkpoint_gives_the_same_network(write_run: WriteRun) -> None:
    run, expected = write_run(), MPT(TINY, seed=7)
    model = {f"model.{name}": tensor for name, tensor in expected.state_dict().items()}
    dcp.save({"state": {"model": model}}, storage_writer=dcp.FileSystemWriter(run / "ep0-ba90"), no_dist=True)
    assert_same_weights(load_network(run)[0], expected)
    assert_same_weights(load_network(run / "ep0-ba90")[0], expected)


def test_tensors_come_one_by_one_and_are_the_models_alone(write_run: WriteRun) -> None:
    source = open_model(write_run())
    expected = MPT(TINY, seed=1).state_dict()
    for name, tensor in source.tensors(torch.bfloat16):
        assert torch.equal(tensor, expected.pop(name).bfloat16())
    assert not expected


def test_the_dtype_asked_for_is_given_and_otherwise_the_stored_one(write_run: WriteRun) -> None:
    run = write_run(network=MPT(TINY, seed=1).bfloat16())
    assert next(load_network(run)[0].parameters()).dtype is torch.bfloat16
    assert next(load_network(run, dtype=torch.float32)[0].parameters()).dtype is torch.float32


def test_a_backend_that_cannot_serve_is_refused(write_run: WriteRun) -> None:
    run = write_run()
    assert load_network(run, attn_impl="torch")[0].config.attn_config.attn_impl == "torch"
    with pytest.raises(ConfigError, match=r"attn_impl: flash can't be used"):
        load_network(run, attn_impl="flash")


def test_a_backend_serves_what_autocast_computes_in_and_not_what_is_stored(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = MPTConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=384, max_seq_len=64)
    source = open_model(write_run(model, network=MPT(model, seed=1).bfloat16()))
    network_of(source, attn_impl="triton", compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"attn_impl: triton can't be used: .* not in bfloat16"):
        network_of(source, attn_impl="triton")


def test_transformers_own_folders_are_read(tmp_path: Path) -> None:
    from transformers import MptConfig, MptForCausalLM, MptModel

    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64)
    theirs = MptForCausalLM(config).eval()
    ids = torch.arange(20).reshape(2, 10)
    for number, options in enumerate([{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}]):
        folder = tmp_path / str(number)
        theirs.save_pretrained(folder, **options)
        network, tokenizer = load_network(folder)
        assert tokenizer is None
        torch.testing.assert_close(network(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    base = MptModel.from_pretrained(tmp_path / "0")
    base.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        load_network(tmp_path / "base")[0](ids).logits, load_network(tmp_path / "0")[0](ids).logits
    )


def test_llm_foundrys_checkpoint_brings_its_config_along(tmp_path: Path) -> None:
    expected = MPT(TINY, seed=3)
    config = {
        **json.loads(json.dumps(TINY.to_dict())),
        "model_type": "mpt",
        "tokenizer_name": "gpt2",
        "fc_type": {},
    }
    state = {
        "model": {f"model.{name}": tensor for name, tensor in expected.state_dict().items()},
        "integrations": {"huggingface": {"model": {"config": {"content": config}}, "tokenizer": {}}},
    }
    torch.save({"state": state}, tmp_path / "ep0-ba1-rank0.pt")
    assert_same_weights(load_network(tmp_path)[0], expected)


def test_a_checkpoint_without_any_config_says_so(tmp_path: Path) -> None:
    torch.save({"state": {"model": {"model.a": torch.ones(2)}}}, tmp_path / "ep0-ba1-rank0.pt")
    with pytest.raises(CheckpointError, match=r"no config.yaml next to it, so its architecture isn't known"):
        open_model(tmp_path)


def test_missing_unknown_and_misshaped_tensors_are_named(tmp_path: Path, write_run: WriteRun) -> None:
    network = MPT(TINY, seed=1)
    state = network.state_dict()
    state["transformer.extra"] = state.pop("transformer.norm_f.weight")
    state["transformer.blocks.0.attn.Wqkv.weight"] = torch.ones(3, 2)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(CheckpointError) as error:
        open_model(folder)
    assert str(error.value) == (
        f"{folder}: transformer.norm_f.weight is missing; transformer.extra is not of this architecture; "
        "transformer.blocks.0.attn.Wqkv.weight has the shape (3, 2), its config says (96, 32)."
    )
    run = write_run(replace(TINY, n_layers=3), network)
    with pytest.raises(CheckpointError, match=r"holds 2 blocks; its config says n_layers: 3"):
        open_model(run)


STORES = ("safetensors", "bin", "checkpoint", "sharded checkpoint", "checkpoint of llm-foundry")


def store_as(kind: str, state: dict[str, torch.Tensor], run: Path, folder: Path) -> Path:
    """Write weights in one of `STORES`, and return what is opened."""
    model: dict[str, Any] = {"model": {f"model.{name}": tensor for name, tensor in state.items()}}
    folder.mkdir()
    if kind in ("safetensors", "bin"):
        (folder / "config.json").write_text(json.dumps(TINY.to_dict()))
        if kind == "safetensors":
            save_file(state, folder / "model.safetensors")
        else:
            torch.save(state, folder / "pytorch_model.bin")
        return folder
    if kind == "sharded checkpoint":
        writer = dcp.FileSystemWriter(run / "ep0-ba90")
        dcp.save({"state": model}, storage_writer=writer, no_dist=True)
        return run
    if kind == "checkpoint of llm-foundry":
        content = {**json.loads(json.dumps(TINY.to_dict())), "model_type": "mpt", "fc_type": {}}
        model["integrations"] = {"huggingface": {"model": {"config": {"content": content}}, "tokenizer": {}}}
        torch.save({"state": model}, folder / "ep0-ba1-rank0.pt")
        return folder
    torch.save({"state": model}, run / "ep0-ba90-rank0.pt")
    return run


@pytest.mark.parametrize("name", ["int8", "uint8", "bool", "int64", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("kind", STORES)
def test_weights_in_no_number_format_of_weights_are_refused_in_every_store(
    kind: str, name: str, tmp_path: Path, write_run: WriteRun
) -> None:
    if (kind, name) == ("safetensors", "complex64"):
        pytest.skip("safetensors has no such numbers")
    state = MPT(TINY, seed=1).state_dict()
    weight = "transformer.blocks.1.ffn.up_proj.weight"
    state[weight] = (state[weight] * 100).to(getattr(torch, name))
    path = store_as(kind, state, write_run(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=f"{weight} is stored as {name}. Weights are read as float64,"):
        open_model(path)


def test_an_output_matrix_beside_tied_embeddings_must_be_equal(tmp_path: Path) -> None:
    state = MPT(TINY, seed=1).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    torch.save({**state, "lm_head.weight": state["transformer.wte.weight"]}, tmp_path / "pytorch_model.bin")
    load_network(tmp_path)
    torch.save(
        {**state, "lm_head.weight": state["transformer.wte.weight"] + 1}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        load_network(tmp_path)


def test_a_real_trainers_checkpoint_is_read_through_latest(tmp_path: Path, write_run: WriteRun) -> None:
    from composer import Trainer
    from composer.models import ComposerModel
    from torch.utils.data import DataLoader

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = MPT(TINY, seed=4)

        def forward(self, batch: Any) -> Any:
            return self.model(batch, labels=batch).loss

        def loss(self, outputs: Any, batch: Any, *args: Any) -> torch.Tensor:
            return outputs

    run = write_run(batch=0)
    model = Model()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(torch.randint(384, (4, 16)), batch_size=2),
        optimizers=torch.optim.AdamW(model.parameters()),
        max_duration="2ba",
        save_folder=str(run),
        save_interval="1ba",
        save_latest_filename="latest-of-composer",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    assert (run / "ep0-ba1-rank0.pt").exists()
    for path in (run, run / "latest-of-composer"):
        network, _ = load_network(path)
        assert_same_weights(network, model.model)


def test_what_is_exported_by_hand_is_what_was_stored(write_run: WriteRun, tmp_path: Path) -> None:
    source = open_model(write_run())
    save_file(dict(source.tensors()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    assert_same_weights(load_network(tmp_path)[0], MPT(TINY, seed=1))
    assert set(load_file(tmp_path / "model.safetensors")) == set(open_model(tmp_path).weights.outlines)


def test_finite_weights_whose_sum_is_not_are_finite(write_run: Callable[..., Path]) -> None:
    network = MPT(TINY, seed=1)
    torch.nn.init.constant_(network.transformer.wte.weight, 3e38)
    expected = network.state_dict()
    for name, tensor in open_model(write_run(network=network)).tensors():
        assert torch.equal(tensor, expected[name])
    for bad in (torch.nan, torch.inf, -torch.inf):
        network.transformer.wte.weight.data[7, 3] = bad
        with pytest.raises(CheckpointError, match=r"wte.weight holds NaN or infinity as float32"):
            list(open_model(write_run(network=network)).tensors())
