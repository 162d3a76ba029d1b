from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.reading import load_network
from mptfoundry.errors import CheckpointError
from mptfoundry.export import folder as folder_module
from mptfoundry.export.folder import export
from mptfoundry.export.shards import DTYPES
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY
from tests.mpt.reference import livelier

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, n_heads=6, d_model=48, norm_eps=1e-3),
        replace(TINY, attn_config=AttnConfig(alibi=True, clip_qkv=0.02, softmax_scale=0.7)),
    ],
    ids=["plain", "six heads and another epsilon", "clipped and scaled"],
)
def test_stock_transformers_gives_the_same_logits_and_the_same_text(
    write_run: WriteRun, tmp_path: Path, config: MPTConfig
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mptfoundry.generation import generate

    network = livelier(config)
    out = tmp_path / "out"
    summary = export(write_run(config, network), out, dtype="fp32", progress=False)
    assert summary.comparison.difference <= 10 * summary.comparison.float32_rounding
    assert summary.comparison.export_rounding == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer("def rows(table):", return_tensors="pt")
    ids = batch["input_ids"]
    torch.testing.assert_close(theirs(**batch).logits, network(ids).logits, rtol=1e-4, atol=1e-4)
    continued = theirs.generate(**batch, max_new_tokens=20, do_sample=False)
    ours = generate(network, ids, max_new_tokens=20, eos_token_id=tokenizer.eos_token_id)
    assert continued.tolist() == ours.tolist()


def test_every_class_loads_a_native_folder_whose_code_is_allowed(write_run: WriteRun, tmp_path: Path) -> None:
    import transformers

    export(write_run(), tmp_path / "out", dtype="fp32", progress=False)
    weights = MPT(TINY, seed=1).transformer.state_dict()
    heads = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    for name in ("", *(f"For{head}" for head in ("CausalLM", *heads))):
        auto = getattr(transformers, f"AutoModel{name}")
        model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert isinstance(model, getattr(transformers, f"Mpt{name or 'Model'}"))
        trunk = (model.transformer if name else model).state_dict()
        assert all(torch.equal(trunk[key], tensor) for key, tensor in weights.items())


def test_a_model_outside_the_subset_brings_its_own_code(write_run: WriteRun, tmp_path: Path) -> None:
    attention = AttnConfig(alibi=True, alibi_bias_max=16, qk_ln=True)
    run, out = write_run(replace(TINY, attn_config=attention, no_bias=False)), tmp_path / "out"
    summary = export(run, out, dtype="fp32", progress=False)
    assert summary.format.startswith(
        "custom, it needs trust_remote_code=True, since native can't express it:"
    )
    assert summary.comparison.difference == 0
    assert {"config.json", "hf.py", "network.py", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    read, tokenizer = load_network(out)
    assert tokenizer is not None
    for name, tensor in load_network(run)[0].state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_a_native_model_can_be_exported_with_its_code(write_run: WriteRun, tmp_path: Path) -> None:
    summary = export(write_run(), tmp_path / "out", format="custom", progress=False)
    assert summary.format == "custom, asked for"
    assert (tmp_path / "out" / "hf.py").is_file()


def test_a_custom_folder_that_computes_something_else_gets_no_name(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.export import custom

    before = custom.custom_config
    monkeypatch.setattr(custom, "custom_config", lambda *a: before(*a) | {"logit_scale": 0.999})
    with pytest.raises(CheckpointError, match=r"the export does not give the checkpoint's logits"):
        export(write_run(), tmp_path / "out", format="custom", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_checkpoint_in_the_dtype_asked_for(
    write_run: WriteRun, tmp_path: Path, dtype: str
) -> None:
    run, out = write_run(), tmp_path / "out"
    summary = export(run, out, dtype=dtype, shard_bytes=60_000, progress=False)
    assert len(list(out.glob("model-*.safetensors"))) == summary.weight_files > 1
    exported, expected = load_network(out)[0].state_dict(), MPT(TINY, seed=1).state_dict()
    assert list(exported) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor.to(DTYPES[dtype]))


def test_the_folder_around_the_weights_is_what_generate_needs(write_run: WriteRun, tmp_path: Path) -> None:
    export(write_run(), tmp_path / "out", progress=False)
    read = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert read["generation_config.json"] == {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": True,
    }
    tokenizer = read["tokenizer_config.json"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["model_max_length"] == 64


# What reads a native folder, and what it needs of config.json: key -> (type, value).
NEEDED: dict[str, dict[str, tuple[type, Any]]] = {
    "transformers 5": {
        "model_type": (str, "mpt"),
        "attn_config.attn_pdrop": (int, 0),
        "attn_config.alibi_bias_max": (int, 8),
        "attn_config.clip_qkv": (type(None), None),
        "attn_config.softmax_scale": (type(None), None),
        "expansion_ratio": (int, 4),
        "embedding_fraction": (float, 1.0),
        "layer_norm_epsilon": (float, 1e-5),
        "resid_pdrop": (int, 0),
        "emb_pdrop": (int, 0),
        "torch_dtype": (str, "bfloat16"),
    },
    "transformers serve": {"architectures": (list, ["MptForCausalLM"])},
    "llama.cpp": {
        "llm_config.architectures": (list, ["MPTForCausalLM"]),
        "attn_config.alibi": (bool, True),
        "attn_config.alibi_bias_max": (int, 8),
        "attn_config.clip_qkv": (type(None), None),
        "d_model": (int, 32),
        "n_heads": (int, 4),
        "n_layers": (int, 2),
        "max_seq_len": (int, 64),
        "vocab_size": (int, 384),
    },
    "CTranslate2": {"auto_map.AutoConfig": (str, "modeling_mpt.MPTConfig")},
    "trust_remote_code": {
        "auto_map.AutoModelForCausalLM": (str, "modeling_mpt.MPTForCausalLM"),
        "tokenizer_class": (str, "PreTrainedTokenizerFast"),
    },
    "MPT's own code, MLC": {"norm_eps": (float, 1e-5), "no_bias": (bool, True), "use_cache": (bool, True)},
}


def test_every_reader_finds_what_it_needs(write_run: WriteRun, tmp_path: Path) -> None:
    export(write_run(), tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for reader, keys in NEEDED.items():
        for key, (kind, value) in keys.items():
            found: Any = config
            for part in key.split("."):
                found = found[part]
            assert type(found) is kind and found == value, f"{reader}: {key}"


@pytest.mark.parametrize(
    ("config", "llama_cpp", "ctranslate2"),
    [
        (TINY, True, True),
        (replace(TINY, attn_config=AttnConfig(alibi=True, clip_qkv=2.0)), True, False),
        (replace(TINY, attn_config=AttnConfig(alibi=True, softmax_scale=0.5)), False, False),
        (replace(TINY, norm_eps=1e-6), False, False),
    ],
    ids=["plain", "clipped", "scaled", "another epsilon"],
)
def test_a_converter_that_would_compute_something_else_does_not_know_the_folder(
    tiny_tokenizer: Any, config: MPTConfig, llama_cpp: bool, ctranslate2: bool
) -> None:
    """llama.cpp honours clip_qkv alone of these, CTranslate2 none, and neither says so."""
    written = folder_module.native_config(config, tiny_tokenizer, torch.float32)
    assert ("llm_config" in written) == llama_cpp
    assert ("auto_map" in written) == ctranslate2


def test_the_folder_loads_with_and_without_its_code(write_run: WriteRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(write_run(), tmp_path / "out", dtype="fp32", progress=False)
    ids = torch.arange(10)[None]
    logits = []
    for trusted in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trusted)
        assert type(model).__name__ == ("MPTForCausalLM" if trusted else "MptForCausalLM")
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_an_export_that_fails_leaves_nothing(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_module.native_config

    def with_another_epsilon(config: MPTConfig, *rest: Any) -> dict[str, Any]:
        return before(replace(config, norm_eps=2e-5), *rest)

    monkeypatch.setattr(folder_module, "native_config", with_another_epsilon)
    run = write_run()
    there = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"the export does not give the checkpoint's logits"):
        export(run, tmp_path / "out", progress=False)
    assert sorted(tmp_path.iterdir()) == there


def test_what_is_there_is_kept_unless_asked(write_run: WriteRun, tmp_path: Path) -> None:
    run, out = write_run(), tmp_path / "out"
    out.mkdir()
    (out / "notes").touch()
    with pytest.raises(CheckpointError, match=r"exists already. Use another path, or set overwrite=true"):
        export(run, out, progress=False)
    with pytest.raises(
        CheckpointError, match="holds notes, which is not of such a folder, so that it is not"
    ):
        export(run, out, overwrite=True, progress=False)
    (out / "notes").unlink()
    (out / "README.md").write_text("an older export")
    export(run, out, overwrite=True, progress=False)
    assert (out / "README.md").read_text() != "an older export"


@pytest.mark.parametrize("out", ["run", "."])
def test_an_export_never_replaces_what_it_reads(write_run: WriteRun, out: str) -> None:
    run = write_run()
    there = sorted(run.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="is read from there"):
        export(run, run if out == "run" else run.parent, overwrite=True, progress=False)
    assert sorted(run.parent.rglob("*")) == there


def test_weights_that_are_not_finite_are_named(write_run: WriteRun, tmp_path: Path) -> None:
    network = MPT(TINY, seed=1)
    network.transformer.norm_f.weight.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"transformer.norm_f.weight holds NaN or infinity as float32"):
        export(write_run(network=network), tmp_path / "out", dtype="fp32", progress=False)


def test_an_exported_folder_can_be_exported_again(write_run: WriteRun, tmp_path: Path) -> None:
    export(write_run(), tmp_path / "a", dtype="fp32", progress=False)
    export(tmp_path / "a", tmp_path / "b", dtype="fp32", progress=False)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_checkpoint_without_tokenizer_asks_for_one(
    write_run: WriteRun, tmp_path: Path, tokenizer_folder: Path
) -> None:
    run = write_run()
    (run / "tokenizer").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer next to it. Name one: tokenizer=FOLDER"):
        export(run, tmp_path / "out", progress=False)
    export(run, tmp_path / "out", tokenizer=str(tokenizer_folder), progress=False)
