from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.errors import CheckpointError
from mptfoundry.export import comparison
from mptfoundry.export.comparison import check_bytes, compare_logits
from mptfoundry.export.folder import export
from mptfoundry.mpt.config import AttnConfig
from tests.conftest import TINY

WriteRun = Callable[..., Path]


@pytest.fixture
def exported(write_run: WriteRun, tmp_path: Path) -> tuple[Any, Path]:
    run, out = write_run(), tmp_path / "out"
    export(run, out, dtype="fp32", progress=False)
    return open_model(run), out


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_affordable_bytes", lambda: 1)


def change(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0] += 1e-3
    save_file(tensors, file, {"format": "pt"})


def test_a_changed_weight_is_found(exported: tuple[Any, Path], tiny_tokenizer: Any) -> None:
    source, folder = exported
    compare_logits(source, folder, tiny_tokenizer, torch.float32)
    change(folder, "transformer.blocks.1.norm_2.weight")
    with pytest.raises(CheckpointError, match=r"out: the export does not give the checkpoint's logits"):
        compare_logits(source, folder, tiny_tokenizer, torch.float32)


def test_a_model_too_large_for_memory_is_compared_in_part(
    exported: tuple[Any, Path], tiny_tokenizer: Any, little_memory: None
) -> None:
    source, folder = exported
    found = compare_logits(source, folder, tiny_tokenizer, torch.float32)
    assert (found.layers, found.all_layers) == (1, 2)
    assert "the first 1 of 2 layers" in str(found)
    other = replace(source, config=replace(source.config, logit_scale=0.999))
    with pytest.raises(CheckpointError, match=r"does not give the checkpoint's logits"):
        compare_logits(other, folder, tiny_tokenizer, torch.float32)


@pytest.mark.parametrize("attention", [AttnConfig(alibi=True, alibi_bias_max=16), AttnConfig(qk_ln=True)])
def test_a_part_of_a_folder_with_its_own_code_is_compared_too(
    write_run: WriteRun, tmp_path: Path, attention: AttnConfig, little_memory: None
) -> None:
    config = replace(TINY, attn_config=attention, tie_word_embeddings=False)
    summary = export(write_run(config), tmp_path / "out", progress=False)
    assert summary.comparison.layers == 1 and summary.comparison.difference == 0
    assert summary.comparison.export_rounding > 0


def test_a_tensor_that_reads_back_otherwise_is_named(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    check_bytes(folder)
    change(folder, "transformer.blocks.1.norm_2.weight")
    with pytest.raises(CheckpointError, match=r"transformer.blocks.1.norm_2.weight reads back otherwise"):
        check_bytes(folder)


@pytest.mark.parametrize(
    "attention", [AttnConfig(alibi=True, alibi_bias_max=9), AttnConfig(alibi=True, softmax_scale=0.3536)]
)
def test_a_small_change_of_the_mathematics_is_found(
    exported: tuple[Any, Path], tiny_tokenizer: Any, attention: AttnConfig
) -> None:
    source, folder = exported
    other = replace(source, config=replace(source.config, attn_config=attention))
    with pytest.raises(CheckpointError, match=r"does not give the checkpoint's logits"):
        compare_logits(other, folder, tiny_tokenizer, torch.float32)
