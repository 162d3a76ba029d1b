"""Models in an object store: which objects are fetched, and what is said where that fails."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from composer.utils import ObjectStore, file_helpers

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.checkpoints.staging import find_objects, staged
from mptfoundry.errors import CheckpointError
from mptfoundry.export.folder import export

WriteRun = Callable[..., Path]


class FolderStore(ObjectStore):
    """A bucket that is a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def get_uri(self, object_name: str) -> str:
        return f"folder://bucket/{object_name}"

    def get_object_size(self, object_name: str) -> int:
        return (self.folder / object_name).stat().st_size

    def list_objects(self, prefix: str | None = None) -> list[str]:
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        names = [str(file.relative_to(self.folder)) for file in files]
        return sorted(name for name in names if name.startswith(prefix or ""))

    def download_object(self, object_name, filename, overwrite=False, callback=None) -> None:  # type: ignore[no-untyped-def]
        self.fetched.append(object_name)
        shutil.copyfile(self.folder / object_name, filename)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderStore]:
    """What `folder://bucket/...` names."""
    store = FolderStore(tmp_path / "bucket")
    monkeypatch.setitem(file_helpers.BACKEND_TO_OBJECT_STORE_FACTORY, "folder", lambda bucket, path: store)
    yield store


@pytest.mark.parametrize("path", ["runs/mine", "runs/mine/", "runs/mine/ep0-ba10-rank0.pt"])
def test_a_remote_run_is_exported_as_a_local_one(
    store: FolderStore, write_run: WriteRun, tmp_path: Path, path: str
) -> None:
    run = write_run()
    shutil.copytree(run, store.folder / "runs" / "mine")
    (store.folder / "runs" / "mine" / "ep0-ba4-rank0.pt").write_bytes(b"an older one")
    (store.folder / "runs" / "mine-too").mkdir()
    (store.folder / "runs" / "mine-too" / "ep0-ba99-rank0.pt").write_bytes(b"another run's")
    export(f"folder://bucket/{path}", tmp_path / "remote", progress=False)
    export(run, tmp_path / "local", progress=False)
    assert [name for name in store.fetched if name.endswith(".pt")] == ["runs/mine/ep0-ba10-rank0.pt"]
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "remote" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bucket", "local", "remote", "run"]


def test_a_remote_folder_can_be_exported_again(
    store: FolderStore, write_run: WriteRun, tmp_path: Path
) -> None:
    export(write_run(), store.folder / "hf", dtype="fp32", progress=False)
    export("folder://bucket/hf", tmp_path / "again", dtype="fp32", progress=False)
    there, here = store.folder / "hf" / "model.safetensors", tmp_path / "again" / "model.safetensors"
    assert there.read_bytes() == here.read_bytes()


def test_a_checkpoint_alone_takes_what_it_lacks_from_the_local_run(
    store: FolderStore, write_run: WriteRun, tmp_path: Path
) -> None:
    run = write_run()
    store.folder.mkdir()
    (run / "ep0-ba10-rank0.pt").rename(store.folder / "ep0-ba10-rank0.pt")
    url = "folder://bucket/ep0-ba10-rank0.pt"
    with pytest.raises(CheckpointError, match=r"config\.json|config\.yaml"):
        export(url, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"run_folder: nowhere: there is no such folder"):
        export(url, tmp_path / "out", run_folder="nowhere", progress=False)
    export(url, tmp_path / "out", run_folder=str(run), progress=False)
    assert open_model(tmp_path / "out").config.d_model == 32


SHARDED = [
    "r/ep0-ba9/__0_0.distcp",
    "r/ep0-ba5/.metadata",
    "r/ep0-ba5/__0_0.distcp",
    "r/ep0-ba5/__1_0.distcp",
]


@pytest.mark.parametrize("root", ["r", "r/ep0-ba5"])
def test_of_sharded_checkpoints_the_newest_whole_one_is_taken(root: str) -> None:
    names = [*SHARDED, "r/config.yaml", "r/tokenizer/tokenizer.json", "r/latest-sharded-rank0.symlink"]
    found = find_objects(root, lambda prefix: [name for name in names if name.startswith(prefix)])
    assert found.model == "ep0-ba5"
    assert sorted(found.names) == sorted([*SHARDED[1:], "r/config.yaml", "r/tokenizer/tokenizer.json"])


def test_a_url_without_model_says_what_was_looked_for(store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model there, or no right to see it.*ep0-ba10"):
        export("folder://bucket/nothing", tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"unknown://x: can't be read \(There is no implementation"):
        export("unknown://x", tmp_path / "out", progress=False)


def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, store: FolderStore) -> None:
    store.list_objects = lambda prefix=None: ["run/../../evil", "run/config.json"]  # type: ignore[method-assign]
    found = find_objects("run", store.list_objects)
    assert found.names == ["run/config.json"]
    names = ["run/ep0-ba1/.metadata", "run/ep0-ba1/../../../evil"]
    found = find_objects("run", lambda prefix: [name for name in names if name.startswith(prefix)])
    with pytest.raises(CheckpointError, match=r"refused, since its name leads out of its folder"):
        found.place_of(names[1])


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_fetched(
    store: FolderStore, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(write_run(), store.folder / "run")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    with pytest.raises(CheckpointError, match=r"is staged next to it and takes [\d,]+ bytes, 1,000 are free"):
        export("folder://bucket/run", tmp_path / "out", progress=False)
    assert store.fetched == []


def test_a_local_checkpoint_has_its_run_beside_it(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    with staged(run, tmp_path / "out", None, progress=False) as path:
        assert path == run
    with pytest.raises(CheckpointError, match=r"run_folder: it is for remote checkpoints"):
        export(run, tmp_path / "out", run_folder=str(run), progress=False)
