"""A model on disk, opened but not loaded, with as many rows in its embedding as requested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mptfoundry.checkpoints.checksums import Verifier
from mptfoundry.checkpoints.weights import (
    EMBEDDING,
    POSITIONS,
    PROJECTION,
    Rows,
    TensorOutline,
    Weights,
    check_finite,
)
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import MPTConfig

_ROWS_ARE_TOKENS = (EMBEDDING, PROJECTION)


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, opened but not loaded.

    Attributes:
        path: The checkpoint's file or folder, or the exported folder.
        config: The architecture.
        weights: The tensors, by MPT's names.
        tokenizer_folder: The folder of its tokenizer, if it has one.
        run_folder: The run that it came from, if that is known and was one of ours.
        verifier: Compares the weights with their checksums when they are read.
    """

    path: Path
    config: MPTConfig
    weights: Weights
    tokenizer_folder: Path | None
    run_folder: Path | None
    verifier: Verifier = field(default_factory=Verifier)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's weights one by one, as copies, in `dtype` or as stored.

        Every tensor of the architecture comes exactly once, in the network's order. Nothing else is read.

        Raises:
            CheckpointError: A weight is not finite, or differs from the bytes that were written.
        """
        for name in expected_shapes(self.config):
            tensor = self.weights.read(name, dtype)
            check_finite(self.path, name, tensor)
            yield name, tensor


def expected_shapes(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all parameters of a network, in its order."""
    from mptfoundry.mpt.heads import make_network

    try:
        network = make_network(config, device="meta")
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"no network has the sizes of this config: {str(error).splitlines()[0]}"
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Describe the tensors that are missing, unknown or have another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not of this architecture" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            text = f"{name} has the shape {found[name]}, its config says {shape}"
            if name == POSITIONS:
                text += f" (learned positions can't be stretched: max_seq_len has to be {found[name][0]})"
            problems.append(text)
    return problems


def with_rows(source: ModelSource, vocab_size: int) -> ModelSource:
    """Return the model with `vocab_size` rows in its embedding, and in its output matrix if it has its own.

    Rows are added and removed at the end, where the tokenizer has no ids. A new row is the mean of the stored
    ones: its logit is then the mean of their logits, so that a new token is neither likely nor ruled out
    before it is trained (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    if vocab_size == source.config.vocab_size:
        return source
    config = replace(source.config, vocab_size=vocab_size)
    return replace(source, config=config, weights=_OtherRows(source.weights, vocab_size))


class _OtherRows:
    """Weights whose token matrices are padded or cut."""

    def __init__(self, stored: Weights, rows: int) -> None:
        self._stored = stored
        self._rows = rows
        self._means: dict[str, torch.Tensor] = {}

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        return {
            name: replace(outline, shape=(self._rows, *outline.shape[1:]))
            if name in _ROWS_ARE_TOKENS
            else outline
            for name, outline in self._stored.outlines.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read one tensor, or some of its rows."""
        if name not in _ROWS_ARE_TOKENS:
            return self._stored.read(name, dtype, rows)
        first, last = rows or (0, self._rows)
        stored = self._stored.outlines[name].shape[0]
        old = self._stored.read(name, dtype, (min(first, stored), min(last, stored)))
        if last <= stored:
            return old
        if name not in self._means:
            self._means[name] = self._stored.read(name).double().mean(0)
        new = self._means[name].to(old.dtype).expand(last - max(first, stored), -1)
        return torch.cat([old, new])
