"""The parts of a Hugging Face folder with the network's own code: its config.json, and the code.

It is for models that transformers' own MPT classes can't express. The `model_type` is not theirs, so that a
load without `trust_remote_code=True` is refused. Those classes only warn about another `model_type`, so we
write an `attn_type` that they reject into `attn_config`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

import mptfoundry.mpt
from mptfoundry.export.native import token_ids
from mptfoundry.mpt.config import MPTConfig

_ENTRY = "hf"


def custom_config(config: MPTConfig, tokenizer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json`: every switch of the architecture, and the classes in the folder.

    The attention backend is `auto`, whatever trained the model, because users load it on other machines.
    """
    values = config.to_explicit_dict()
    values["attn_config"]["attn_impl"] = "auto"
    return {
        "architectures": ["MPTFoundryForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_ENTRY}.MPTFoundryConfig",
            "AutoModelForCausalLM": f"{_ENTRY}.MPTFoundryForCausalLM",
        },
        "model_type": "mptfoundry",
        **values,
        "init_device": "cpu",
        "use_cache": True,
        **token_ids(tokenizer),
        "tokenizer_class": "PreTrainedTokenizerFast",  # pipeline() looks for it here
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def copy_code(folder: Path) -> list[Path]:
    """Copy the network's files, flat, into an exported folder, and return them.

    These are the entry file and the files that it imports, because transformers copies those on loading.
    """
    room = Path(mptfoundry.mpt.__path__[0])
    text = (room / f"{_ENTRY}.py").read_text(encoding="utf-8")
    names = [_ENTRY, *sorted(set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)))]
    return [shutil.copyfile(room / f"{name}.py", folder / f"{name}.py") for name in names]
