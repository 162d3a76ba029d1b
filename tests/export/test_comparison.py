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
from mptfoundry.export.comparison import compare_logits
from mptfoundry.export.folder import export
from mptfoundry.mpt.config import AttnConfig

WriteRun = Callable[..., Path]


@pytest.fixture
def exported(write_run: WriteRun, tmp_path: Path) -> tuple[Any, Path]:
    run, out = write_run(), tmp_path / "out"
    export(run, out, dtype="fp32", progress=False)
    return open_model(run), out


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


def test_a_model_too_large_for_memory_is_compared_in_part_and_bit_by_bit(
    exported: tuple[Any, Path], tiny_tokenizer: Any
) -> None:
    source, folder = exported
    comparison = compare_logits(source, folder, tiny_tokenizer, torch.float32, memory_bytes=1)
    assert (comparison.layers, comparison.all_layers) == (1, 2)
    assert "the first 1 of 2 layers" in str(comparison)
    change(folder, "transformer.blocks.1.norm_2.weight")
    with pytest.raises(
        CheckpointError, match=r"transformer.blocks.1.norm_2.weight was not written as it was"
    ):
        compare_logits(source, folder, tiny_tokenizer, torch.float32, memory_bytes=1)


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
