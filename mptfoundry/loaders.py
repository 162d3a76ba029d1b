"""Build the data loaders that the `train_loader` and `eval_loader` sections describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from composer.core import DataSpec, Evaluator

from mptfoundry.config.data import (
    FinetuningLoaderConfig,
    LabelledLoaderConfig,
    LoaderConfig,
    OwnLoaderConfig,
    TextLoaderConfig,
)
from mptfoundry.config.run import TrainConfig
from mptfoundry.data.examples.finetuning import build_finetuning_loader
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.plan.plan import Plan
from mptfoundry.run.changes import allows_other_rows


def build_loader(loader: LoaderConfig, context: LoaderContext) -> DataSpec:
    """Build this rank's loader of any kind."""
    if isinstance(loader, TextLoaderConfig):
        return build_text_loader(loader, context)
    if isinstance(loader, FinetuningLoaderConfig):
        return build_finetuning_loader(loader, context)
    return _build_rarer_loader(loader, context)


def _build_rarer_loader(loader: LabelledLoaderConfig | OwnLoaderConfig, context: LoaderContext) -> DataSpec:
    if isinstance(loader, OwnLoaderConfig):
        from mptfoundry.data.own.own_loader import build_own_loader

        return build_own_loader(loader, context)
    from mptfoundry.data.examples.labelled import build_labelled_loader

    return build_labelled_loader(loader, context)


def build_loaders(config: TrainConfig, plan: Plan, tokenizer: Any) -> tuple[DataSpec, list[Evaluator]]:
    """Build this rank's training loader, and one evaluator per label."""
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
    train_loader = build_loader(config.train_loader, context)
    held_out = replace(
        context, device_batch_size=plan.device_eval_batch_size, is_training=False, takes_other_rows=False
    )
    return train_loader, build_evaluators(config.eval_loaders, held_out, plan.num_workers)


def build_evaluators(
    loaders: Mapping[str, LoaderConfig], context: LoaderContext, num_workers: Mapping[str, int]
) -> list[Evaluator]:
    """Build one evaluator per label, each with its own number of workers."""
    evaluators = []
    for label, loader in loaders.items():
        own = replace(context, num_workers=num_workers[label], where=f"eval_loader {label}")
        evaluators.append(Evaluator(label=label, dataloader=build_loader(loader, own)))
    return evaluators


def fingerprints_of(train_loader: DataSpec, evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """Return the content fingerprint of each stream the run reads, by its key in the config."""
    specs: list[Any] = [train_loader, *(evaluator.dataloader for evaluator in evaluators)]
    return {key: digest for spec in specs for key, digest in spec.dataloader.dataset.fingerprints.items()}
