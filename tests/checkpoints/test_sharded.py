from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mptfoundry.checkpoints.sharded import ShardedWeights, read_metadata, why_folder_is_not_whole
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY, RunsCode
from tests.ranks import run_on_ranks


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    model = {f"model.{name}": tensor for name, tensor in tensors.items()}
    state = {"state": {"model": model, "optimizers": {"Lion": {"m": torch.ones(9)}}, "batch": 3}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def rewrite(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_only_the_models_tensors_are_offered(tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    weights = ShardedWeights(save(tmp_path / "ep0-ba1", {"transformer.wte.weight": values}))
    assert {name: outline.shape for name, outline in weights.outlines.items()} == {
        "transformer.wte.weight": (2, 3)
    }
    torch.testing.assert_close(weights.read("transformer.wte.weight"), values)
    assert weights.read("transformer.wte.weight", torch.bfloat16).dtype is torch.bfloat16


SAVE_ON_A_RANK = """
import sys, torch, torch.distributed, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
torch.distributed.init_process_group("gloo")
tensor = torch.arange(35.0).reshape(7, 5)
sharded = distribute_tensor(tensor, init_device_mesh("cpu", (2,)), [Shard(0)])
dcp.save({"state": {"model": {"model.a": sharded}}}, storage_writer=dcp.FileSystemWriter(sys.argv[1]))
torch.distributed.barrier()  # destroying the group hangs now and then: gloo waits for a thread of its own
"""


def test_the_pieces_of_two_ranks_become_one_tensor(tmp_path: Path) -> None:
    script, folder = tmp_path / "save.py", tmp_path / "ep0-ba1"
    script.write_text(SAVE_ON_A_RANK)
    done = run_on_ranks(script, folder)
    assert done.returncode == 0, done.stdout
    assert {entry.name for entry in folder.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    torch.testing.assert_close(ShardedWeights(folder).read("a"), torch.arange(35.0).reshape(7, 5))


def first_piece(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def first_tensor(metadata: Any) -> Any:
    return metadata.state_dict_metadata["state.model.model.a"]


OTHER = BytesStorageMetadata()  # any other object of the same pickle
MISPLACED: dict[str, Callable[[Any], object]] = {
    "file": lambda metadata: setattr(first_piece(metadata), "relative_path", OTHER),
    "offset": lambda metadata: setattr(first_piece(metadata), "offset", OTHER),
    "no offset": lambda metadata: delattr(first_piece(metadata), "offset"),
    "piece": lambda metadata: metadata.storage_data.update(dict.fromkeys(metadata.storage_data, OTHER)),
    "name of a piece": lambda metadata: metadata.storage_data.update({("a", 0): first_piece(metadata)}),
    "size": lambda metadata: setattr(first_tensor(metadata), "size", OTHER),
    "dtype": lambda metadata: setattr(first_tensor(metadata).properties, "dtype", OTHER),
    "chunk": lambda metadata: first_tensor(metadata).chunks.append(OTHER),
    "entry": lambda metadata: metadata.state_dict_metadata.update({"state.model.model.a": "a"}),
    "entries": lambda metadata: setattr(metadata, "state_dict_metadata", OTHER),
    "path": lambda metadata: metadata.planner_data.update({"state.model.model.a": OTHER}),
    "paths": lambda metadata: setattr(metadata, "planner_data", OTHER),
}


@pytest.mark.parametrize("place", MISPLACED)
def test_an_outline_with_a_value_in_anothers_place_is_damaged(tmp_path: Path, place: str) -> None:
    """As one changed bit does, where no checksums tell: the pickle refers to another of its objects."""
    folder = save(tmp_path / "ep0-ba1", {"a": torch.ones(2)})
    rewrite(folder, MISPLACED[place])
    damaged = r"\.metadata: damaged, its entries are not those of a sharded checkpoint"
    assert re.search(damaged, why_folder_is_not_whole(folder) or "")
    with pytest.raises(CheckpointError, match=damaged):
        ShardedWeights(folder)


def test_an_outline_that_runs_code_is_refused_by_the_name_of_what_it_calls(tmp_path: Path) -> None:
    folder, trace = save(tmp_path / "ep0-ba1", {"a": torch.ones(2)}), tmp_path / "trace"
    rewrite(folder, lambda metadata: setattr(metadata, "planner_data", RunsCode(f"touch {trace}")))
    with pytest.raises(
        CheckpointError, match=r"\.metadata: refused, since reading it would call \w+\.system"
    ):
        ShardedWeights(folder)
    assert not trace.exists()


def test_an_outline_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "ep0-ba1", {"a": torch.ones(2)})

    def point_outside(metadata: Any) -> None:
        for piece in metadata.storage_data.values():
            piece.relative_path = "../secret.distcp"

    (tmp_path / "secret.distcp").write_bytes(b"x" * 9999)
    rewrite(folder, point_outside)
    with pytest.raises(CheckpointError, match=r"refused, since it names '../secret.distcp'"):
        ShardedWeights(folder)


def test_a_damaged_outline_is_one_sentence(tmp_path: Path) -> None:
    folder = save(tmp_path / "ep0-ba1", {"a": torch.ones(2)})
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged, it can't be read \(\w+\)\.$"):
        read_metadata(folder)


def test_a_damaged_piece_names_its_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path / "ep0-ba1", {"a": torch.ones(2)})
    file = folder / "__0_0.distcp"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"ep0-ba1: damaged, a in __0_0.distcp holds other bytes"):
        ShardedWeights(folder).read("a")


SAVE_BY_FSDP1 = """
import sys, torch, torch.distributed, torch.distributed.checkpoint as dcp
from composer.utils import dist
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY
dist.initialize_dist("cpu")
model = torch.nn.ModuleDict({"model": FullyShardedDataParallel(
    MPT(TINY, seed=3), device_id=torch.device("cpu"), use_orig_params=sys.argv[2] == "True")})
FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
dcp.save({"state": {"model": model.state_dict()}}, storage_writer=dcp.FileSystemWriter(sys.argv[1]))
torch.distributed.barrier()
"""


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_what_pytorchs_first_fsdp_saved_is_read(tmp_path: Path, use_orig_params: bool) -> None:
    script, folder = tmp_path / "save.py", tmp_path / "ep0-ba1"
    script.write_text(SAVE_BY_FSDP1)
    done = run_on_ranks(script, folder, use_orig_params)
    assert done.returncode == 0, done.stdout
    weights = ShardedWeights(folder)
    for name, tensor in MPT(TINY, seed=3).state_dict().items():
        assert torch.equal(weights.read(name), tensor), name
