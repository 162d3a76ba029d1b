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
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is a part of its own."""
    monkeypatch.setattr(comparison, "_PART_BYTES", 1)


def change(folder: Path, name: str, *, keep_checksums: bool = False) -> None:
    if not keep_checksums:
        (folder / "checksums.json").unlink(missing_ok=True)
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


def test_parts_give_what_the_whole_gives(
    exported: tuple[Any, Path], tiny_tokenizer: Any, in_parts: None
) -> None:
    source, folder = exported
    found = compare_logits(source, folder, tiny_tokenizer, torch.float32)
    assert (found.layers, found.all_layers) == (2, 2) and found.agrees
    change(folder, "transformer.blocks.1.norm_2.weight")
    with pytest.raises(CheckpointError, match=r"does not give the checkpoint's logits"):
        compare_logits(source, folder, tiny_tokenizer, torch.float32)


def test_of_a_large_model_the_first_layers_are_compared(
    exported: tuple[Any, Path], tiny_tokenizer: Any, in_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_COMPARED_BYTES", 1)
    source, folder = exported
    found = compare_logits(source, folder, tiny_tokenizer, torch.float32)
    assert (found.layers, found.all_layers) == (1, 2)
    assert "the first 1 of 2 layers" in str(found)
    other = replace(source, config=replace(source.config, logit_scale=0.999))
    with pytest.raises(CheckpointError, match=r"does not give the checkpoint's logits"):
        compare_logits(other, folder, tiny_tokenizer, torch.float32)


@pytest.mark.parametrize(
    "attention",
    [AttnConfig(alibi=True, alibi_bias_max=16), AttnConfig(qk_ln=True), AttnConfig(alibi=True)],
    ids=["steep", "learned positions", "native"],
)
def test_rounding_is_told_from_parts_as_from_the_whole(
    write_run: WriteRun, tmp_path: Path, attention: AttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_native = attention == AttnConfig(alibi=True)
    run = write_run(replace(TINY, attn_config=attention, tie_word_embeddings=is_native))
    whole = export(run, tmp_path / "whole", progress=False).comparison
    monkeypatch.setattr(comparison, "_PART_BYTES", 1)
    parts = export(run, tmp_path / "parts", progress=False).comparison
    assert parts.layers == whole.layers == 2
    assert 0 < parts.export_rounding <= whole.export_rounding  # of fewer words
    assert is_native or parts.difference == whole.difference == 0


def test_a_tensor_that_reads_back_otherwise_is_named(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    check_bytes(folder)
    change(folder, "transformer.blocks.1.norm_2.weight", keep_checksums=True)
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
