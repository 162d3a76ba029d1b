"""A small model with dropout, data on disk, and a real trainer around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch import Tensor

from mptfoundry.evals.token_loss import token_loss_metrics
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.optim.clipping import GradientClipping
from mptfoundry.optim.lion import DecoupledLionW
from mptfoundry.optim.schedules import BatchSize, cosine_with_warmup

SEQ_LEN, VOCAB, SAMPLES, BATCH = 8, 32, 24, 4

CONFIG = MPTConfig(
    d_model=16,
    n_heads=2,
    n_layers=1,
    vocab_size=VOCAB,
    max_seq_len=SEQ_LEN,
    resid_pdrop=0.2,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    return {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "sample_id": torch.tensor([sample["number"] for sample in samples]),
    }


@pytest.fixture
def config() -> MPTConfig:
    """The network that `make_trainer` trains."""
    return CONFIG


@pytest.fixture(scope="session")
def stored_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAMPLES rows of SEQ_LEN random tokens as MDS."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    columns = {"tokens": f"ndarray:uint16:{SEQ_LEN}", "number": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number in range(SAMPLES):
            writer.write({"tokens": generator.integers(0, VOCAB, SEQ_LEN, dtype=np.uint16), "number": number})
    return folder


@pytest.fixture
def make_trainer(stored_rows: Path) -> Callable[..., Trainer]:
    """Builds a trainer of 6 batches of 4 rows of 8 tokens an epoch, all of ours around it."""

    def make(max_duration: str = "6ba", with_eval: bool = False, **options: Any) -> Trainer:
        torch.manual_seed(0)
        model = ComposerMPT(MPT(CONFIG, seed=1), eval_metrics=token_loss_metrics(np.ones(VOCAB, dtype=int)))
        return Trainer(
            model=model,
            train_dataloader=DataSpec(loader(stored_rows, shuffle=True)),
            eval_dataloader=[Evaluator(label="held_out", dataloader=loader(stored_rows))]
            if with_eval
            else None,
            optimizers=DecoupledLionW(model.parameters(), lr=1e-2),
            schedulers=cosine_with_warmup("2ba", batch=BatchSize(BATCH, BATCH * SEQ_LEN)),
            algorithms=[GradientClipping("norm", 1.0)],
            max_duration=max_duration,
            device="cpu",
            seed=7,
            progress_bar=False,
            log_to_console=False,
            **options,
        )

    return make


def loader(folder: Path, shuffle: bool = False) -> StreamingDataLoader:
    dataset = StreamingDataset(local=str(folder), shuffle=shuffle, batch_size=BATCH, num_canonical_nodes=1)
    return StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=collate)
