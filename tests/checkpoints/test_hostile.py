"""Folders and checkpoints that someone made to do harm: each is refused in a sentence, nothing of it ran."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as outline

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.errors import CheckpointError
from mptfoundry.export.importing import import_model
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from tests.conftest import RunsCode

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("hostile Hugging Face folders", "code, links, shapes, configs, 12 tests", "refused"),
]

MODEL = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    vocab_size=64,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)
STATE = MPT(MODEL, seed=1).state_dict()
CONFIG = {**MODEL.to_dict(), "model_type": "mpt"}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Where a payload would leave its trace."""
    return tmp_path / "trace"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is as it should be."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert open_model(folder).config == MODEL
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sharded checkpoint as llm-foundry's, with its config inside."""
    model = {f"model.{name}": tensor for name, tensor in STATE.items()}
    noted = {"huggingface": {"model": {"config": {"content": CONFIG}}, "tokenizer": {}}}
    state = {"state": {"model": model, "integrations": noted}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "ep0-ba1"), no_dist=True)
    assert open_model(tmp_path / "ep0-ba1").config == MODEL
    return tmp_path / "ep0-ba1"


def refused(path: Path, out: Path) -> str:
    """What the import says; nothing is written."""
    with pytest.raises(CheckpointError) as error:
        import_model(str(path), out, progress=False)
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_code_beside_the_weights_is_not_run(folder: Path, trace: Path, tmp_path: Path) -> None:
    payload = f"open({str(trace)!r}, 'w')\n"
    for name in ("configuration_mpt.py", "modeling_mpt.py", "tokenization_mpt.py", "__init__.py"):
        (folder / name).write_text(payload)
    auto_map = {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPT"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    import_model(str(folder), tmp_path / "run", progress=False)
    assert open_model(tmp_path / "run").config == MODEL
    assert not trace.exists()


def test_a_tokenizers_code_is_not_run(
    folder: Path, trace: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 320}))
    save_file({**STATE, "transformer.wte.weight": torch.ones(320, 32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    auto_map = {"AutoTokenizer": ["tokenization_mpt.Tokenizer", "tokenization_mpt.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto_map})
    )
    (folder / "tokenization_mpt.py").write_text(f"open({str(trace)!r}, 'w')\n")
    import_model(str(folder), tmp_path / "run", progress=False)
    assert not trace.exists()
    assert not list((tmp_path / "run").rglob("tokenization*.py"))


def test_pickles_that_run_code_are_refused_in_every_place(
    folder: Path, trace: Path, tmp_path: Path, sharded: Path
) -> None:
    evil, out = RunsCode(f"touch {trace}"), tmp_path / "run"
    (folder / "model.safetensors").unlink()
    torch.save({**STATE, "more": evil}, folder / "pytorch_model.bin")
    assert "refused, since loading it would call" in refused(folder, out)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
    assert "damaged or cut short" in refused(folder, out)
    torch.save({"state": {"model": {}, "callbacks": evil}}, tmp_path / "evil.pt")
    assert "refused, since loading it would call" in refused(tmp_path / "evil.pt", out)
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = evil
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "refused, since reading it would call" in refused(sharded, out)
    assert not trace.exists()


@pytest.mark.parametrize("wanted", ["d_model", "norm_f"])
def test_pickles_inside_the_pieces_of_a_sharded_checkpoint_are_refused(
    sharded: Path, trace: Path, tmp_path: Path, wanted: str
) -> None:
    payload = tmp_path / "payload"
    torch.save(RunsCode(f"touch {trace}"), payload)
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    place = next(place for key, place in metadata.storage_data.items() if wanted in key.fqn)
    place.relative_path, place.offset, place.length = "__0_0.distcp", 0, payload.stat().st_size
    rest = (sharded / "__0_0.distcp").read_bytes()
    (sharded / "__0_0.distcp").write_bytes(payload.read_bytes() + rest[payload.stat().st_size :])
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    said = refused(sharded, tmp_path / "run")
    assert (
        "would need more than values" in said
        or "norm_f.weight can't be read" in said
        or "a note holds" in said
    )
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd.bin", "sub/a.bin", "..", "a\\b.bin", "a\0.bin", 7, None]
)
def test_an_index_names_files_of_its_own_folder_and_nothing_else(
    folder: Path, tmp_path: Path, name: Any
) -> None:
    save_file(STATE, tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(STATE, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(folder, tmp_path / "run")
    assert "is not a file of its own folder" in said or "is not a file of weights" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "merges.txt"])
def test_links_that_lead_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "tokenizer.json").write_text("{}")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert f"{name}: refused, since it is a link to {secret}" in refused(folder, tmp_path / "run")


def test_links_of_a_sharded_checkpoint_are_refused_too(sharded: Path, tmp_path: Path) -> None:
    piece = sharded / "__0_0.distcp"
    piece.rename(tmp_path / "elsewhere")
    piece.symlink_to(tmp_path / "elsewhere")
    assert "__0_0.distcp: refused, since it is a link to" in refused(sharded, tmp_path / "run")


def in_safetensors(folder: Path) -> None:
    header = {"transformer.wte.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0\0\0")


def in_a_header_that_is_said_to_be_huge(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def in_bin_with_strides_of_zero(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.ones(4)}, folder / "plain.bin")
    with (
        zipfile.ZipFile(folder / "plain.bin") as plain,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as forged,
    ):
        for name in plain.namelist():
            content = plain.read(name)
            if name.endswith("data.pkl"):
                size_and_stride, a_million = b"K\x04\x85q\x08K\x01\x85q\t", b"J\x00\x00\x00\x7f"
                assert size_and_stride in content
                content = content.replace(size_and_stride, a_million + b"\x85q\x08K\x00\x85q\t")
            forged.writestr(name, content)


@pytest.mark.parametrize(
    "forge", [in_safetensors, in_a_header_that_is_said_to_be_huge, in_bin_with_strides_of_zero]
)
def test_shapes_that_are_larger_than_what_is_stored_are_refused(
    folder: Path, tmp_path: Path, forge: Callable[[Path], None]
) -> None:
    forge(folder)
    said = refused(folder, tmp_path / "run")
    assert "damaged, it can't be read" in said or "says it has the shape (2130706432,)" in said


def test_an_outline_that_tells_of_more_than_is_stored_is_refused(sharded: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["state.model.model.transformer.wte.weight"]
    entry.size = torch.Size([10**6, 10**6])
    entry.chunks = [outline.ChunkStorageMetadata(torch.Size([0, 0]), entry.size)]
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    said = refused(sharded, tmp_path / "run")
    assert (
        "refused, since .metadata tells of 4,000,0" in said and "bytes of weights, and its files hold" in said
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('"n_layers": 1000', "holds 2 blocks; its config says n_layers: 1000"),
        ('"n_layers": 1000000000', "n_layers: 1000000000 is too large. Use 10000 or less"),
        ('"d_model": 1e18', "d_model: 1e+18 is refused. No model has such a number"),
        ('"d_model": 2147483640, "vocab_size": 2147483640', "d_model: 2147483640 is too large"),
        ('"vocab_size": -1', "vocab_size: -1 is not positive"),
        ('"norm_eps": NaN', "norm_eps: nan is refused. No model has such a number"),
        ('"norm_eps": Infinity', "norm_eps: inf is refused"),
        ('"attn_config": {"softmax_scale": -Infinity}', "attn_config: softmax_scale: -inf is refused"),
        ('"expansion_ratio": 1e300', "expansion_ratio: 1e+300 is refused"),
        (f'"max_seq_len": {10**400}', "max_seq_len: 1000000"),
        (f'"max_seq_len": {"9" * 5000}', "config.json: can't be read"),
        ('"n_heads": "4"', "n_heads: '4'. Allowed: int"),
        ('"attn_config": ["alibi"]', "attn_config: ['alibi'] is not a section"),
        (f'"x": {"[" * 100_000}{"]" * 100_000}', "config.json: can't be read"),
        ('"x": ' + '{"a":' * 50 + "1" + "}" * 50, "nested too deeply"),
    ],
)
def test_absurd_configs_are_refused_before_anything_is_computed(
    folder: Path, tmp_path: Path, change: str, said: str
) -> None:
    text = json.dumps({key: value for key, value in CONFIG.items() if f'"{key}"' not in change})
    (folder / "config.json").write_text(f"{text[:-1]}, {change}}}")
    assert said in refused(folder, tmp_path / "run")


def test_a_config_as_large_as_a_disk_is_not_read(folder: Path, tmp_path: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "config.json: refused, since it is larger than 67,108,864 bytes" in refused(
        folder, tmp_path / "run"
    )


def test_a_checkpoint_that_carries_files_of_other_places_writes_none_of_them(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    evil = {"content": {"evil": True}}
    carried = {"../../evil.json": evil, "/tmp/evil.json": evil, "code.py": {"content": "x"}, "a": None}
    noted = {"huggingface": {"model": {"config": {"content": CONFIG}}, "tokenizer": carried}}
    model = {f"model.{name}": tensor for name, tensor in STATE.items()}
    torch.save({"state": {"model": model, "integrations": noted}}, tmp_path / "a.pt")
    import_model(str(tmp_path / "a.pt"), tmp_path / "in" / "run", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "in"}
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("code.py"))
    assert not list(tmp_path.rglob("tokenizer*"))
