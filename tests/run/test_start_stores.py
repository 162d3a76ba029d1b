"""A run whose save folder is an object store: S3, as moto serves it on this machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.run import lifecycle
from mptfoundry.run.start import uploader_of
from mptfoundry.stores import Patience
from mptfoundry.train import train
from tests.conftest import TINY_RUN, losses

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "the machine's disk is lost",
        "folder deleted, checkpoints in S3, 2 kinds",
        "the losses of a run that was not stopped",
    ),
    (
        "an object in the store is damaged; lost; the bucket does not exist",
        "3",
        "the one before, on request; passed over; an error",
    ),
]

moto = pytest.importorskip(
    "moto.server", reason="needs moto, which serves S3 here: pip install 'moto[server]'"
)
boto3 = pytest.importorskip("boto3", reason="needs boto3, which comes with moto")
pytest.importorskip("flask", reason="needs moto's server: pip install 'moto[server]'")

SHARDED = "fsdp_config={state_dict_type: sharded}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    serving = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    serving.start()
    host, port = serving.get_host_and_port()
    yield f"http://{host}:{port}"
    serving.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, `runs`."""
    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**given, "S3_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    found = boto3.resource("s3", endpoint_url=server).Bucket("runs")
    if found.creation_date is not None:
        found.objects.delete()
    else:
        found.create()
    return found


@pytest.fixture
def run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Any) -> Callable[..., Path]:
    """Trains as a machine that has nothing of earlier starts on its disk; returns the run's local folder."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY_RUN.format(folder=shards, out="s3://runs/some"))
    monkeypatch.chdir(tmp_path)

    def start(batches: int, *words: str) -> Path:
        shutil.rmtree("runs", ignore_errors=True)
        words = ("run_name=run", "log_to_console=false", f"max_duration={batches}ba", *words)
        train(load_train_config(config, words)[0])
        return tmp_path / "runs" / "run"

    return start


def names(bucket: Any) -> set[str]:
    """Of the checkpoints' objects, below the run's folder."""
    found = {item.key.removeprefix("some/run/") for item in bucket.objects.all()}
    return {name for name in found if name.startswith("ep")}


def stored(bucket: Any, name: str) -> str:
    return bucket.Object(f"some/run/{name}").get()["Body"].read().decode()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["whole", pytest.param("sharded", marks=pytest.mark.soak)])
def test_a_run_goes_on_from_its_store_on_another_machine(
    run: Callable[..., Path], bucket: Any, kind: str
) -> None:
    words = [SHARDED] if kind == "sharded" else []
    whole = losses(run(9, "run_name=whole", *words).parent / "whole")
    bucket.objects.delete()
    folder = run(9, "save_num_checkpoints_to_keep=1", *words)
    entries = {name.split("/")[0] for name in names(bucket)}
    assert len(entries) == 3 and all(name.startswith("ep0-ba") for name in entries)
    last = next(entry for entry in entries if entry.startswith("ep0-ba9"))
    bucket.objects.filter(Prefix=f"some/run/{last}").delete()
    folder = run(9, *words)
    assert losses(folder) == whole
    assert stored(bucket, "metrics.jsonl") == (folder / "metrics.jsonl").read_text()
    assert stored(bucket, "report.md").startswith("# run")
    assert {name.split("/")[0] for name in names(bucket)} == entries
    assert not list(folder.glob(".fetched*"))


@pytest.mark.soak
def test_shards_without_their_outline_are_no_checkpoint(
    run: Callable[..., Path], bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(9, SHARDED)
    bucket.Object("some/run/ep0-ba9/.metadata").delete()
    assert len(losses(run(9, SHARDED))) == 9
    assert "/ep0-ba6\n" in capsys.readouterr().out


def test_a_damaged_object_is_named_and_the_one_before_is_taken_on_request(
    run: Callable[..., Path], bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(6)
    item = bucket.Object("some/run/ep0-ba6-rank0.pt")
    content = bytearray(item.get()["Body"].read())
    content[len(content) // 2] ^= 1
    item.put(Body=bytes(content))
    with pytest.raises(CheckpointError, match=r"s3://runs/some/run/ep0-ba6-rank0.pt: damaged.*resume_past"):
        run(6)
    assert len(losses(run(6, "resume_past_damage=true"))) == 6
    assert "/ep0-ba3-rank0.pt\n" in capsys.readouterr().out


def test_what_changed_is_known_on_another_machine_too(run: Callable[..., Path], bucket: Any) -> None:
    run(6)
    keys = {item.key for item in bucket.objects.all()}
    assert {"some/run/config.yaml", "some/run/tokenizer/tokenizer.json"} <= keys
    with pytest.raises(ConfigError, match=r"global_train_batch_size: 8 in the run of .*, 4 here"):
        run(6, "global_train_batch_size=4")


def test_a_load_path_may_be_a_run_in_a_store(run: Callable[..., Path]) -> None:
    first = losses(run(6))
    words = ["run_name=other", "load_path=s3://runs/some/run", "load_weights_only=true"]
    assert losses(run(3, *words).parent / "other")[0] < first[0] - 0.3


def test_a_store_that_is_not_there_is_one_error_before_training(run: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"s3://nowhere/run: can't be read"):
        run(3, "save_folder=s3://nowhere/run")


class Hiccups:
    """Has uploads of some names fail for the first times, as a store does that is asked too much."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pattern: str, times: int) -> None:
        from composer.utils import S3ObjectStore

        self.left, self.batches = times, 0
        upload = S3ObjectStore.upload_object

        def upload_object(store: Any, name: str, filename: str, **options: Any) -> None:
            if re.search(pattern, name) and self.left > 0:
                self.left -= 1
                raise ConnectionResetError(104, "Connection reset by peer")
            upload(store, name, filename, **options)

        monkeypatch.setattr(S3ObjectStore, "upload_object", upload_object)


def test_a_hiccup_of_the_store_ends_no_run_and_leaves_nothing_out(
    run: Callable[..., Path], bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Patience(seconds=30, first_pause=0.05, longest_pause=0.2)
    monkeypatch.setattr(lifecycle, "uploader_of", lambda config, _=None: uploader_of(config, short))
    hiccups = Hiccups(monkeypatch, r"metrics\.jsonl$|ep0-ba3|ep0-ba6", 6)
    folder = run(6)
    assert hiccups.left == 0 and len(losses(folder)) == 6
    assert {name.split("-")[1] for name in names(bucket)} == {"ba3", "ba6"}
    assert stored(bucket, "metrics.jsonl") == (folder / "metrics.jsonl").read_text()
    assert (
        "can't be uploaded, since 0 s (Connection reset by peer); tried again in 0 s"
        in capsys.readouterr().out
    )


def test_metrics_that_cannot_be_uploaded_are_said_and_come_later(
    run: Callable[..., Path], bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Hiccups(monkeypatch, r"metrics\.jsonl$", 3)
    folder = run(6)
    printed = capsys.readouterr().out
    assert (
        printed.count("metrics.jsonl: can't be uploaded (Connection reset by peer). The run continues") == 3
    )
    assert {name.split("-")[1] for name in names(bucket)} == {"ba3", "ba6"}
    assert stored(bucket, "metrics.jsonl") == (folder / "metrics.jsonl").read_text()


def test_a_store_that_cannot_be_written_refuses_the_start_and_leaves_no_folder(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from composer.utils import S3ObjectStore

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(S3ObjectStore, "upload_object", refuse)
    with pytest.raises(
        CheckpointError, match=r"s3://runs/some/run/config.yaml: can't be uploaded \(Access Denied"
    ):
        run(3)
    assert not (tmp_path / "runs").exists()


def test_an_export_that_cannot_be_uploaded_ends_the_run_with_its_name(run: Callable[..., Path]) -> None:
    exports = "callbacks={hf_checkpointer: {save_folder: 's3://nowhere/x', save_interval: 3ba}}"
    with pytest.raises(CheckpointError, match=r"s3://nowhere/x/huggingface/ba3/\S+: can't be uploaded"):
        run(3, exports)


@pytest.mark.soak
def test_the_best_checkpoint_is_known_on_a_machine_that_lost_its_disk(
    run: Callable[..., Path], bucket: Any, shards: Path
) -> None:
    words = [
        f"eval_loader={{name: text, label: held_out, dataset: {{local: {shards}/a, split: val}}}}",
        "keep_best={metric: metrics/held_out/LanguageCrossEntropy, mode: max}",
        *("eval_interval=2ba", "save_interval=2ba", "save_num_checkpoints_to_keep=1", "optimizer.lr=1e-2"),
    ]
    run(4, *words)
    record = json.loads(bucket.Object("some/run/best.json").get()["Body"].read())
    assert (record["batch"], record["checkpoint"]) == (2, "ep0-ba2-rank0.pt")
    folder = run(6, *words)
    assert json.loads((folder / "best.json").read_text()) == record
    assert json.loads(bucket.Object("some/run/best.json").get()["Body"].read()) == record
    assert bucket.Object("some/run/ep0-ba2-rank0.pt").content_length > 0
