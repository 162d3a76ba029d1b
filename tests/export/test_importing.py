from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from mptfoundry.checkpoints.checksums import CHECKSUMS
from mptfoundry.checkpoints.reading import load_network, open_model
from mptfoundry.cli import main
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.export.importing import import_model
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

MODEL = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    vocab_size=384,
    no_bias=True,
    attn_config=AttnConfig(alibi=True, alibi_bias_max=16, clip_qkv=0.5, qk_ln=True),
)
# As the first models were published: all keys at the top, and names of its own for what is inside a block.
FIRST = {
    "model_type": "mosaic_gpt",
    "architectures": ["MosaicGPT"],
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_ratio": 4,
    "max_seq_len": 64,
    "vocab_size": 384,
    "attn_pdrop": 0,
    "resid_pdrop": 0,
    "emb_pdrop": 0,
    "attn_impl": "triton",
    "attn_qk_ln": True,
    "attn_clip_qkv": 0.5,
    "softmax_scale": None,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 16,
    "init_device": "cpu",
    "logit_scale": None,
    "no_bias": True,
    "verbose": 0,
    "param_init_fn": "kaiming_normal_",
    "init_div_is_residual": True,
    "init_std": 0.02,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "init_gain": 0,
    "fan_mode": "fan_in",
    "init_nonlinearity": "relu",
    "embedding_fraction": 1.0,
    "low_precision_layernorm": True,
    "use_cache": False,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "float32",
}
FIRST_NAMES = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm_f": "ln_f",
    "ffn.up_proj": "mlp.mlp_up",
    "ffn.down_proj": "mlp.mlp_down",
}
# As the second generation was published.
PUBLISHED: dict[str, Any] = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    **{key: FIRST[key] for key in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "no_bias")},
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 0.5,
        "prefix_lm": False,
        "qk_ln": True,
        "softmax_scale": None,
    },
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "init_std": 0.02, "verbose": 0},
    "learned_pos_emb": True,
    "norm_type": "low_precision_layernorm",
    "use_cache": False,
    "verbose": 0,
}
# What the latest llm-foundry writes beside it.
LATEST = {
    **PUBLISHED,
    "norm_eps": 1e-5,
    "fc_type": {"name": "torch"},
    "block_overrides": None,
    "kv_dim": None,
}


@pytest.fixture(scope="module")
def network() -> MPT:
    return MPT(MODEL, seed=5).eval()


def assert_same(folder: Path, network: MPT) -> None:
    found, _ = load_network(folder)
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(found(ids).logits, network(ids).logits)


def folder_of(place: Path, config: dict[str, Any]) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


def published_in_safetensors(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    save_file(state, folder_of(place, PUBLISHED) / "model.safetensors")
    return place


def published_in_shards_of_bin_with_the_tied_matrix(
    place: Path, state: dict[str, Any], tokenizer: Path
) -> Path:
    folder_of(place, PUBLISHED)
    state = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    files = {name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, place / file)
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return place


def without_transformer_before_the_names(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    base = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    torch.save(base, folder_of(place, PUBLISHED) / "pytorch_model.bin")
    return place


def of_the_first_generation(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    for today, first in FIRST_NAMES.items():
        state = {name.replace(f".{today}.", f".{first}."): tensor for name, tensor in state.items()}
    assert "transformer.blocks.1.mlp.mlp_down.weight" in state and "transformer.ln_f.weight" in state
    torch.save(state, folder_of(place, FIRST) / "pytorch_model.bin")
    return place


def ours(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    save_file(state, folder_of(place, {**MODEL.to_dict(), "model_type": "mptfoundry"}) / "model.safetensors")
    return place


def composer_state(state: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """What Composer writes for llm-foundry: weights, optimizer, and the config and tokenizer beside them."""
    files = {
        file.name: {"file_extension": file.suffix, "content": json.loads(file.read_text())}
        for file in tokenizer.glob("*.json")
    }
    model = {f"model.{name}": tensor for name, tensor in state.items()}
    noted = {
        "model": {"config": {"file_extension": ".json", "content": LATEST, "class": "x"}},
        "tokenizer": files,
    }
    optimizer = {"DecoupledLionW": {"state": {name: {"exp_avg": tensor} for name, tensor in model.items()}}}
    return {"state": {"model": model, "optimizers": optimizer, "integrations": {"huggingface": noted}}}


def llm_foundrys_checkpoint(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    place.mkdir()
    torch.save(composer_state(state, tokenizer), place / "ep0-ba3-rank0.pt")
    (place / "latest-rank0.pt").symlink_to("ep0-ba3-rank0.pt")
    return place


def llm_foundrys_sharded_checkpoint(place: Path, state: dict[str, Any], tokenizer: Path) -> Path:
    writer = dcp.FileSystemWriter(place / "ep0-ba3")
    dcp.save(composer_state(state, tokenizer), storage_writer=writer, no_dist=True)
    return place / "ep0-ba3"


Source = Callable[[Path, dict[str, Any], Path], Path]
SOURCES: list[Source] = [
    published_in_safetensors,
    published_in_shards_of_bin_with_the_tied_matrix,
    without_transformer_before_the_names,
    of_the_first_generation,
    ours,
    llm_foundrys_checkpoint,
    llm_foundrys_sharded_checkpoint,
]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_kind_of_source_becomes_a_folder_with_the_same_logits(
    make: Source, network: MPT, tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = make(tmp_path / "source", network.state_dict(), tokenizer_folder)
    summary = import_model(str(source), tmp_path / "run", tokenizer=str(tokenizer_folder), progress=False)
    assert replace(summary.config, init_config=MODEL.init_config) == MODEL
    assert_same(tmp_path / "run", network)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", CHECKSUMS, "README.md", "hf.py"}


@pytest.mark.parametrize("make", [llm_foundrys_checkpoint, llm_foundrys_sharded_checkpoint])
def test_llm_foundrys_checkpoints_bring_their_tokenizer_and_leave_their_optimizer(
    make: Source, network: MPT, tmp_path: Path, tokenizer_folder: Path, tiny_tokenizer: Any
) -> None:
    source = make(tmp_path / "source", network.state_dict(), tokenizer_folder)
    summary = str(import_model(str(source), tmp_path / "run", progress=False))
    assert "weights only: optimizer state, schedule and step count are not carried over" in summary
    _, tokenizer = load_network(tmp_path / "run")
    text = "for key in naïve table: 言葉"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(network.state_dict())


def test_what_stock_transformers_saved_stays_a_folder_for_stock_transformers(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer, MptConfig, MptForCausalLM

    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64)
    theirs = MptForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "run", progress=False)
    network, tokenizer = load_network(tmp_path / "run")
    ids = tokenizer("def read(path):", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(network(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    again = MptForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert again.dtype is torch.float32 and torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("switches", [{"attn_config": {"attn_pdrop": 0.1}}, {"resid_pdrop": 0.1}])
def test_dropout_is_kept_for_the_run_that_starts_from_the_folder(
    tmp_path: Path, switches: dict[str, Any]
) -> None:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64)
    MptForCausalLM(config).save_pretrained(tmp_path / "theirs")
    summary = import_model(
        str(tmp_path / "theirs"), tmp_path / "run", config_overrides=switches, progress=False
    )
    found = open_model(tmp_path / "run").config
    assert (found.attn_config.attn_pdrop, found.resid_pdrop) in ((0.1, 0), (0, 0.1))
    is_native = "resid_pdrop" in switches
    assert ("Format: native" in str(summary)) is is_native
    assert ("can't hold attn_config.attn_pdrop: 0.1" in str(summary)) is not is_native


def test_a_model_that_ends_in_a_head_keeps_it(tmp_path: Path) -> None:
    from transformers import MptConfig, MptForSequenceClassification

    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64, num_labels=3)
    theirs = MptForSequenceClassification(config)
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "run", progress=False)
    found = dict(open_model(tmp_path / "run").tensors())
    assert found.keys() == theirs.state_dict().keys()
    assert torch.equal(found["score.weight"], theirs.state_dict()["score.weight"])


@pytest.fixture
def source(network: MPT, tmp_path: Path, tokenizer_folder: Path) -> Path:
    return published_in_safetensors(tmp_path / "source", network.state_dict(), tokenizer_folder)


def test_the_command_imports_and_what_it_wrote_is_generated_from_and_exported(
    source: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported = str(tmp_path / "run"), str(tmp_path / "exported")
    assert main(["import", str(source), f"out={run}", f"tokenizer={tokenizer_folder}", "dtype=fp32"]) == 0
    said = capsys.readouterr().out
    assert f"train from it: model.pretrained_model_name_or_path={run}" in said
    (tmp_path / "prompt.txt").write_text("def", encoding="utf-8")
    for prompt in ("def", f"file::{tmp_path / 'prompt.txt'}"):
        capsys.readouterr()
        assert main(["generate", run, prompt, "max_new_tokens=3"]) == 0
        assert capsys.readouterr().out.startswith("def")
    assert main(["export", run, exported, "dtype=fp32"]) == 0
    for name, tensor in open_model(exported).tensors():
        assert torch.equal(tensor, open_model(source).weights.read(name))
    capsys.readouterr()
    assert main(["eval", run]) == 2
    assert "belongs to no run that has one" in capsys.readouterr().err
    assert main(["import", str(source), run]) == 1
    assert "exists already. Use another path, or set overwrite=true." in capsys.readouterr().err


def test_the_card_tells_where_the_model_came_from(source: Path, tmp_path: Path) -> None:
    summary = import_model(str(source), tmp_path / "run", progress=False)
    assert "tokenizer: there is none; evaluation and generation need one" in str(summary)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "\nImported from source. It came without a tokenizer: use the one it was trained with.\n" in card
    assert str(tmp_path) not in card


def test_switches_are_changed_and_rows_padded_or_cut_only_when_asked(
    source: Path, network: MPT, tmp_path: Path, tokenizer_folder: Path
) -> None:
    overrides = {"vocab_size": 512, "max_seq_len": 83968, "attn_config": {"attn_pdrop": 0.1}}
    summary = import_model(str(source), tmp_path / "run", config_overrides=overrides, progress=False)
    assert "embedding: 384 rows padded to 512 with their mean" in str(summary)
    config = open_model(tmp_path / "run").config
    assert (config.vocab_size, config.max_seq_len, config.attn_config.attn_pdrop) == (512, 83968, 0.1)
    assert config.attn_config.alibi_bias_max == 16
    ids = torch.arange(40).reshape(2, 20)
    logits = load_network(tmp_path / "run")[0](ids).logits
    torch.testing.assert_close(logits[..., :384], network(ids).logits)
    cut = import_model(str(source), tmp_path / "cut", config_overrides={"vocab_size": 330}, progress=False)
    assert "embedding: the last 54 of 384 rows cut off" in str(cut)
    with pytest.raises(ConfigError, match=r"vocab_size: 300 is smaller than the tokenizer's 320 ids"):
        import_model(
            str(source),
            tmp_path / "small",
            config_overrides={"vocab_size": 300},
            tokenizer=str(tokenizer_folder),
            progress=False,
        )
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"d_model": 64}, r"wte.weight has the shape \(384, 32\), its config says \(384, 64\)"),
        ({"n_layers": 3}, r"holds 2 blocks; its config says n_layers: 3"),
        (
            {"attn_config": {"clip_qvk": 6}},
            r"config_overrides: attn_config.clip_qvk: 6. MPT has no such option",
        ),
        ({"vocab_size": "many"}, r"config_overrides: vocab_size: 'many'. Allowed: int"),
    ],
)
def test_what_does_not_fit_names_itself(source: Path, tmp_path: Path, overrides: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        import_model(str(source), tmp_path / "run", config_overrides=overrides, progress=False)
    assert list(tmp_path.iterdir()) == [source]


LLM_FOUNDRYS_YAML = """
variables: {max_seq_len: 64, global_seed: 17}
max_seq_len: ${variables.max_seq_len}
model:
  name: mpt_causal_lm
  init_device: meta
  d_model: 32
  n_heads: 4
  n_layers: 2
  vocab_size: 384
  no_bias: true
  attn_config: {attn_impl: triton, alibi: true, alibi_bias_max: 16, clip_qkv: 0.5, qk_ln: true}
optimizer: {name: decoupled_lionw, lr: 1e-4}
"""


def test_a_checkpoint_that_does_not_tell_its_architecture_takes_it_from_a_file(
    network: MPT, tmp_path: Path
) -> None:
    model = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state": {"model": model}}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=r"its architecture isn't known. Keep a checkpoint in its run"):
        import_model(str(tmp_path / "bare.pt"), tmp_path / "run", progress=False)
    (tmp_path / "mpt.yaml").write_text(LLM_FOUNDRYS_YAML)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    for number, config in enumerate(["mpt.yaml", "config.json"]):
        place = tmp_path / f"run{number}"
        import_model(str(tmp_path / "bare.pt"), place, config=str(tmp_path / config), progress=False)
        assert_same(place, network)


def test_the_first_generations_slopes_of_other_numbers_of_heads_are_not_taken_for_todays(
    tmp_path: Path,
) -> None:
    source = folder_of(tmp_path / "source", {**FIRST, "n_heads": 12, "d_model": 48})
    with pytest.raises(CheckpointError, match=r"alibi with n_heads: 12, which is not a power of two"):
        import_model(str(source), tmp_path / "run", progress=False)


def test_two_sayings_of_one_switch_have_to_agree(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", {**PUBLISHED, "attn_clip_qkv": 6})
    with pytest.raises(
        CheckpointError, match=r"attn_clip_qkv is 6, attn_config.clip_qkv 0.5. They are the same"
    ):
        import_model(str(source), tmp_path / "run", progress=False)
