"""Models made longer than they were trained: nothing changes for what fits, and ALiBi goes on beyond."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mptfoundry.checkpoints.reading import load_network
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.generation import generate
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

TRAINED = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=48,
    vocab_size=97,
    no_bias=True,
    attn_config=AttnConfig(alibi=True, alibi_bias_max=16, clip_qkv=6),
)


def saved(folder: Path, config: MPTConfig = TRAINED) -> Path:
    save_file(MPT(config, seed=3).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "mpt"}))
    return folder


def ids(length: int) -> torch.Tensor:
    return torch.randint(TRAINED.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [65_536, 83_968])
@torch.no_grad()
def test_what_fits_before_has_the_same_logits_after(tmp_path: Path, length: int) -> None:
    before, _ = load_network(saved(tmp_path))
    after, _ = load_network(tmp_path, config_overrides={"max_seq_len": length})
    assert after.config == replace(TRAINED, max_seq_len=length)
    assert torch.equal(after(ids(48)).logits, before(ids(48)).logits)
    beyond = after(ids(400)).logits
    torch.testing.assert_close(beyond[:, :48], before(ids(48)).logits)
    torch.testing.assert_close(beyond.double(), after.double()(ids(400)).logits, rtol=1e-4, atol=1e-4)


def test_generation_goes_past_the_trained_length_and_says_so_unless_it_was_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, _ = load_network(saved(tmp_path))
    raised, _ = load_network(tmp_path, config_overrides={"max_seq_len": 65_536})
    with caplog.at_level(logging.WARNING):
        expected = generate(raised, ids(40), max_new_tokens=60)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(network, ids(40), max_new_tokens=60), expected)
    assert "100 tokens are more than the model was made for (max_seq_len: 48)" in caplog.text
    assert expected.shape == (1, 100)
    with torch.no_grad():
        greedy = raised(expected[:, :-1]).logits[:, 39:].argmax(-1)
    assert torch.equal(expected[:, 40:], greedy)


def test_learned_positions_refuse_with_the_reason(tmp_path: Path) -> None:
    learned = replace(TRAINED, attn_config=AttnConfig())
    saved(tmp_path, learned)
    with pytest.raises(
        CheckpointError, match=r"learned positions can't be stretched: max_seq_len has to be 48"
    ):
        load_network(tmp_path, config_overrides={"max_seq_len": 65_536})
    network, _ = load_network(tmp_path)
    with pytest.raises(ConfigError, match=r"48 learned positions"):
        generate(network, ids(40), max_new_tokens=60)
