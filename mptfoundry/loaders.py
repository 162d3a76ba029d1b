"""Build the data loaders that the `train_loader` and `eval_loader` sections describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import DataSpec, Evaluator

from mptfoundry.config.data import FinetuningLoaderConfig, LoaderConfig, TextLoaderConfig
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.data.examples.finetuning import build_finetuning_loader
from mptfoundry.data.examples.labelled import build_labelled_loader
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.text.text import build_text_loader
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.plan.plan import Plan
from mptfoundry.run.changes import allows_other_rows


def build_loader(loader: LoaderConfig, context: LoaderContext) -> DataSpec:
    """Build this rank's loader of any kind."""
    if isinstance(loader, TextLoaderConfig):
        return build_text_loader(loader, context)
    if isinstance(loader, FinetuningLoaderConfig):
        return build_finetuning_loader(loader, context)
    return build_labelled_loader(loader, context)


def build_train_loader(config: TrainConfig, plan: Plan, tokenizer: Any) -> DataSpec:
    """Build this rank's training loader."""
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
    return build_loader(config.train_loader, context)


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
    """Build one evaluator per label, for a training run or a standalone evaluation."""
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
        evaluators.append(Evaluator(label=label, dataloader=build_loader(loader, context)))
    return evaluators


def fingerprints_of(train_loader: DataSpec, evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """Return the content fingerprint of each stream the run reads, by its key in the config."""
    specs: list[Any] = [train_loader, *(evaluator.dataloader for evaluator in evaluators)]
    return {key: digest for spec in specs for key, digest in spec.dataloader.dataset.fingerprints.items()}
