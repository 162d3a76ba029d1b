"""`train_loader` and `eval_loader` -> batches: a function for each kind of loader, in a table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec, Evaluator

from mptfoundry.config.data import (
    FinetuningLoaderConfig,
    LabelledLoaderConfig,
    LoaderConfig,
    TextLoaderConfig,
)
from mptfoundry.config.run import TrainConfig
from mptfoundry.data.example_cache import cache_folder
from mptfoundry.data.example_sources import Source
from mptfoundry.data.finetuning import build_finetuning_loader
from mptfoundry.data.labelled import build_labelled_loader
from mptfoundry.data.text import build_text_loader
from mptfoundry.data.turns import Targets
from mptfoundry.devices import Device
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.head_config import HeadConfig, SequenceClassifierConfig, TokenClassifierConfig
from mptfoundry.resolve import Resolved


@dataclass(frozen=True)
class LoaderContext:
    """What a loader has in common with the run; lengths in tokens, batches in rows of one device."""

    tokenizer: Any
    max_seq_len: int
    vocab_size: int
    device_batch_size: int
    seed: int
    num_workers: int
    sequence_ids: bool
    is_training: bool
    where: str
    head: HeadConfig | None = None
    allow_code: bool = False


def _text_loader(loader: TextLoaderConfig, context: LoaderContext) -> DataSpec:
    """Shards of tokens or raw text, mixed by proportion."""
    own = {"streams", "remote", "local", "split", "max_seq_len", "shuffle", "shuffle_seed", "replication"}
    dataset = loader.dataset
    streaming = {
        field.name: getattr(dataset, field.name)
        for field in fields(dataset)
        if field.name not in own and getattr(dataset, field.name) is not None
    }
    return build_text_loader(
        streams=_given(dataset.streams),
        remote=dataset.remote,
        local=dataset.local,
        split=dataset.split,
        tokenizer=context.tokenizer,
        max_seq_len=context.max_seq_len,
        vocab_size=context.vocab_size,
        device_batch_size=context.device_batch_size,
        shuffle=context.is_training if dataset.shuffle is None else dataset.shuffle,
        seed=context.seed,
        drop_last=context.is_training if loader.drop_last is None else loader.drop_last,
        num_workers=context.num_workers,
        sequence_ids=context.sequence_ids,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        timeout=loader.timeout,
        where=context.where,
        **streaming,
    )


def _labelled_loader(loader: LabelledLoaderConfig, context: LoaderContext) -> DataSpec:
    """Examples with labels, for the model's head."""
    head, dataset = context.head, loader.dataset
    if head is None:
        raise ConfigError(f"{context.where}.name: labelled: the model has no head for labels. Use text.")
    known: dict[str, Any] = {"task": "span"}
    if isinstance(head, SequenceClassifierConfig):
        known = {"task": "sequence", "labels": head.label2id, "problem": head.problem}
    elif isinstance(head, TokenClassifierConfig):
        known = {"task": "token", "labels": head.label2id}
    return build_labelled_loader(
        **known,
        source=Source(
            f"{context.where}.dataset", hf_name=dataset.hf_name, local=dataset.local, split=dataset.split
        ),
        fields=dataset.fields,
        tokenizer=context.tokenizer,
        max_seq_len=context.max_seq_len,
        device_batch_size=context.device_batch_size,
        shuffle=context.is_training if dataset.shuffle is None else dataset.shuffle,
        seed=context.seed,
        drop_last=context.is_training if loader.drop_last is None else loader.drop_last,
        num_workers=context.num_workers,
        is_training=context.is_training,
        where=context.where,
    )


def _finetuning_loader(loader: FinetuningLoaderConfig, context: LoaderContext) -> DataSpec:
    """Prompts and responses, conversations: examples of which some tokens are learned."""
    dataset = loader.dataset
    sources, targets, cache = finetuning_sources(loader, context.where, allow_code=context.allow_code)
    by, amounts = dataset.amounts
    return build_finetuning_loader(
        sources=sources,
        amounts=amounts,
        amounts_by=by,
        tokenizer=context.tokenizer,
        max_seq_len=context.max_seq_len,
        targets=targets,
        cache=cache,
        max_bad_records=dataset.max_bad_records,
        max_dropped=dataset.max_dropped,
        where=context.where,
        packing_ratio=dataset.packing_ratio,
        device_batch_size=context.device_batch_size,
        shuffle=context.is_training if dataset.shuffle is None else dataset.shuffle,
        seed=context.seed,
        drop_last=context.is_training if loader.drop_last is None else loader.drop_last,
        is_training=context.is_training,
        trims_padding=dataset.allow_pad_trimming,
        num_workers=context.num_workers,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        timeout=loader.timeout,
    )


def finetuning_sources(
    loader: FinetuningLoaderConfig, where: str, *, allow_code: bool
) -> tuple[dict[str, Source], Targets, Path]:
    """Where a loader's records lie, what of them is learned, and where its examples are kept.

    Raises:
        ConfigError: A function of the user's makes its records, and the command line did not allow code.
    """
    dataset, sources = loader.dataset, {}
    for name, given in dataset.sources.items():
        place = f"{where}.dataset.streams.{name}" if dataset.streams else f"{where}.dataset"
        if isinstance(given.preprocessing_fn, str) and not allow_code:
            raise ConfigError(
                f"{place}.preprocessing_fn: {given.preprocessing_fn} is code. Run it with allow_code=true on "
                "the command line."
            )
        keys = ("hf_name", "hf_kwargs", "remote", "local", "split")
        options = {key: getattr(given, key) for key in keys}
        sources[name] = Source(place, **options, preprocessing=given.preprocessing_fn)
    targets = Targets(dataset.target_prompts, dataset.target_responses)
    return sources, targets, cache_folder(dataset.cache_folder)


LOADERS: dict[str, Callable[[Any, LoaderContext], DataSpec]] = {
    "finetuning": _finetuning_loader,
    "text": _text_loader,
    "labelled": _labelled_loader,
}


def head_of(config: Any) -> HeadConfig | None:
    """The architecture as one with a head, where it has one."""
    return config if isinstance(config, HeadConfig) else None


def build_train_loader(config: TrainConfig, resolved: Resolved, device: Device, tokenizer: Any) -> DataSpec:
    """The training batches of this rank."""
    context = LoaderContext(
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        vocab_size=config.model.vocab_size,
        device_batch_size=config.global_train_batch_size // device.count,
        seed=config.seed,
        num_workers=resolved.num_workers["train"],
        sequence_ids=config.model.attn_config.attn_uses_sequence_id,
        is_training=True,
        where="train_loader",
        head=head_of(config.model),
        allow_code=config.allow_code,
    )
    return LOADERS[config.train_loader.name](config.train_loader, context)


def build_evaluators(
    loaders: Mapping[str, LoaderConfig], contexts: Mapping[str, LoaderContext]
) -> list[Evaluator]:
    """One evaluator a label."""
    return [
        Evaluator(label=label, dataloader=LOADERS[loader.name](loader, contexts[label]))
        for label, loader in loaders.items()
    ]


def build_eval_loaders(config: TrainConfig, resolved: Resolved, tokenizer: Any) -> list[Evaluator]:
    """The evaluations of a training run."""
    contexts = {
        label: LoaderContext(
            tokenizer=tokenizer,
            max_seq_len=config.max_seq_len,
            vocab_size=config.model.vocab_size,
            device_batch_size=resolved.device_eval_batch_size,
            seed=config.seed,
            num_workers=resolved.num_workers[label],
            sequence_ids=config.model.attn_config.attn_uses_sequence_id,
            is_training=False,
            where=f"eval_loader {label}",
            head=head_of(config.model),
            allow_code=config.allow_code,
        )
        for label in config.eval_loaders
    }
    return build_evaluators(config.eval_loaders, contexts)


def _given(streams: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """The streams as plain values, without what was not given."""
    if streams is None:
        return None
    return {
        name: {key: value for key, value in asdict(stream).items() if value is not None}
        for name, stream in streams.items()
    }
