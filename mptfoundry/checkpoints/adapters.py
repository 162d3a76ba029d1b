"""Models that consist of a base and adapters: the checkpoint holds the adapters, the base is elsewhere.

The run's config says where. The checkpoint holds a fingerprint of the base, because adapters on other weights
would silently make a different model. An adapter in peft's format has its own folder, with
`adapter_config.json` and `adapter_model.safetensors`; the reader has to name its base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mptfoundry.architecture.trainable import ADAPTER, LoRAConfig
from mptfoundry.checkpoints.checksums import Verifier
from mptfoundry.checkpoints.hf_folder import SafetensorsFile
from mptfoundry.checkpoints.source import ModelSource, shape_problems
from mptfoundry.checkpoints.weights import EMBEDDING, Rows, TensorOutline, Weights, check_number_formats
from mptfoundry.errors import CheckpointError
from mptfoundry.files import confined, read_json

FINGERPRINT = "base_fingerprint"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# peft wraps transformers' model as `base_model.model`.
_PEFT_PREFIX = "base_model.model."
# Keys of peft's config that don't change what an adapter computes.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
    *("auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
}
_HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


@dataclass(frozen=True)
class AdaptedWeights:
    """The weights of a base with its adapters added, in float32, as the run computed with them.

    Attributes:
        base: The base model.
        adapters: The checkpoint's tensors.
        lora: The configuration of the adapters.
    """

    base: ModelSource
    adapters: Weights
    lora: LoRAConfig

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """The base's tensors, by name."""
        return {name: replace(o, dtype=torch.float32) for name, o in self.base.weights.outlines.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """Read one tensor, or some of its rows; a matrix with an adapter is `W + scaling * B @ A`."""
        tensor = self.base.weights.read(name, torch.float32, rows)
        module = name.removesuffix(".weight")
        down, up = (f"{module}.lora_{side}.default.weight" for side in "AB")
        if down in self.adapters.outlines:
            product = self.adapters.read(up, torch.float32, rows) @ self.adapters.read(down, torch.float32)
            tensor.add_(product, alpha=self.lora.scaling)
        return tensor.to(dtype or torch.float32)


def lora_of(run: Mapping[str, Any]) -> LoRAConfig | None:
    """Return the adapters in a run's resolved config, as `read_run` returns it; None if it has none."""
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
    """Combine the base and the adapters of a checkpoint into one model.

    Raises:
        CheckpointError: The adapters were trained on other weights, or don't fit these.
    """
    found = {name: o.shape for name, o in adapters.outlines.items() if ADAPTER in name}
    check_number_formats(checkpoint.path, adapters.outlines, found)
    if problems := shape_problems(found, lora.adapter_shapes(checkpoint.config)):
        raise CheckpointError(f"{checkpoint.path}: {'; '.join(problems[:5])}.")
    check_base(base, adapters.read(FINGERPRINT) if FINGERPRINT in adapters.outlines else None)
    return replace(checkpoint, weights=AdaptedWeights(base, adapters, lora))


def is_peft_folder(path: Path) -> bool:
    """Whether a folder holds only an adapter, in peft's format."""
    return (path / PEFT_CONFIG).is_file() and not (path / "config.json").exists()


def peft_name(name: str) -> str:
    """Return the name of an adapter in peft's files: without the adapter's own name, `default`."""
    return _PEFT_PREFIX + name.replace(".default.", ".")


def with_peft_folder(folder: Path, base: ModelSource, verifier: Verifier) -> ModelSource:
    """Combine a base and an adapter in peft's format into one model.

    Raises:
        CheckpointError: The folder can't be read, has unsupported settings, or doesn't fit the base.
    """
    lora = _lora_in(folder)
    file = SafetensorsFile(confined(folder, PEFT_WEIGHTS, folder / PEFT_CONFIG), verifier)
    file.note_if_unverified()
    try:
        expected = lora.adapter_shapes(base.config)
    except ValueError as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG}: {error}") from error
    check_number_formats(folder, file.outlines, file.outlines)
    found = {name: outline.shape for name, outline in file.outlines.items()}
    if problems := shape_problems(found, {peft_name(name): shape for name, shape in expected.items()}):
        raise CheckpointError(f"{folder}: doesn't fit {base.path}: {'; '.join(problems[:5])}.")
    return replace(base, path=folder, weights=AdaptedWeights(base, _PeftWeights(file, tuple(expected)), lora))


def _lora_in(folder: Path) -> LoRAConfig:
    """Read the settings of an adapter in peft's format; refuse unknown ones that would change it."""
    values = read_json(folder, PEFT_CONFIG)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: peft_type is {values.get('peft_type')!r}. Only LORA is read.")
    known = {field.name for field in fields(LoRAConfig)} - {*_WITHOUT_EFFECT, *_HARMLESS}
    for key, value in values.items():
        is_off = value is None or value is False or value in ([], {}, "")
        if not is_off and key not in known | _WITHOUT_EFFECT and value not in _HARMLESS.get(key, ()):
            raise CheckpointError(
                f"{folder / PEFT_CONFIG}: {key} is {value!r}, which is not read here. Merge it into its base "
                "with peft's merge_and_unload, and read that model."
            )
    given = {key: values[key] for key in known if values.get(key) is not None}
    targets = given.pop("target_modules", ())
    for key in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(given.get(key, 0), (int, float)):
            raise CheckpointError(f"{folder / PEFT_CONFIG}: {key} is {given[key]!r}, which is not a number.")
    try:
        return LoRAConfig(target_modules=(targets,) if isinstance(targets, str) else tuple(targets), **given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG}: {error}") from error


@dataclass(frozen=True)
class _PeftWeights:
    """The tensors of an adapter in peft's format, by the names that they have in a run's checkpoint."""

    file: SafetensorsFile
    names: tuple[str, ...]

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        return {name: self.file.outlines[peft_name(name)] for name in self.names}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        return self.file.read(peft_name(name), dtype, rows)


def check_base(base: ModelSource, expected: torch.Tensor | None) -> None:
    """Raise CheckpointError unless `base` has the fingerprint stored in the adapters' checkpoint."""
    if expected is None or not torch.equal(expected.cpu(), fingerprint(base)):
        raise CheckpointError(
            f"{base.path}: is not the base that these adapters were trained on: its weights differ. "
            "Put that base back, or name where it is now in the run's config.yaml."
        )


def fingerprint(source: ModelSource) -> torch.Tensor:
    """(32,) uint8: a hash of the names and shapes of all weights, and of the first rows of some.

    These are the embedding and the last block: any training changes some of them, and a hash of all weights
    would make every rank read all of them.
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
