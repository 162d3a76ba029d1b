"""Loaders of all kinds from plain keys, for tests: keys of the run, the loader and its data set, together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mptfoundry.config.data import (
    FinetuningDatasetConfig,
    FinetuningLoaderConfig,
    LabelledDatasetConfig,
    LabelledLoaderConfig,
    TextDatasetConfig,
    TextLoaderConfig,
)
from mptfoundry.config.streams import RecordsConfig, StreamConfig
from mptfoundry.data.examples.finetuning import build_finetuning_loader
from mptfoundry.data.examples.labelled import build_labelled_loader
from mptfoundry.data.examples.rows import build_row_loader
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.head_config import SequenceClassifierConfig, SpanFinderConfig, TokenClassifierConfig

SHAPE: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_layers": 1}
OF_THE_LOADER = (
    *("drop_last", "pin_memory", "prefetch_factor", "persistent_workers", "timeout"),
    "label",
)


def context_of(tokenizer: Any = None, **options: Any) -> LoaderContext:
    """The context of a small run."""
    model = MPTConfig(
        **SHAPE,
        vocab_size=options.pop("vocab_size", 384),
        attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=options.pop("sequence_ids", False)),
    )
    defaults: dict[str, Any] = {"max_seq_len": 64, "device_batch_size": 4, "seed": 9176, "num_workers": 0}
    defaults |= {"is_training": True, "where": "train_loader", "model": model}
    tokenizer = tokenizer or SimpleNamespace(pad_token_id=0, eos_token_id=0)
    return LoaderContext(tokenizer=tokenizer, **{**defaults, **options})


def text_loader(**options: Any) -> Any:
    """The loader of shards."""
    context, loader, dataset = _split(options)
    if streams := dataset.pop("streams", None):
        dataset["streams"] = {name: StreamConfig(**stream) for name, stream in streams.items()}
    return build_text_loader(TextLoaderConfig(dataset=TextDatasetConfig(**dataset), **loader), context)


def finetuning_loader(**options: Any) -> Any:
    """The loader of records to finetune on."""
    context, loader, dataset = _split(options)
    if streams := dataset.pop("streams", None):
        dataset["streams"] = {name: RecordsConfig(**stream) for name, stream in streams.items()}
    config = FinetuningDatasetConfig(**dataset)
    return build_finetuning_loader(
        FinetuningLoaderConfig(name="finetuning", dataset=config, **loader), context
    )


def row_loader(stores: Any, passes: list[float] | None = None, **options: Any) -> Any:
    """The loader of example stores; `passes`: how often an epoch reads each."""
    context, loader, dataset = _split({"packing_ratio": "auto", **options})
    given: list[float] | list[None] = passes or [None] * len(stores)
    names = [f"train_loader.dataset.streams.{number}" for number in range(len(stores))]
    dataset["streams"] = {
        name: RecordsConfig(local="unused", repeat=often) for name, often in zip(names, given, strict=True)
    }
    config = FinetuningDatasetConfig(**dataset)
    loader = FinetuningLoaderConfig(name="finetuning", dataset=config, **loader)  # type: ignore[assignment]
    return build_row_loader(dict(zip(names, stores, strict=True)), loader, context)  # type: ignore[arg-type]


def labelled_loader(task: str = "sequence", **options: Any) -> Any:
    """The loader of labelled examples."""
    options.setdefault("model", head_of(task, options.pop("labels", None), options.pop("problem", None)))
    context, loader, dataset = _split(options)
    dataset.setdefault("cache_folder", str(Path(dataset["local"]).parent / ".cache"))
    config = LabelledDatasetConfig(**dataset)
    return build_labelled_loader(LabelledLoaderConfig(name="labelled", dataset=config, **loader), context)


def head_of(task: str, labels: dict[str, int] | None = None, problem: Any = None) -> Any:
    """The config of a model with a head: `sequence`, `token` or `span`."""
    if task == "span":
        return SpanFinderConfig(**SHAPE)
    names = {str(number): name for name, number in (labels or {"no": 0, "yes": 1}).items()}
    given: dict[str, Any] = {**SHAPE, "num_labels": len(names), "id2label": names}
    if task == "token":
        return TokenClassifierConfig(**given)
    return SequenceClassifierConfig(**given, problem_type=problem or "single_label_classification")


def _split(options: dict[str, Any]) -> tuple[LoaderContext, dict[str, Any], dict[str, Any]]:
    """The run's context, and the keys of the loader and of the data set."""
    dataset = {"shuffle": False, **options}
    loader = {"drop_last": True} | {key: dataset.pop(key) for key in OF_THE_LOADER if key in dataset}
    names = {field.name for field in fields(LoaderContext)} | {"vocab_size", "sequence_ids"}
    context = {key: dataset.pop(key) for key in names & dataset.keys()}
    return context_of(**context), loader, dataset
