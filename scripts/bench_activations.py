"""Measure what recomputing and offloading activations saves and costs on a CPU: bytes that forward saves for
backward, besides the weights, and step time relative to saving everything.

    python scripts/bench_activations.py [steps=5]

The model has 8 layers, width 256, 4 heads; a batch is 2 rows of 1,024 tokens. Times are medians of
interleaved steps.
"""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mptfoundry.config.parallel import recomputed_parts
from mptfoundry.models import activation_checkpointing
from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

CONFIG = MPTConfig(
    d_model=256,
    n_heads=4,
    n_layers=8,
    max_seq_len=1024,
    vocab_size=1024,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)
# What is checkpointed, and whether that is offloaded.
CASES: dict[str, tuple[Any, bool] | None] = {
    "everything kept": None,
    "norm": ("norm", False),
    "act_fn": ("act_fn", False),
    "norm and act_fn": (("norm", "act_fn"), False),
    "attention": ("attention", False),
    "mlp": ("mlp", False),
    "attention and mlp": (("attention", "mlp"), False),
    "block: every-2": ({"block": "every-2"}, False),
    "block": ("block", False),
    "block, offloaded": ("block", True),
}


def main(words: list[str]) -> None:
    steps = int(dict(word.split("=", 1) for word in words).get("steps", "5"))
    ids = torch.randint(1024, (2, 1024), generator=torch.Generator().manual_seed(0))
    models, kept = {}, {}
    for name, case in CASES.items():
        models[name] = MPT(CONFIG, seed=0).train()
        if case is not None:
            parts = recomputed_parts(case[0], CONFIG.n_layers)
            checkpoint_activations(models[name], parts, offload=case[1])
        kept[name] = bytes_kept(models[name], ids)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(steps):
        for name, model in models.items():
            started_at = time.perf_counter()
            model(ids, labels=ids).loss.backward()
            seconds[name].append(time.perf_counter() - started_at)
            model.zero_grad()
    usual = statistics.median(seconds["everything kept"])
    for name in models:
        ratio = statistics.median(seconds[name]) / usual
        print(f"{name:20} {kept[name] / 2**20:7.1f} MiB  {ratio:5.2f} times the step")


def bytes_kept(model: MPT, ids: torch.Tensor) -> int:
    """Bytes of the tensors that forward makes and that are alive after it, without the offloaded ones."""
    made = Made()
    with made, patch.object(activation_checkpointing, "save_on_cpu", OnHost):
        loss = model(ids, labels=ids).loss
    for parameter in model.parameters():
        made.storages.pop(parameter.untyped_storage(), None)
    kept = sum(made.storages.values())
    del loss
    return kept


class OnHost(saved_tensors_hooks):
    """Offloads to arrays of NumPy: on a CPU, PyTorch's own hooks leave tensors where they are."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(lambda tensor: tensor.detach().numpy().copy(), torch.from_numpy)


class Made(TorchDispatchMode):
    """Collects the storages that operators return, with their bytes, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.storages[leaf.untyped_storage()] = leaf.untyped_storage().nbytes()
        return out


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
