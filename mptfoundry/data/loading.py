"""What every data loader needs from the run, and the arguments of PyTorch's DataLoader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from mptfoundry.config.data import LabelledLoaderConfig, LoaderConfig
from mptfoundry.errors import DataError
from mptfoundry.mpt.config import MPTConfig


@dataclass(frozen=True)
class LoaderContext:
    """What a loader needs from the run.

    Attributes:
        model: The model config: vocabulary, head, and whether attention needs document ids.
        tokenizer: A transformers fast tokenizer.
        max_seq_len: Tokens per row.
        device_batch_size: Rows per batch on one device.
        seed: Seed for the order of samples.
        num_workers: Number of DataLoader workers; 0 loads in the training process.
        is_training: Whether epochs differ. An evaluation reads the first epoch's samples every time.
        where: The loader's key in the config, for errors.
        allow_code: Whether user functions may run.
        takes_other_rows: Whether to resume inside an epoch even if the checkpoint was saved with other rows.
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
        """Whether to shuffle samples."""
        chosen = loader.dataset.shuffle
        return self.is_training if chosen is None else chosen

    def drops_last(self, loader: LoaderConfig) -> bool:
        """Whether to drop a last batch that is not full."""
        return self.is_training if loader.drop_last is None else loader.drop_last


def loader_options(loader: LoaderConfig, context: LoaderContext) -> dict[str, Any]:
    """Return the arguments of PyTorch's DataLoader, which only accepts worker options if it has workers."""
    options: dict[str, Any] = {
        "batch_size": context.device_batch_size,
        "drop_last": context.drops_last(loader),
        "num_workers": context.num_workers,
        "pin_memory": torch.cuda.is_available(),
        # A separate generator, because creating an iterator must not advance the RNG state that dropout uses.
        "generator": torch.Generator().manual_seed(context.seed),
    }
    if not isinstance(loader, LabelledLoaderConfig):
        options["pin_memory"] &= loader.pin_memory
        if context.num_workers:
            names = ("prefetch_factor", "persistent_workers", "timeout")
            options |= {name: getattr(loader, name) for name in names}
    return options


def raise_plainly(error: DataError, workers: Any) -> NoReturn:
    """Stop a loader's workers now, not when they are garbage-collected; raise their error as plain text."""
    if workers is not None:
        workers._shutdown_workers()
    marker, text = f"{DataError.__module__}.{DataError.__qualname__}: ", str(error)
    if marker in text:
        raise DataError(text.rsplit(marker, 1)[1].strip()) from error
    raise error
