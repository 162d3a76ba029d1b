"""The initial weights of a network: read from a model on disk, or newly initialized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.utils import dist
from torch import nn
from tqdm import tqdm

from mptfoundry.checkpoints.source import ModelSource, shape_problems
from mptfoundry.checkpoints.weights import PROJECTION, Rows
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.init import draw
from mptfoundry.ranks import rank, world_size


class StartingWeights:
    """Returns the initial value of each parameter of a network, whole or some rows of it, one at a time.

    Every rank has its own instance and reads what it holds from disk when it is needed. Several ranks first
    compare all weights with their checksums, each rank a share.

    Args:
        source: The model to start from; None: all weights are newly initialized.
        network: Its parameters may be on the meta device.
        seed: Seed of the random weights.
        new: Prefixes of parameters that `source` may lack, such as `score.`; those that it lacks are
            newly initialized. It must have all others.
        unused: Prefixes of further weights that `source` may have, such as `lm_head.`.
        progress: Show a progress bar in bytes.

    Attributes:
        drawn: Names of the parameters that are newly initialized although there is a source.

    Raises:
        CheckpointError: A parameter is missing, unknown or has another shape, or weights are damaged.
    """

    def __init__(
        self,
        source: ModelSource | None,
        network: nn.Module,
        *,
        seed: int,
        new: Sequence[str] = (),
        unused: Sequence[str] = (),
        progress: bool = False,
    ) -> None:
        self._source = source
        self._config: Any = network.config
        self._seed = seed
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        found = {} if source is None else {n: o.shape for n, o in source.weights.outlines.items()}
        self.drawn = [name for name in shapes if name not in found and name.startswith(tuple(new))]
        if source is not None:
            not_needed = (*unused, PROJECTION) if source.config.tie_word_embeddings else tuple(unused)
            to_read = {name: shape for name, shape in shapes.items() if name not in self.drawn}
            stored = {n: s for n, s in found.items() if n in to_read or not n.startswith(not_needed)}
            if problems := shape_problems(stored, to_read):
                raise CheckpointError(f"{source.path}: {'; '.join(problems[:5])}.")
            _verify_together(source)
        self._bar = tqdm(unit="B", unit_scale=True, desc="weights", disable=not (progress and source))

    def __call__(self, name: str, shape: tuple[int, ...], rows: Rows = None) -> torch.Tensor:
        """Return the parameter `name` of full `shape`, or some rows of it: on the CPU, in any dtype."""
        if self._source is None or name in self.drawn:
            return draw(name, shape, self._config, self._seed, rows)
        tensor = self._source.weights.read(name, rows=rows)
        self._bar.update(tensor.numel() * tensor.element_size())
        return tensor

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Set all parameters of a network that has storage."""
        if self._source is not None:
            outlines = self._source.weights.outlines
            stored = [outlines[n] for n, _ in network.named_parameters() if n not in self.drawn]
            self._bar.total = sum(outline.numel * outline.dtype.itemsize for outline in stored)
        for name, parameter in network.named_parameters():
            parameter.copy_(self(name, tuple(parameter.shape)))
        self._bar.close()


def _verify_together(source: ModelSource) -> None:
    """Verify the weights by reading them, each rank a share, so that no rank has to read all."""
    if world_size() == 1 or not source.verifier.is_on:
        return
    reason = None
    try:
        for name in list(source.weights.outlines)[rank() :: world_size()]:
            source.weights.read(name)
    except CheckpointError as error:
        reason = str(error)
    for found in dist.all_gather_object(reason):
        if found is not None:
            raise CheckpointError(found)
    source.verifier.is_on = False
