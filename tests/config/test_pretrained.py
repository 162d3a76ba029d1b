from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mptfoundry.architecture.hub import locate
from mptfoundry.config.load import load_train_config, to_yaml
from mptfoundry.errors import CheckpointError, ConfigError
from tests.config.conftest import SMALL

THERE: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {"alibi": True, "attn_impl": "triton", "clip_qkv": 6, "alibi_bias_max": 16},
    "d_model": 48,
    "expansion_ratio": 4,
    "learned_pos_emb": True,
    "max_seq_len": 128,
    "model_type": "mpt",
    "n_heads": 6,
    "n_layers": 3,
    "no_bias": True,
    "vocab_size": 512,
}
NAMED = "  name: mpt_causal_lm\n  pretrained_model_name_or_path: there\n"
ARCHITECTURE = "  d_model: 64\n  n_heads: 4\n  n_layers: 2\n  attn_config:\n    alibi: true\n"
Write = Callable[..., str]


@pytest.fixture
def run(write: Write) -> Callable[..., str]:
    """Writes `there`, a Hugging Face folder, with changes, and a run that names it and says no more."""

    def write_both(**changes: Any) -> str:
        Path("there").mkdir(exist_ok=True)
        Path("there/config.json").write_text(json.dumps({**THERE, **changes}))
        return write(text=SMALL.replace("  name: mpt_causal_lm\n" + ARCHITECTURE, NAMED))

    return write_both


def problems_of(*arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load_train_config(*arguments)
    return tuple(str(error.value).splitlines())


def test_the_architecture_is_that_of_the_folder(run: Callable[..., str]) -> None:
    config, notes = load_train_config(run())
    model = config.model
    assert (model.d_model, model.n_heads, model.n_layers, model.vocab_size) == (48, 6, 3, 512)
    assert (model.attn_config.clip_qkv, model.attn_config.alibi_bias_max, model.no_bias) == (6, 16, True)
    assert model.attn_config.attn_impl == "auto"
    assert model.takes_weights and notes == []


def test_what_a_run_wrote_loads_to_the_same_also_when_the_folder_is_gone(run: Callable[..., str]) -> None:
    words = ["model.config_overrides.attn_config.attn_pdrop=0.1", "model.config_overrides.max_seq_len=128"]
    config, _ = load_train_config(run(), words)
    Path("resolved.yaml").write_text(to_yaml(config))
    assert load_train_config("resolved.yaml")[0].model == config.model
    Path("there").rename("gone")
    assert load_train_config("resolved.yaml")[0].model == config.model
    assert problems_of("run.yaml") == (
        "run.yaml:4: model.pretrained_model_name_or_path: there: is neither a folder nor in the Hugging Face "
        "cache, and can't be fetched: HF_HUB_OFFLINE is set. Name a local folder, or fetch it once while "
        "online.",
    )


def test_a_model_out_of_reach_is_waited_for_where_the_file_says_its_sizes(write: Write) -> None:
    named = SMALL.replace("  name: mpt_causal_lm\n", NAMED) + "seed: 1\n"
    sized = write(text=named.replace("  n_layers: 2\n", "  n_layers: 2\n  vocab_size: 512\n"))
    words = ["model.config_overrides.resid_pdrop=0.1"]
    assert load_train_config(sized, words)[0].model.resid_pdrop == 0.1
    for path, word in ((sized, "model.pretrained=false"), (write(text=named), "seed=2")):
        (said,) = problems_of(path, [word])
        assert "there: is neither a folder nor in the Hugging Face cache" in said


def test_overrides_change_the_architecture_at_any_depth(run: Callable[..., str]) -> None:
    changes = [
        "resid_pdrop=0.1",
        "attn_config.attn_pdrop=0.2",
        "attn_config.attn_impl=torch",
        "vocab_size=640",
    ]
    config, _ = load_train_config(run(), [f"model.config_overrides.{change}" for change in changes])
    model = config.model
    assert (model.resid_pdrop, model.attn_config.attn_pdrop, model.vocab_size) == (0.1, 0.2, 640)
    assert (model.attn_config.attn_impl, model.attn_config.clip_qkv) == ("torch", 6)


def test_what_is_given_and_disagrees_names_both_values(run: Callable[..., str]) -> None:
    words = ["model.d_model=64", "model.attn_config.clip_qkv=6.0", "model.attn_config.alibi_bias_max=8"]
    assert problems_of(run(), words) == (
        "command line: model.d_model=64: 64 is not what there says, 48. Remove it, or change it with "
        "config_overrides.d_model.",
        "command line: model.attn_config.alibi_bias_max=8: 8 is not what there says, 16. Remove it, or "
        "change it with config_overrides.attn_config.alibi_bias_max.",
    )


def test_a_misspelt_override_is_found_with_its_place(run: Callable[..., str]) -> None:
    (said,) = problems_of(run(), ["model.config_overrides.attn_config.clip_qvk=4"])
    assert said.startswith("command line: model.config_overrides.attn_config.clip_qvk=4: ")
    assert said.endswith("model.attn_config.clip_qvk: unknown key. Did you mean clip_qkv?")


def test_overrides_without_a_model_to_change_are_refused(write: Write) -> None:
    (said,) = problems_of(write(), ["model.config_overrides.d_model=64"])
    assert "config_overrides: has no effect without pretrained_model_name_or_path" in said


def test_with_alibi_a_run_may_be_longer_than_its_model(run: Callable[..., str]) -> None:
    for words in (["max_seq_len=65536"], ["max_seq_len=83968", "model.config_overrides.max_seq_len=83968"]):
        config, notes = load_train_config(run(), words)
        assert config.model.max_seq_len == config.max_seq_len
        assert notes[0].endswith(f"there was made for 128 tokens, this run has {config.max_seq_len}.")
    assert load_train_config("run.yaml", ["max_seq_len=64"])[1] == []
    (said,) = problems_of("run.yaml", ["model.config_overrides.max_seq_len=256"])
    assert "256 is not the max_seq_len of the run, 128" in said


def test_learned_positions_end_where_they_end(run: Callable[..., str]) -> None:
    (said,) = problems_of(run(attn_config={"alibi": False}), ["max_seq_len=256"])
    assert said == (
        "command line: max_seq_len=256: 256 is not the length of there, 128, which has a "
        "learned embedding for each position. Use 128."
    )
    assert load_train_config("run.yaml")[0].model.has_learned_positions


def test_rotary_positions_that_depend_on_the_length_keep_it_unless_asked(run: Callable[..., str]) -> None:
    dynamic = {"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "dynamic", "factor": 2.0}}
    (said,) = problems_of(run(attn_config=dynamic), ["max_seq_len=256"])
    assert "on which its rotary positions depend. Use 128, or say so with model.config_overrides" in said
    words = ["max_seq_len=256", "model.config_overrides.max_seq_len=256"]
    assert load_train_config("run.yaml", words)[0].model.max_seq_len == 256


def test_llm_foundrys_name_for_a_model_of_transformers_becomes_ours(run: Callable[..., str]) -> None:
    text = Path(run()).read_text().replace("mpt_causal_lm", "hf_causal_lm")
    Path("run.yaml").write_text(text)
    words = ["model.pretrained=true", "model.trust_remote_code=true", "model.use_auth_token=false"]
    config, notes = load_train_config("run.yaml", words)
    assert config.model.name == "mpt_causal_lm" and config.model.takes_weights
    assert notes[-1] == "run.yaml:3: model.name: hf_causal_lm is now mpt_causal_lm, since there is an MPT."
    assert not load_train_config("run.yaml", ["model.pretrained=false"])[0].model.takes_weights


def test_another_architecture_is_refused(run: Callable[..., str]) -> None:
    text = Path(run(model_type="llama")).read_text().replace("mpt_causal_lm", "hf_causal_lm")
    Path("run.yaml").write_text(text)
    (said,) = problems_of("run.yaml")
    assert said.endswith("there/config.json: model_type is 'llama'. Only MPT models are read.")


def test_weights_come_from_one_place(run: Callable[..., str]) -> None:
    (said,) = problems_of(run(), ["load_path=x.pt"])
    assert "both say where the weights come from. Remove one" in said
    load_train_config("run.yaml", ["load_path=x.pt", "model.pretrained=false"])


def test_a_run_of_ours_can_be_named(run: Callable[..., str]) -> None:
    config, _ = load_train_config(run())
    Path("before").mkdir()
    Path("before/config.yaml").write_text(to_yaml(config))
    again, _ = load_train_config("run.yaml", ["model.pretrained_model_name_or_path=before"])
    assert again.model.network() == config.model.network()


def test_a_name_on_the_hub_is_its_snapshot_in_the_cache(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    run()
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--team--mpt"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "blobs").mkdir()
    Path("there/config.json").rename(cached / "blobs" / "aa")
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate("team/mpt", config_only=True) == snapshot
    named = ["model.pretrained_model_name_or_path=team/mpt"]
    config, notes = load_train_config("run.yaml", named)
    assert config.model.d_model == 48 and config.model.revision == commit
    assert notes[0].endswith(f"model.revision: team/mpt's main is {commit}.")
    resolved = yaml.safe_load(to_yaml(config))
    assert resolved["model"]["revision"] == commit
    with pytest.raises(CheckpointError, match=r"team/mpt at revision v2: is neither a folder nor in the"):
        locate("team/mpt", "v2", config_only=True)
    with pytest.raises(CheckpointError, match=r"a local folder has no revision v2"):
        locate(str(snapshot), "v2")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
