"""A run that stops at the end of an epoch, or anywhere else, reads on with what comes next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import ComposerModel, Trainer
from composer.core import Callback, Evaluator, State
from streaming import MDSWriter

from mptfoundry.errors import DataError
from mptfoundry.run.atomic_checkpoints import AtomicCheckpoints
from mptfoundry.run.resume import Resume
from tests.loaders import labelled_loader, text_loader
from tests.marks import some_of

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a stop at an epoch's end, or inside it, with each kind of stream",
        "more than 20, 0 to 2 workers, older checkpoints",
        "reads the samples of an uninterrupted run",
    ),
]

BATCH, ROWS = 4, {"a": 24, "b": 12}


class Nothing(ComposerModel):
    """Has a loss and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: Any) -> torch.Tensor:
        return self.weight.sum() * batch["input_ids"].float().mean()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs

    def eval_forward(self, batch: Any, outputs: Any = None) -> torch.Tensor:
        return self.forward(batch)


class Seen(Callback):
    """The samples of each batch, in training and in evaluation."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.evaluated: list[tuple[int, str | None, list[list[int]]]] = []

    def batch_start(self, state: State, logger: object) -> None:
        self.batches.append(state.batch["input_ids"].tolist())

    def eval_batch_start(self, state: State, logger: object) -> None:
        place = (int(state.timestamp.batch), state.dataloader_label)
        self.evaluated.append((*place, state.batch["input_ids"].tolist()))


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streams `a` and `b`, of 24 and 12 samples."""
    folder = tmp_path_factory.mktemp("streams")
    for name, rows in ROWS.items():
        with MDSWriter(
            out=str(folder / name), columns={"tokens": "ndarray:uint16:8"}, hashes=["xxh64"]
        ) as out:
            for row in range(rows):
                out.write({"tokens": np.full(8, row + 100 * (name == "b"), np.uint16)})
    return folder


def loader(folder: Path, tokenizer: Any, is_training: bool = True, **options: Any) -> Any:
    where = {"local": str(folder / "a")}
    if "amounts" in options:
        by, amounts = options.pop("amounts")
        where = {
            "streams": {
                name: {"local": str(folder / name), by: amount}
                for name, amount in zip(ROWS, amounts, strict=True)
            }
        }
    return text_loader(
        **where,
        tokenizer=tokenizer,
        max_seq_len=8,
        vocab_size=384,
        device_batch_size=BATCH,
        shuffle=True,
        is_training=is_training,
        **{"num_canonical_nodes": 2, **options},
    )


def labelled(folder: Path, tokenizer: Any, is_training: bool = True, **options: Any) -> Any:
    """24 texts of as many tokens, each with a label."""
    records = [json.dumps({"text": f"{chr(97 + number)} is", "label": number % 2}) for number in range(24)]
    (folder / "records.jsonl").write_text("\n".join(records))
    return labelled_loader(
        local=str(folder / "records.jsonl"),
        tokenizer=tokenizer,
        max_seq_len=8,
        shuffle=True,
        is_training=is_training,
        **{"device_batch_size": BATCH, **options},
    )


def run(
    spec: Any,
    folder: Path | None = None,
    start: Path | None = None,
    *,
    duration: str = "3ep",
    save_interval: str = "1ep",
    **options: Any,
) -> Seen:
    seen, model = Seen(), Nothing()
    callbacks: list[Callback] = [seen]
    if start is not None:
        subset = options.get("train_subset_num_batches", -1)
        callbacks.append(Resume(start, subset_num_batches=subset))
    if folder is not None:
        callbacks.append(AtomicCheckpoints(folder, save_interval=save_interval, in_background=False))
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=duration,
        device="cpu",
        seed=7,
        callbacks=callbacks,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return seen


def as_older_versions_wrote(checkpoint: Path) -> Path:
    """StreamingDataset's own word: at the end of an epoch, the epoch that is over."""
    content = torch.load(checkpoint, weights_only=False)
    train = content["state"]["dataset_state"]["train"]
    if train and train["sample_in_epoch"] == 0:
        train["epoch"] = content["state"]["timestamp"]["Timestamp"]["epoch"] - 1
    older = checkpoint.with_name(f"older-{checkpoint.name}")
    torch.save(content, older)
    return older


def checkpoints(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("ep*.pt"))


def batch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-ba")[1].split("-")[0])


KINDS: dict[str, dict[str, Any]] = {
    "one stream": {},
    "two workers": {"num_workers": 2},
    "workers of each epoch": {"num_workers": 1, "persistent_workers": False},
    "epoch_size": {"epoch_size": 16},
    "choose": {"amounts": ("choose", [10, 6])},
    "repeat": {"amounts": ("repeat", [0.5, 1.5])},
    "proportion": {"amounts": ("proportion", [0.25, 0.75])},
    "labelled": {"kind": labelled},
}


@pytest.mark.parametrize("kind", some_of(KINDS, lambda number: number not in (2, 5, 6)))
def test_from_the_end_of_an_epoch_the_next_one_is_read(
    kind: str, streams: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    options = {**KINDS[kind]}
    make = options.pop("kind", loader)
    whole = run(make(streams, tiny_tokenizer, **options), tmp_path)
    epochs = np.array_split(np.array(whole.batches), 3)
    assert len({str(epoch) for epoch in epochs}) == 3
    for checkpoint in checkpoints(tmp_path)[:2]:
        state = torch.load(checkpoint, weights_only=False)["state"]
        time = state["timestamp"]["Timestamp"]
        if make == loader:
            assert (state["dataset_state"]["train"]["epoch"], time["sample_in_epoch"]) == (time["epoch"], 0)
        for start in (checkpoint, as_older_versions_wrote(checkpoint)):
            again = run(make(streams, tiny_tokenizer, **options), start=start)
            assert again.batches == whole.batches[batch_of(checkpoint) :], start


def test_a_run_of_many_starts_reads_what_one_in_one_go_reads(
    streams: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    options: dict[str, Any] = {"epoch_size": 16}
    whole = run(loader(streams, tiny_tokenizer, **options), duration="4ep")
    read: list[list[int]] = []
    start = None
    for epoch in range(1, 5):
        read += run(
            loader(streams, tiny_tokenizer, **options), tmp_path, start, duration=f"{epoch}ep"
        ).batches
        start = tmp_path / f"ep{epoch}-ba{4 * epoch}-rank0.pt"
    assert read == whole.batches


def test_on_other_nodes_every_epoch_has_the_order_of_those_that_the_run_began_on(
    streams: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """By default the order belongs to the number of nodes, which a checkpoint keeps."""
    workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": False}
    whole = run(loader(streams, tiny_tokenizer, **workers), tmp_path)
    start = tmp_path / "ep1-ba6-rank0.pt"
    again = run(loader(streams, tiny_tokenizer, num_canonical_nodes=None, **workers), start=start)
    assert again.batches == whole.batches[6:]


@pytest.mark.parametrize(
    ("kind", "workers", "subset", "places"),
    some_of(
        [
            (loader, 0, -1, (5, 6, 7)),
            (loader, 2, -1, (6, 11)),
            (loader, 2, 3, (3, 5)),
            (loader, 0, 3, (2, 3, 4)),
            (labelled, 0, -1, (5, 6, 7)),
            (labelled, 1, 3, (2, 3)),
        ]
    ),
)
def test_from_any_batch_the_rest_is_read(
    kind: Any,
    workers: int,
    subset: int,
    places: tuple[int, ...],
    streams: Path,
    tmp_path: Path,
    tiny_tokenizer: Any,
) -> None:
    """Also from the last batch of an epoch, which Composer ends later, and where epochs are cut short."""
    options: dict[str, Any] = {"duration": "2ep", "train_subset_num_batches": subset}
    whole = run(kind(streams, tiny_tokenizer, num_workers=workers), tmp_path, save_interval="1ba", **options)
    assert len(whole.batches) == (12 if subset < 0 else 6)
    for place in places:
        (checkpoint,) = tmp_path.glob(f"ep*-ba{place}-rank0.pt")
        again = run(kind(streams, tiny_tokenizer, num_workers=workers), start=checkpoint, **options)
        assert again.batches == whole.batches[place:], checkpoint


def test_labelled_examples_go_on_in_the_next_epoch_and_with_another_batch_size(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    whole = run(labelled(tmp_path, tiny_tokenizer), tmp_path, save_interval="2ba", spin_dataloaders=False)
    rows = list(chain(*whole.batches))
    assert rows[:24] != rows[24:48] and sorted(rows[:24]) == sorted(rows[24:48])
    for name, seen in (("ep0-ba6", 24), ("ep1-ba8", 32)):
        for size in (4, 8):
            spec = labelled(tmp_path, tiny_tokenizer, device_batch_size=size)
            start = tmp_path / f"{name}-rank0.pt"
            assert list(chain(*run(spec, start=start, spin_dataloaders=False).batches)) == rows[seen:]


def test_data_of_another_kind_of_loader_is_named(streams: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    run(labelled(tmp_path, tiny_tokenizer), tmp_path, duration="1ep")
    with pytest.raises(DataError, match=r"train_loader.dataset: another kind of loader saved"):
        run(loader(streams, tiny_tokenizer), start=tmp_path / "ep1-ba6-rank0.pt")


def test_a_run_that_an_older_version_continued_is_told_and_in_step_from_the_next_epoch_on(
    streams: Path, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(loader(streams, tiny_tokenizer), tmp_path, save_interval="2ba")
    checkpoint = tmp_path / "ep1-ba8-rank0.pt"
    content = torch.load(checkpoint, weights_only=False)
    content["state"]["dataset_state"]["train"]["epoch"] = 0
    torch.save(content, checkpoint)
    again = run(loader(streams, tiny_tokenizer), start=checkpoint)
    assert again.batches == whole.batches[2:6] + whole.batches[12:]
    assert "epoch 2 reads the samples of epoch 1 again" in capsys.readouterr().out


def test_every_evaluation_reads_the_same_samples_whenever_the_run_was_stopped(
    streams: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def evaluators() -> list[Evaluator]:
        mixed = {"amounts": ("choose", [6, 2])}
        specs = {
            "one": loader(streams, tiny_tokenizer, is_training=False),
            "mix": loader(streams, tiny_tokenizer, is_training=False, drop_last=False, **mixed),
            "labels": labelled(tmp_path, tiny_tokenizer, is_training=False),
        }
        return [Evaluator(label=label, dataloader=spec, metric_names=[]) for label, spec in specs.items()]

    options: dict[str, Any] = {"eval_interval": "1ep", "eval_subset_num_batches": 2}
    whole = run(loader(streams, tiny_tokenizer), tmp_path, eval_dataloader=evaluators(), **options)
    assert len(whole.evaluated) == 18
    assert len({str(each[1:]) for each in whole.evaluated}) == 6
    start = tmp_path / "ep1-ba6-rank0.pt"
    again = run(loader(streams, tiny_tokenizer), start=start, eval_dataloader=evaluators(), **options)
    assert again.evaluated == whole.evaluated[6:]
