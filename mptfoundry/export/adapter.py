"""The adapters of a run as a PEFT folder, for stock peft on the exported folder of their base.

Such a folder holds `adapter_config.json`, `adapter_model.safetensors` with peft's names, and the tokenizer,
whose chat template may be the run's own.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mptfoundry.checkpoints.adapters import AdaptedWeights
from mptfoundry.checkpoints.architecture import differing
from mptfoundry.checkpoints.checksums import write_tensor_checksums
from mptfoundry.checkpoints.hf_folder import SafetensorsFile
from mptfoundry.checkpoints.reading import ModelSource
from mptfoundry.checkpoints.weights import bytes_of
from mptfoundry.checkpoints.writing import whole_or_absent
from mptfoundry.config.learned import LoRAConfig
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import MPTConfig

WEIGHTS = "adapter_model.safetensors"
# peft's model holds transformers' model as `base_model.model`.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSummary:
    """What an export of adapters wrote.

    Attributes:
        folder: Where.
        base: Beside which model they stand.
        base_is_folder: Whether that is a Hugging Face folder already.
        parameters: Of the adapters.
        dtype: Theirs.
    """

    folder: Path
    base: Path
    base_is_folder: bool
    parameters: int
    dtype: torch.dtype

    def __str__(self) -> str:
        base = str(self.base) if self.base_is_folder else "HF_FOLDER"
        first = "" if self.base_is_folder else f"mptfoundry export {self.base} {base}\n  "
        return (
            f"{self.folder}: {self.parameters:,} parameters of adapters as "
            f"{str(self.dtype).removeprefix('torch.')}, beside {self.base}.\nLoad them:\n  {first}"
            f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{self.folder}")'
        )


def export_adapter(
    source: ModelSource, out: Path, dtype: torch.dtype, tokenizer: Any, *, overwrite: bool
) -> AdapterSummary:
    """Write the adapters of a run as a PEFT folder; there whole or not at all.

    Args:
        source: The run, opened.
        out: The folder.
        dtype: Of the adapters.
        tokenizer: The run's.
        overwrite: Replace a folder that is there.

    Raises:
        CheckpointError: The run has no adapters, or changes its base in other ways, too.
    """
    weights = source.weights
    if not isinstance(weights, AdaptedWeights):
        raise CheckpointError(f"{source.path}: has no adapters to write separately. Use adapter=merged.")
    _refuse_another_architecture(source.config, weights.base)
    tensors = {
        peft_name(name): weights.adapters.read(name, dtype).contiguous()
        for name in weights.lora.adapter_shapes(source.config)
    }
    base_is_folder = (weights.base.path / "config.json").exists()
    with whole_or_absent(out, overwrite=overwrite) as folder:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        config = peft_config(weights.lora, source.config, str(weights.base.path) if base_is_folder else None)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        write_tensor_checksums(folder, {name: zlib.crc32(bytes_of(t)) for name, t in tensors.items()})
        written = SafetensorsFile(folder / WEIGHTS)
        for name in tensors:
            written.read(name)
    return AdapterSummary(
        folder=out,
        base=weights.base.path,
        base_is_folder=base_is_folder,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=dtype,
    )


def peft_name(name: str) -> str:
    """What peft calls an adapter in its files: without the adapter's own name, `default`."""
    return _PREFIX + name.replace(".default.", ".")


def peft_config(lora: LoRAConfig, network: MPTConfig, base: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    return {
        "peft_type": lora.peft_type,
        "task_type": lora.task_type,
        "base_model_name_or_path": base,
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
    """Adapters carry no switch: what the run overrode beside them would be lost. Dropout is for training."""
    for path, there, here in differing(base.config, config.to_dict()):
        if not path[-1].endswith("pdrop"):
            raise CheckpointError(
                f"adapter: separate can't express {'.'.join(path)}: {here}, which is {there} in the base, "
                f"{base.path}. Use adapter=merged."
            )
