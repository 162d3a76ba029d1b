"""Pretrain, finetune, evaluate and export MPT models on Composer, StreamingDataset and PyTorch FSDP.

The names below are the public Python API. Each is imported when it is first used, because torch and Composer
take seconds to import.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AttnConfig": "mptfoundry.mpt.config",
    "EvalConfig": "mptfoundry.config.verbs",
    "MPT": "mptfoundry.mpt.network",
    "MPTConfig": "mptfoundry.mpt.config",
    "MPTFoundryError": "mptfoundry.errors",
    "evaluate_model": "mptfoundry.evaluate:evaluate",
    "export_model": "mptfoundry.export.folder:export",
    "generate_text": "mptfoundry.generation",
    "import_model": "mptfoundry.export.importing",
    "load_config": "mptfoundry.config.load:load_train_config",
    "load_model": "mptfoundry.checkpoints.reading:load_network",
    "prepare_text": "mptfoundry.data.prepare.prepare:prepare",
    "summary_table": "mptfoundry.plan.table",
    "train_model": "mptfoundry.train:train",
    "train_tokenizer": "mptfoundry.tokenizer:train_bpe",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
