"""Export the adapters of a run as a PEFT folder, for stock peft with the exported folder of their base.

Such a folder holds `adapter_config.json`, `adapter_model.safetensors` with peft's names, a README.md, and the
tokenizer, which may have the run's own chat template.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mptfoundry.architecture.of_run import differing
from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.checkpoints.adapters import PEFT_CONFIG, PEFT_WEIGHTS, AdaptedWeights, peft_name
from mptfoundry.checkpoints.checksums import write_tensor_checksums
from mptfoundry.checkpoints.hf_folder import SafetensorsFile
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.weights import bytes_of, check_finite
from mptfoundry.errors import CheckpointError
from mptfoundry.export.card import Base, adapter_card, adapter_use
from mptfoundry.export.native import why_not_native
from mptfoundry.files import read_json, whole_or_absent
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.tokenizer import save_tokenizer


@dataclass(frozen=True)
class AdapterSummary:
    """What an export of adapters wrote.

    Attributes:
        folder: The folder written.
        base: The model that they belong to.
        parameters: Number of the adapters' parameters.
        dtype: The adapters' dtype.
    """

    folder: Path
    base: Base
    parameters: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.parameters:,} parameters of adapters as "
            f"{str(self.dtype).removeprefix('torch.')}, for {self.base.name}.\nLoad them:\n"
            + "\n".join(f"  {line}" for line in adapter_use(self.base, str(self.folder)))
        )


def export_adapter(
    source: ModelSource, out: Path, dtype: torch.dtype, tokenizer: Any, *, overwrite: bool
) -> AdapterSummary:
    """Write the adapters of a run as a PEFT folder, atomically.

    Args:
        source: The run, opened.
        out: The folder to write.
        dtype: The dtype to write.
        tokenizer: The run's tokenizer.
        overwrite: Replace an existing folder.

    Raises:
        CheckpointError: The run has no adapters, or also changes its base in other ways.
    """
    weights = source.weights
    if not isinstance(weights, AdaptedWeights):
        raise CheckpointError(f"{source.path}: has no adapters to write separately. Use adapter=merged.")
    _refuse_another_architecture(source.config, weights.base)
    tensors = {
        peft_name(name): weights.adapters.read(name, dtype).contiguous()
        for name in weights.lora.adapter_shapes(source.config)
    }
    for name, tensor in tensors.items():
        check_finite(source.path, name, tensor)
    base, parameters = base_of(weights.base), sum(tensor.numel() for tensor in tensors.values())
    with whole_or_absent(out, overwrite=overwrite) as folder:
        folder.mkdir()
        (folder / PEFT_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        config = peft_config(weights.lora, source.config, base)
        (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        card = adapter_card(out.name, source, folder, weights.lora, base, f"{parameters:,}")
        (folder / "README.md").write_text(card, encoding="utf-8")
        save_tokenizer(tokenizer, folder)
        write_tensor_checksums(folder, {name: zlib.crc32(bytes_of(t)) for name, t in tensors.items()})
        written = SafetensorsFile(folder / PEFT_WEIGHTS)
        for name in tensors:
            written.read(name)
    return AdapterSummary(out, base, parameters, dtype)


def base_of(source: ModelSource) -> Base:
    """Return how others find and load the base of adapters."""
    path = source.path
    revision: str | None = None
    name, needs_code = str(path), bool(why_not_native(source.config))
    is_folder = (path / "config.json").exists()
    if is_folder:
        needs_code |= read_json(path, "config.json").get("model_type") != "mpt"
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):  # the hub's cache
        name, revision = path.parents[1].name.removeprefix("models--").replace("--", "/"), path.name
    return Base(name, revision, is_folder=is_folder, needs_code=needs_code)


def peft_config(lora: LoRAConfig, network: MPTConfig, base: Base) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    return {
        "peft_type": lora.peft_type,
        "task_type": lora.task_type,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.targets(network)),
        "use_rslora": lora.use_rslora,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _refuse_another_architecture(config: MPTConfig, base: ModelSource) -> None:
    """Refuse switches that the run overrode: a PEFT folder can't hold them. Dropout only affects training."""
    for path, there, here in differing(base.config, config.to_dict()):
        if not path[-1].endswith("pdrop"):
            raise CheckpointError(
                f"adapter: separate can't express {'.'.join(path)}: {here}, which is {there} in the base, "
                f"{base.path}. Use adapter=merged."
            )
