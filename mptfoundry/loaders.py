"""`train_loader` and `eval_loader` -> batches: a function for each kind of loader, in a table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.data.examples.cache import cache_folder
from mptfoundry.data.examples.finetuning import build_finetuning_loader
from mptfoundry.data.examples.labelled import build_labelled_loader
from mptfoundry.data.examples.turns import Targets
from mptfoundry.data.records.sources import Source
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.head_config import HeadConfig, SequenceClassifierConfig, TokenClassifierConfig
from mptfoundry.plan.plan import Plan
from mptfoundry.run.changes import allows_other_rows
from mptfoundry.tokenizer import AS_TEXT


@dataclass(frozen=True)
class LoaderContext:
    """What a loader has in common with the run; lengths in tokens, batches in rows of one device."""

    model: MPTConfig
    tokenizer: Any
    max_seq_len: int
    device_batch_size: int
    seed: int
    num_workers: int
    is_training: bool
    where: str
    allow_code: bool
    takes_other_rows: bool = False

    def arguments(self, loader: LoaderConfig) -> dict[str, Any]:
        """What the builders of all kinds of loaders are given."""
        names = ("tokenizer", "max_seq_len", "device_batch_size", "seed", "num_workers", "where")
        shuffle, drop_last = loader.dataset.shuffle, loader.drop_last
        ahead: dict[str, Any] = {}
        if not isinstance(loader, LabelledLoaderConfig):
            given = ("prefetch_factor", "persistent_workers", "timeout")
            ahead = {name: getattr(loader, name) for name in given}
            ahead["pin_memory"] = loader.pin_memory and torch.cuda.is_available()
        return {
            **{name: getattr(self, name) for name in names},
            "shuffle": self.is_training if shuffle is None else shuffle,
            "drop_last": self.is_training if drop_last is None else drop_last,
            **ahead,
        }


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
        vocab_size=context.model.vocab_size,
        sequence_ids=context.model.attn_config.attn_uses_sequence_id,
        is_training=context.is_training,
        **context.arguments(loader),
        **streaming,
    )


def _labelled_loader(loader: LabelledLoaderConfig, context: LoaderContext) -> DataSpec:
    """Examples with labels, for the model's head."""
    head, dataset = context.model, loader.dataset
    if not isinstance(head, HeadConfig):
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
        is_training=context.is_training,
        **context.arguments(loader),
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
        targets=targets,
        cache=cache,
        max_bad_records=dataset.max_bad_records,
        max_dropped=dataset.max_dropped,
        packing_ratio=dataset.packing_ratio,
        is_training=context.is_training,
        trims_padding=dataset.allow_pad_trimming,
        takes_other_rows=context.takes_other_rows,
        **context.arguments(loader),
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
        sources[name] = Source(
            place,
            **options,
            preprocessing=given.preprocessing_fn,
            token_encoding_type=dataset.token_encoding_type,
            as_text=dataset.special_tokens == AS_TEXT,
        )
    targets = Targets(dataset.target_prompts, dataset.target_responses)
    return sources, targets, cache_folder(dataset.cache_folder)


LOADERS: dict[str, Callable[[Any, LoaderContext], DataSpec]] = {
    "finetuning": _finetuning_loader,
    "text": _text_loader,
    "labelled": _labelled_loader,
}


def build_train_loader(config: TrainConfig, plan: Plan, tokenizer: Any) -> DataSpec:
    """The training batches of this rank."""
    context = LoaderContext(
        model=config.model,
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        device_batch_size=plan.device_train_batch_size,
        seed=config.seed,
        num_workers=plan.num_workers["train"],
        is_training=True,
        where="train_loader",
        allow_code=config.allow_code,
        takes_other_rows=allows_other_rows(config),
    )
    return LOADERS[config.train_loader.name](config.train_loader, context)


def build_evaluators(
    loaders: Mapping[str, LoaderConfig],
    config: TrainConfig | EvalConfig,
    *,
    model: MPTConfig,
    tokenizer: Any,
    max_seq_len: int,
    device_batch_size: int,
    num_workers: Mapping[str, int],
) -> list[Evaluator]:
    """One evaluator a label, for a run that trains or for an evaluation alone."""
    evaluators = []
    for label, loader in loaders.items():
        context = LoaderContext(
            model=model,
            tokenizer=tokenizer,
            max_seq_len=max_seq_len,
            device_batch_size=device_batch_size,
            seed=config.seed,
            num_workers=num_workers[label],
            is_training=False,
            where=f"eval_loader {label}",
            allow_code=config.allow_code,
        )
        evaluators.append(Evaluator(label=label, dataloader=LOADERS[loader.name](loader, context)))
    return evaluators


def fingerprints_of(train_loader: DataSpec, evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """The content of each stream that a run reads, by its key in the config."""
    specs: list[Any] = [train_loader, *(evaluator.dataloader for evaluator in evaluators)]
    return {key: digest for spec in specs for key, digest in spec.dataloader.dataset.fingerprints.items()}


def _given(streams: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """The streams as plain values, without what was not given."""
    if streams is None:
        return None
    return {
        name: {key: value for key, value in asdict(stream).items() if value is not None}
        for name, stream in streams.items()
    }
