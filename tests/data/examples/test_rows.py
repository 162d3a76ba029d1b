"""Rows of examples in a real trainer: which come when, on one rank and on two, and what is trained."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Evaluator, Trainer
from composer.core import State
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch.distributed.tensor import DTensor

from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.data.examples.store import ExampleStore, write_examples
from mptfoundry.errors import DataError
from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.gloo_average import average_gradients
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.run.metrics_file import MetricsFile, read_rows
from mptfoundry.run.resume import Resume
from tests.loaders import row_loader
from tests.mpt.reference import assert_as_exact
from tests.ranks import run_on_ranks

CONFIG = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    vocab_size=64,
    max_seq_len=64,
    no_bias=True,
    resid_pdrop=0.1,
    attn_config=AttnConfig(alibi=True),
)
EXAMPLES = 41
Gradients = dict[str, torch.Tensor]


def write_store(folder: Path, seed: int = 0, count: int = EXAMPLES) -> ExampleStore:
    """Examples of 2 to 40 tokens, about half of them trained, the first and the last among these."""
    draw = np.random.default_rng(seed)
    with write_examples(folder, vocab_size=CONFIG.vocab_size) as writer:
        for tokens in draw.integers(2, 41, count):
            trained = draw.random(tokens) < 0.5
            trained[[0, -1]] = True
            writer.add(draw.integers(0, CONFIG.vocab_size, tokens), trained)
    return ExampleStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    return write_store(tmp_path_factory.mktemp("examples") / "store")


def loader(stores: list[ExampleStore], batch: int = 4, **options: Any) -> Any:
    """Global batches of `batch` packed rows."""
    defaults = {"device_batch_size": batch // dist.get_world_size(), "shuffle": True, "seed": 5}
    return row_loader(stores, **{**defaults, "drop_last": False, **options})


class Seen(Callback):
    """The rows of each global batch, the loss, and the gradients of the last one."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.losses: list[float] = []
        self.gradients: Gradients = {}

    def batch_start(self, state: State, logger: object) -> None:
        here = [number for number in state.batch["sample_id"].tolist() if number >= 0]
        self.rows.append(sorted(chain(*dist.all_gather_object(here))))

    def after_train_batch(self, state: State, logger: object) -> None:
        for name, parameter in state.model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
            self.gradients[name.removeprefix("module.")] = whole

    def batch_end(self, state: State, logger: object) -> None:
        self.losses.append(state.total_loss_dict["loss/train/total"])


def train(
    spec: Any, max_duration: str, *, dropout: float = 0.1, load_path: str | None = None, **options: Any
) -> tuple[Seen, Trainer]:
    config = MPTConfig(**{**vars(CONFIG), "resid_pdrop": dropout})
    model = ComposerMPT(MPT(config, seed=1), eval_metrics=token_loss_metrics())
    seen = Seen()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.Adam(model.parameters(), lr=1e-2),
        max_duration=max_duration,
        device="cpu",
        seed=7,
        accumulate_train_batch_on_tokens=True,
        callbacks=[
            seen,
            Throughput(CONFIG),
            *([Resume(Path(load_path))] if load_path else []),
        ],
        progress_bar=False,
        **options,
    )
    average_gradients(trainer.state.model)
    trainer.fit()
    trainer.close()
    return seen, trainer


def exact_gradients(store: ExampleStore, dtype: torch.dtype) -> Gradients:
    """Of the mean loss over all trained tokens, example by example, each alone."""
    network = MPT(CONFIG, seed=1).to(dtype).eval()
    for ids, trained in store:
        labels = np.where(trained, ids, -100)[None]
        share = int((labels[:, 1:] != -100).sum()) / int(store.trained.sum())
        loss = network(torch.from_numpy(ids[None]), labels=torch.from_numpy(labels)).loss
        (loss * share).backward()
    return {f"model.{name}": parameter.grad for name, parameter in network.named_parameters()}  # type: ignore[misc]


def flat(gradients: Gradients) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


# Tokens of a row, packing ratio, rows of a microbatch. All examples are in one batch; in a row of 1024 tokens
# they all fit, so that of two ranks one has nothing to learn.
WAYS: dict[str, tuple[int, Any, int]] = {
    "packed": (64, "auto", 2),
    "packed less densely": (64, 2, 3),
    "in one row": (1024, "auto", 1),
    "padded": (64, None, 64),
    "one by one": (64, None, 1),
}


def gradients_of(store: ExampleStore, way: str, **options: Any) -> Gradients:
    row_len, ratio, microbatch = WAYS[way]
    rows = len(loader([store], max_seq_len=row_len, packing_ratio=ratio).dataloader.dataset)
    assert (rows == 1) == (way == "in one row")
    # One row more than there are, for two ranks to have as many.
    spec = loader([store], rows + rows % 2, max_seq_len=row_len, packing_ratio=ratio)
    options = {"device_train_microbatch_size": microbatch, **options}
    return train(spec, "1ba", dropout=0.0, **options)[0].gradients


@pytest.mark.parametrize("way", WAYS)
def test_gradients_do_not_depend_on_how_examples_are_packed(store: ExampleStore, way: str) -> None:
    plain, truth = (flat(exact_gradients(store, dtype)) for dtype in (torch.float32, torch.float64))
    assert_as_exact([flat(gradients_of(store, way))], [plain], [truth])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", ["3ba", "1ep"])
def test_a_resumed_run_goes_on_with_the_same_rows_and_the_same_numbers(
    store: ExampleStore, tmp_path: Path, stop: str, workers: int
) -> None:
    options: dict[str, Any] = {"device_train_microbatch_size": 2}
    saves = {"save_interval": stop, "save_folder": str(tmp_path)}
    whole, _ = train(loader([store], num_workers=workers), "10ba", **options, **saves)
    begun = 3 if stop == "3ba" else 4
    assert sorted(chain(*whole.rows[:4])) == list(range(14))
    checkpoint = tmp_path / f"ep{0 if stop == '3ba' else 1}-ba{begun}-rank0.pt"
    again, trainer = train(loader([store], num_workers=workers), "10ba", load_path=str(checkpoint), **options)
    assert (again.rows, again.losses) == (whole.rows[begun:], whole.losses[begun:])
    assert trainer.state.timestamp.epoch == 2


def test_the_share_of_padding_is_logged_for_each_batch(store: ExampleStore, tmp_path: Path) -> None:
    spec = loader([store], packing_ratio=None, allow_pad_trimming=True, shuffle=False)
    train(spec, "2ba", loggers=[MetricsFile(tmp_path)])
    lengths = store.lengths[:8].reshape(2, 4)
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert [row["tokens"] for row in rows] == lengths.sum(1).cumsum().tolist()
    for row, tokens in zip(rows, lengths, strict=True):
        width = -(-tokens.max() // 8) * 8
        assert row["padding_share"] == pytest.approx(1 - tokens.sum() / (4 * width))
        assert row["packing_efficiency"] == pytest.approx(tokens.sum() / (4 * 64))


def test_a_checkpoint_inside_an_epoch_of_other_rows_is_refused(store: ExampleStore) -> None:
    state = loader([store]).dataloader.dataset.state_dict(8, True)
    for other in ({"seed": 6}, {"packing_ratio": 2}, {"max_seq_len": 65}, {"passes": [2.0]}):
        dataset = loader([store], **other).dataloader.dataset
        with pytest.raises(
            DataError, match=r"train_loader: the checkpoint was saved inside an epoch of other"
        ):
            dataset.load_state_dict(state)
        dataset.load_state_dict({**state, "row": 0})
    for other_kind in (None, {"epoch": 0, "sample_in_epoch": 0}):
        with pytest.raises(DataError, match="load_weights_only: true"):
            loader([store]).dataloader.dataset.load_state_dict(other_kind)


def test_where_other_rows_are_allowed_a_run_continues_behind_as_many(store: ExampleStore) -> None:
    state = loader([store]).dataloader.dataset.state_dict(8, True)
    for options, left in (({"seed": 6}, 6), ({"packing_ratio": 2}, 13), ({"packing_ratio": 9}, 6)):
        spec = loader([store], takes_other_rows=True, **options)
        spec.dataloader.dataset.load_state_dict(state)
        assert sum(len(batch["input_ids"]) for batch in spec.dataloader) == left
    few = loader([store], takes_other_rows=True, passes=[0.5])
    few.dataloader.dataset.load_state_dict(state)
    assert list(few.dataloader) == []


def test_it_is_said_how_examples_are_packed(store: ExampleStore, capsys: pytest.CaptureFixture[str]) -> None:
    loader([store])
    loader([store], packing_ratio=9, where="eval_loader held_out")
    assert capsys.readouterr().out.splitlines() == [
        "train_loader: 41 examples in 14 rows of 64 tokens: 2.9 per row; 6.0% is padding.",
        "eval_loader held_out: 41 examples in 14 rows of 64 tokens: 2.9 per row (9 do not fit); "
        "6.0% is padding.",
    ]


def test_streams_are_mixed_by_their_passes(store: ExampleStore, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", seed=1, count=10)
    spec = loader([store, other], passes=[0.5, 3.0], packing_ratio=None, batch=1)
    for epoch in range(2):
        spec.dataloader.sampler.set_epoch(epoch)
        batches = list(spec.dataloader)
        from_other = [batch for batch in batches if batch["sample_id"].item() >= EXAMPLES]
        assert (len(batches) - len(from_other), len(from_other)) == (round(EXAMPLES / 2), 30)
        for batch in from_other:
            ids, _ = other[batch["sample_id"].item() - EXAMPLES]
            assert batch["input_ids"][0, : len(ids)].tolist() == ids.tolist()


def test_evaluations_are_alike_and_count_each_row_once(store: ExampleStore) -> None:
    spec = loader([store], is_training=False)
    evaluations = []
    for epoch in (0, 3):
        spec.dataloader.sampler.set_epoch(epoch)
        evaluations.append([number for batch in spec.dataloader for number in batch["sample_id"].tolist()])
    assert evaluations[0] == evaluations[1]
    assert sorted(evaluations[0]) == list(range(14))


def test_what_cannot_be_read_is_refused(store: ExampleStore, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has an example of 39 tokens; max_seq_len is 32. Set max_seq_len: 39"
    ):
        loader([store], max_seq_len=32)
    with pytest.raises(DataError, match=r"14 rows can't fill one batch of 15 on each of 1 devices"):
        loader([store], batch=15, drop_last=True)
    with write_examples(tmp_path / "store", vocab_size=9) as writer:
        for last in (True, False):
            writer.add(np.array([1, 2]), np.array([True, last]))
    with pytest.raises(DataError, match=r"example 1 of .* has no token in the loss"):
        loader([ExampleStore(tmp_path / "store")])


def on_two_ranks(folder: Path) -> None:
    """What `test_two_ranks_...` compares, into `folder`."""
    store = ExampleStore(folder / "store")
    found: dict[str, Any] = {"gradients": {}}
    for kind, parallelism in {"copied": None, "sharded": {"fsdp": FSDP2Config()}}.items():
        for way in ("packed", "in one row", "padded")[: 3 if parallelism is None else 2]:
            gradients = gradients_of(store, way, parallelism_config=parallelism)
            found["gradients"][f"{way}, {kind}"] = flat(gradients)
    held_out = Evaluator(label="held_out", dataloader=loader([store], 6, is_training=False))
    checkpoint = str(folder / "ep0-ba3-rank0.pt")
    options: dict[str, Any] = {"load_path": checkpoint, "eval_dataloader": held_out, "eval_interval": "10ba"}
    seen, trainer = train(loader([store]), "10ba", **options)
    found["rows"] = seen.rows
    metrics = trainer.state.eval_metrics["held_out"]
    found["evaluation"] = {name: float(metric.compute()) for name, metric in metrics.items()}
    if dist.get_global_rank() == 0:
        torch.save(found, folder / "two.pt")
    dist.barrier()


def test_two_ranks_learn_and_evaluate_as_one_and_go_on_with_its_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    whole, _ = train(loader([store]), "10ba", save_interval="3ba", save_folder=str(tmp_path))
    done = run_on_ranks(__file__, tmp_path)
    assert done.returncode == 0, done.stdout
    found = torch.load(tmp_path / "two.pt")
    assert found["rows"] == whole.rows[3:]
    assert found["evaluation"]["tokens"] == store.trained.sum()
    plain, truth = (flat(exact_gradients(store, dtype)) for dtype in (torch.float32, torch.float64))
    assert len(found["gradients"]) == 5
    assert_as_exact([*found["gradients"].values()], [plain] * 5, [truth] * 5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.initialize_dist("cpu")
    on_two_ranks(Path(sys.argv[1]))
