"""Models that are a base and adapters beside it: the checkpoint has the adapters, the base lies elsewhere.

The run's config says where. A fingerprint in the checkpoint tells the base from others: adapters beside other
weights would make another model without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mptfoundry.checkpoints.weights import EMBEDDING, Rows, TensorOutline, Weights, check_number_formats
from mptfoundry.config.learned import ADAPTER, LoRAConfig
from mptfoundry.errors import CheckpointError

if TYPE_CHECKING:
    from mptfoundry.checkpoints.reading import ModelSource

FINGERPRINT = "base_fingerprint"


@dataclass(frozen=True)
class AdaptedWeights:
    """The weights of a base with its adapters added, in float32, as the run computed with them.

    Attributes:
        base: The base.
        adapters: The checkpoint's tensors.
        lora: What the adapters are.
    """

    base: ModelSource
    adapters: Weights
    lora: LoRAConfig

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """The base's tensors, by name."""
        return {name: replace(o, dtype=torch.float32) for name, o in self.base.weights.outlines.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """One tensor, or some of its rows; a matrix with an adapter is `W + scaling * B @ A`."""
        tensor = self.base.weights.read(name, torch.float32, rows)
        module = name.removesuffix(".weight")
        down, up = (f"{module}.lora_{side}.default.weight" for side in "AB")
        if down in self.adapters.outlines:
            product = self.adapters.read(up, torch.float32, rows) @ self.adapters.read(down, torch.float32)
            tensor.add_(product, alpha=self.lora.scaling)
        return tensor.to(dtype or torch.float32)


def lora_of(run: Mapping[str, Any]) -> LoRAConfig | None:
    """The adapters of a run by its resolved config, as `read_run` gives it; None if it has none."""
    values: Any = run["model"].get("peft_config")
    if not isinstance(values, Mapping):
        return None
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return LoRAConfig(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the run's model.peft_config: {error}") from error


def with_adapters(
    base: ModelSource, adapters: Weights, lora: LoRAConfig, checkpoint: ModelSource
) -> ModelSource:
    """The model of a checkpoint of adapters, as one whose weights are the base's and theirs together.

    Raises:
        CheckpointError: The adapters were learned beside other weights, or don't fit these.
    """
    from mptfoundry.checkpoints.reading import shape_problems

    found = {name: o.shape for name, o in adapters.outlines.items() if ADAPTER in name}
    check_number_formats(checkpoint.path, adapters.outlines, found)
    if problems := shape_problems(found, lora.adapter_shapes(checkpoint.config)):
        raise CheckpointError(f"{checkpoint.path}: {'; '.join(problems[:5])}.")
    check_base(base, adapters.read(FINGERPRINT) if FINGERPRINT in adapters.outlines else None)
    return replace(checkpoint, weights=AdaptedWeights(base, adapters, lora))


def check_base(base: ModelSource, expected: torch.Tensor | None) -> None:
    """Raise CheckpointError unless `base` has the fingerprint that the adapters' checkpoint tells."""
    if expected is None or not torch.equal(expected.cpu(), fingerprint(base)):
        raise CheckpointError(
            f"{base.path}: is not the base that these adapters were learned beside: its weights are others. "
            "Put that base back, or name where it is now in the run's config.yaml."
        )


def fingerprint(source: ModelSource) -> torch.Tensor:
    """(32,) uint8, of the names and shapes of all weights, and of the first rows of some.

    Those of the embedding and of the last block: no training leaves them all as they are, and a hash of all
    that is stored would have every rank read all of it.
    """
    last = f"transformer.blocks.{source.config.n_layers - 1}."
    digest = hashlib.sha256()
    for name, outline in source.weights.outlines.items():
        digest.update(f"{name} {outline.shape}\n".encode())
    for name in sorted(source.weights.outlines):
        if name == EMBEDDING or name.startswith(last):
            row = source.weights.read(name, torch.float32, (0, 1))
            digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
