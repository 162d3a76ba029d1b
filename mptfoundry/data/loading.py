"""What every loader shares with its run, and the arguments of PyTorch's DataLoader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mptfoundry.config.data import LabelledLoaderConfig, LoaderConfig
from mptfoundry.mpt.config import MPTConfig


@dataclass(frozen=True)
class LoaderContext:
    """What a loader shares with its run.

    Attributes:
        model: The network's config: its vocabulary, its head, and whether attention needs document ids.
        tokenizer: transformers' fast tokenizer.
        max_seq_len: Tokens in a row.
        device_batch_size: Rows in a batch of one device.
        seed: The order of samples depends on it.
        num_workers: Processes that make batches; 0 makes them in the training process.
        is_training: Epochs differ. An evaluation always reads the samples of the first epoch, in their order.
        where: The loader's key in the config, for errors.
        allow_code: Whether the user's own functions may run.
        takes_other_rows: Resume inside an epoch although the checkpoint was saved with other rows.
    """

    model: MPTConfig
    tokenizer: Any
    max_seq_len: int
    device_batch_size: int
    seed: int
    num_workers: int
    is_training: bool
    where: str
    allow_code: bool = False
    takes_other_rows: bool = False

    def shuffles(self, loader: LoaderConfig) -> bool:
        """Whether the order of samples is random."""
        chosen = loader.dataset.shuffle
        return self.is_training if chosen is None else chosen

    def drops_last(self, loader: LoaderConfig) -> bool:
        """Whether a last batch that is not full is left out."""
        return self.is_training if loader.drop_last is None else loader.drop_last


def loader_options(loader: LoaderConfig, context: LoaderContext) -> dict[str, Any]:
    """Arguments of PyTorch's DataLoader; it takes those of workers only where there are some."""
    options: dict[str, Any] = {
        "batch_size": context.device_batch_size,
        "drop_last": context.drops_last(loader),
        "num_workers": context.num_workers,
        "pin_memory": torch.cuda.is_available(),
        # Its own generator: making an iterator must not advance the random state that dropout uses.
        "generator": torch.Generator().manual_seed(context.seed),
    }
    if not isinstance(loader, LabelledLoaderConfig):
        options["pin_memory"] &= loader.pin_memory
        if context.num_workers:
            names = ("prefetch_factor", "persistent_workers", "timeout")
            options |= {name: getattr(loader, name) for name in names}
    return options
