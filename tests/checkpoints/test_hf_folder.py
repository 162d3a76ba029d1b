from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mptfoundry.checkpoints.hf_folder import FolderWeights
from mptfoundry.errors import CheckpointError
from tests.conftest import RunsCode

VALUES = torch.arange(6.0).reshape(2, 3)


def write_index(folder: Path, names: dict[str, str], kind: str = "model.safetensors") -> None:
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_and_many_are_read_in_both_formats(tmp_path: Path, kind: str) -> None:
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    for save_name, name, value in (
        (f"one.{kind}", "transformer.a", VALUES),
        (f"two.{kind}", "transformer.b", -VALUES),
        (single, "transformer.c", VALUES),
    ):
        save = save_file if kind == "safetensors" else torch.save
        save({name: value}, tmp_path / save_name)
    assert list(FolderWeights(tmp_path).outlines) == ["transformer.c"]
    write_index(tmp_path, {"transformer.a": f"one.{kind}", "transformer.b": f"two.{kind}"}, single)
    weights = FolderWeights(tmp_path)
    assert {name: o.shape for name, o in weights.outlines.items()} == {
        "transformer.a": (2, 3),
        "transformer.b": (2, 3),
    }
    torch.testing.assert_close(weights.read("transformer.b"), -VALUES)
    assert weights.read("transformer.b", torch.float16).dtype is torch.float16


def test_the_names_of_a_base_model_get_their_root(tmp_path: Path) -> None:
    save_file({"wte.weight": VALUES, "lm_head.weight": VALUES + 1}, tmp_path / "model.safetensors")
    weights = FolderWeights(tmp_path)
    assert set(weights.outlines) == {"transformer.wte.weight", "lm_head.weight"}
    torch.testing.assert_close(weights.read("transformer.wte.weight"), VALUES)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", ".."]
)
def test_an_index_cannot_reach_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"transformer.a": VALUES}, tmp_path / "secret.safetensors")
    write_index(folder, {"transformer.a": name})
    with pytest.raises(CheckpointError, match=r"refused, since it names|is not a file of weights"):
        FolderWeights(folder)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"transformer.a": torch.ones(1000)}, file)
    os.truncate(file, 2000)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged, it can't be read \([^\n]*\)\.$"):
        FolderWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"damaged, it holds no weight_map"):
        FolderWeights(tmp_path)
    write_index(tmp_path, {"transformer.a": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-1.safetensors is missing, which"):
        FolderWeights(tmp_path)


def test_a_bin_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"transformer.a": RunsCode(f"touch {tmp_path / 'trace'}")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refused, since loading it would call"):
        FolderWeights(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no weights. Looked for model.safetensors and pytorch_model.bin"
    ):
        FolderWeights(tmp_path)
