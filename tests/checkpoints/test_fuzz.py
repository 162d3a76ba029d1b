"""Damaged checkpoints and folders from seeds: each gives one sentence, or the weights that were written."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from mptfoundry.checkpoints.checksums import checksums_of, write_checksums, write_tensor_checksums
from mptfoundry.checkpoints.reading import open_model
from mptfoundry.checkpoints.weights import bytes_of
from mptfoundry.cli import main
from mptfoundry.errors import MPTFoundryError
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from tests.conftest import composer_state
from tests.fuzz import damaged_bytes, odd_values

# The long form is for `make soak`.
MANY = 60 if os.environ.get("MPTFOUNDRY_SOAK") == "1" else 1
MODEL = MPTConfig(
    d_model=16, n_heads=2, n_layers=1, max_seq_len=32, vocab_size=320, attn_config=AttnConfig(alibi=True)
)
NETWORK = MPT(MODEL, seed=1)
STATE = NETWORK.state_dict()
RUN = {"max_seq_len": 32, "model": {"name": "mpt_causal_lm", **json.loads(json.dumps(MODEL.to_dict()))}}
# What is damaged of each kind of model, and whether all of its bytes have checksums.
FILES = {
    "whole": "ep0-ba1-rank0.pt",
    "shards": "ep0-ba1/__0_0.distcp",
    "outline": "ep0-ba1/.metadata",
    "sums": "ep0-ba1/checksums.json",
    "safetensors": "model.safetensors",
    "tensor sums": "checksums.json",
    "bin": "pytorch_model.bin",
}


def write(kind: str, folder: Path) -> Path:
    """A small model; returns the file that is to be damaged."""
    folder.mkdir()
    if kind in ("whole", "shards", "outline", "sums"):
        (folder / "config.yaml").write_text(yaml.safe_dump(RUN))
        if kind == "whole":
            torch.save(composer_state(NETWORK, 1), folder / FILES[kind])
            return folder / FILES[kind]
        shards = folder / "ep0-ba1"
        state = {"state": composer_state(NETWORK, 1)["state"]}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
        write_checksums(shards, checksums_of(sorted(shards.iterdir())))
        return folder / FILES[kind]
    (folder / "config.json").write_text(json.dumps({**MODEL.to_dict(), "model_type": "mpt"}))
    if kind == "bin":
        torch.save(STATE, folder / FILES[kind])
    else:
        save_file(STATE, folder / "model.safetensors", metadata={"format": "pt"})
        write_tensor_checksums(folder, {name: zlib.crc32(bytes_of(tensor)) for name, tensor in STATE.items()})
    return folder / FILES[kind]


def read(model: Path) -> None:
    """What every verb does with a model."""
    source = open_model(model)
    for name, tensor in source.tensors():
        assert torch.equal(tensor, STATE[name]), f"{name} is another"


def try_all(mutants: Iterator[tuple[str, bytes]], model: Path, file: Path) -> int:
    """How many of the mutants are refused; the others give the weights that were written."""
    refused = 0
    for what, content in mutants:
        file.write_bytes(content)
        try:
            read(model)
        except MPTFoundryError as error:
            assert "\n" not in str(error), what
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{file.name}, {what}: {error!r}") from error
    return refused


@pytest.mark.parametrize("kind", FILES)
def test_damaged_bytes_are_refused_or_change_nothing(tmp_path: Path, kind: str) -> None:
    file = write(kind, tmp_path / "model")
    read(tmp_path / "model")
    assert try_all(damaged_bytes(file.read_bytes(), 7, 12 * MANY), tmp_path / "model", file) >= 3


@pytest.mark.parametrize("name", ["config.json", "checksums.json", "index"])
def test_odd_values_in_the_texts_of_a_folder_are_refused_or_change_nothing(tmp_path: Path, name: str) -> None:
    write("safetensors", tmp_path / "model")
    file = tmp_path / "model" / name
    if name == "index":
        file = tmp_path / "model" / "model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(STATE, "model.safetensors")}))
    mutants = odd_values(json.loads(file.read_text()), 11, 10 * MANY)
    try_all(((what, json.dumps(value).encode()) for what, value in mutants), tmp_path / "model", file)


@pytest.mark.parametrize("kind", ["whole", "sums"])
def test_odd_values_in_the_texts_of_a_run_are_refused_or_change_nothing(tmp_path: Path, kind: str) -> None:
    file, values = write(kind, tmp_path / "model"), RUN
    if kind == "sums":
        values = json.loads(file.read_text())
    else:
        file = tmp_path / "model" / "config.yaml"
    mutants = odd_values(values, 13, 10 * MANY)
    try_all(((what, yaml.safe_dump(value).encode()) for what, value in mutants), tmp_path / "model", file)


@pytest.mark.parametrize("kind", ["whole", "shards", "safetensors"])
def test_no_verb_ends_in_a_traceback(
    tmp_path: Path, kind: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    file = write(kind, model)
    words = [str(model), f"tokenizer={tokenizer_folder}"]
    verbs: list[Callable[[], int]] = [
        lambda: main(["export", words[0], str(out), words[1]]),
        lambda: main(["import", words[0], str(out), words[1]]),
        lambda: main(["generate", words[0], "def", words[1], "max_new_tokens=1", "temperature=0"]),
    ]
    assert [verb() for verb in verbs[1:]] == [0, 0]
    for number, (what, content) in enumerate(damaged_bytes(file.read_bytes(), 17, 3 * MANY)):
        shutil.rmtree(out, ignore_errors=True)
        file.write_bytes(content)
        code = verbs[number % 3]()
        printed = capsys.readouterr().err
        assert code in (0, 1) and "Traceback" not in printed, what
        assert (code == 1) == ("model" in printed and not out.exists()) or number % 3 == 2, what
