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
from mptfoundry.export import native
from mptfoundry.export.native import export, native_config, why_not_native
from mptfoundry.mpt.config import ActivationConfig, AttnConfig, FFNConfig, MPTConfig
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

    network = MPT(config, seed=1).eval()
    for parameter in network.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
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


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_weights_are_those_of_the_checkpoint_in_the_dtype_asked_for(
    write_run: WriteRun, tmp_path: Path, dtype: str | None
) -> None:
    run, out = write_run(), tmp_path / "out"
    summary = export(run, out, dtype=dtype, shard_bytes=60_000, progress=False)
    assert len(list(out.glob("model-*.safetensors"))) == summary.weight_files > 1
    exported, expected = load_network(out)[0].state_dict(), MPT(TINY, seed=1).state_dict()
    assert list(exported) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor.to(native.DTYPES[dtype or "fp32"]))


NOT_NATIVE = {
    "attn_config.alibi": replace(TINY, attn_config=AttnConfig()),
    "attn_config.alibi_bias_max": replace(TINY, attn_config=AttnConfig(alibi=True, alibi_bias_max=16)),
    "attn_config.attn_type": replace(
        TINY, attn_config=AttnConfig(alibi=True, attn_type="grouped_query_attention", kv_n_heads=2)
    ),
    "attn_config.qk_ln": replace(TINY, attn_config=AttnConfig(alibi=True, qk_ln=True)),
    "attn_config.qk_gn": replace(TINY, attn_config=AttnConfig(alibi=True, qk_gn=True)),
    "attn_config.prefix_lm": replace(TINY, attn_config=AttnConfig(alibi=True, prefix_lm=True)),
    "attn_config.sliding_window_size": replace(
        TINY, attn_config=AttnConfig(alibi=True, sliding_window_size=8)
    ),
    "attn_config.attn_logit_softcapping": replace(
        TINY, attn_config=AttnConfig(alibi=True, attn_logit_softcapping=30.0)
    ),
    "head_dim": replace(TINY, head_dim=16),
    "no_bias": replace(TINY, no_bias=False, attention_bias=False),
    "attention_bias": replace(TINY, attention_bias=True),
    "expansion_ratio": replace(TINY, expansion_ratio=2),
    "ffn_config.ffn_type": replace(TINY, ffn_config=FFNConfig(ffn_type="mptglu")),
    "ffn_config.ffn_act_fn.name": replace(TINY, ffn_config=FFNConfig(ffn_act_fn=ActivationConfig("relu"))),
    "ffn_config.ffn_act_fn.approximate": replace(
        TINY, ffn_config=FFNConfig(ffn_act_fn=ActivationConfig("gelu", "tanh"))
    ),
    "norm_type": replace(TINY, norm_type="rmsnorm"),
    "tie_word_embeddings": replace(TINY, tie_word_embeddings=False),
    "logit_scale": replace(TINY, logit_scale=0.5),
    "final_logit_softcapping": replace(TINY, final_logit_softcapping=30.0),
}


def test_every_rule_has_its_case() -> None:
    assert [key for key, _, _ in native.NATIVE_RULES] == list(NOT_NATIVE)


@pytest.mark.parametrize(("key", "config"), NOT_NATIVE.items())
def test_a_switch_that_transformers_ignores_is_refused_by_its_name(
    write_run: WriteRun, tmp_path: Path, key: str, config: MPTConfig
) -> None:
    assert [reason.split(" ")[0] for reason in why_not_native(config)] == [key]
    with pytest.raises(CheckpointError, match=f"can't express this model.*{key} is"):
        export(write_run(config), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_all_reasons_are_told_at_once() -> None:
    config = replace(TINY, logit_scale=0.5, attn_config=AttnConfig(alibi=True, alibi_bias_max=16))
    assert why_not_native(config) == [
        "attn_config.alibi_bias_max is 16, they compute 8",
        "logit_scale is 0.5, they compute null",
    ]


def test_no_switch_of_the_architecture_is_forgotten() -> None:
    """A new field must be looked at: written out, judged by a rule, or without effect on logits."""
    judged = {key for key, _, _ in native.NATIVE_RULES} | {
        "attn_config.kv_n_heads",
        "ffn_config.ffn_hidden_size",
    }
    written = {
        *("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "norm_eps"),
        *("attn_config.clip_qkv", "attn_config.softmax_scale"),
    }
    without_effect = {
        *("resid_pdrop", "emb_pdrop", "learned_pos_emb", "embedding_fraction", "init_config"),
        *(f"attn_config.{key}" for key in ("attn_pdrop", "attn_impl", "fused_qkv", "attn_uses_sequence_id")),
        *(f"attn_config.{key}" for key in MPTConfig().to_dict()["attn_config"] if key.startswith("rope")),
    }

    def keys(values: dict[str, Any], path: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            is_section = isinstance(value, dict) and not key.startswith(("rope", "init"))
            found |= keys(value, f"{path}{key}.") if is_section else {path + key}
        return found

    assert keys(MPTConfig().to_dict()) == judged | written | without_effect


def test_config_json_has_the_types_that_every_version_takes(tiny_tokenizer: Any) -> None:
    config = replace(
        TINY, attn_config=AttnConfig(alibi=True, clip_qkv=6), expansion_ratio=4.0, embedding_fraction=1
    )
    text = json.dumps(native_config(config, tiny_tokenizer, torch.bfloat16), indent=2)
    assert text == (Path(__file__).parent / "native_config.json").read_text().rstrip("\n")


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
    assert "auto_map" not in read["config.json"]


def test_an_export_that_fails_leaves_nothing(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = native.native_config

    def with_another_epsilon(config: MPTConfig, *rest: Any) -> dict[str, Any]:
        return before(replace(config, norm_eps=2e-5), *rest)

    monkeypatch.setattr(native, "native_config", with_another_epsilon)
    run = write_run()
    there = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"the export does not give the checkpoint's logits"):
        export(run, tmp_path / "out", progress=False)
    assert sorted(tmp_path.iterdir()) == there


def test_what_is_there_is_kept_unless_asked(write_run: WriteRun, tmp_path: Path) -> None:
    run, out = write_run(), tmp_path / "out"
    out.mkdir()
    (out / "notes").touch()
    with pytest.raises(CheckpointError, match=r"is there already. Name another place, or set overwrite=true"):
        export(run, out, progress=False)
    assert (out / "notes").exists()
    export(run, out, overwrite=True, progress=False)
    assert not (out / "notes").exists()


def test_an_exported_folder_can_be_exported_again(write_run: WriteRun, tmp_path: Path) -> None:
    export(write_run(), tmp_path / "a", dtype="fp32", progress=False)
    export(tmp_path / "a", tmp_path / "b", dtype=None, progress=False)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_checkpoint_without_tokenizer_asks_for_one(
    write_run: WriteRun, tmp_path: Path, tokenizer_folder: Path
) -> None:
    run = write_run()
    (run / "tokenizer").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer beside it. Name one: tokenizer=FOLDER"):
        export(run, tmp_path / "out", progress=False)
    export(run, tmp_path / "out", tokenizer=str(tokenizer_folder), progress=False)
