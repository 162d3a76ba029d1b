"""Show what is in a dataset before training on it, as text and optionally as a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mptfoundry.config.data import FinetuningLoaderConfig, OwnLoaderConfig, TextLoaderConfig
from mptfoundry.config.load import CONFIG_SUFFIXES, load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import PreviewConfig
from mptfoundry.data.views.mix import describe_mix, draw_mix, mix_table
from mptfoundry.data.views.shards_preview import preview as preview_folder
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.tokenizer import AS_TEXT


class RunWouldEnd(DataError):
    """A run would end before its first batch; `text` is the preview."""

    def __init__(self, reasons: Sequence[str], text: str) -> None:
        super().__init__("\n".join(f"A run would end here. {reason}" for reason in reasons))
        self.text = text


def preview(options: PreviewConfig, words: Sequence[str] = ()) -> str:
    """Decode samples from a folder of shards, or from every stream of a config along with its mix.

    Args:
        options: The options of `mptfoundry preview`.
        words: `key=value` overrides for a config.

    Raises:
        ConfigError, DataError: An input is missing or can't be read.
        RunWouldEnd: A stream has more bad or dropped records than its config allows.
    """
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if not options.data.endswith(CONFIG_SUFFIXES):
        if options.picture:
            raise ConfigError(
                "picture: a mix can be drawn of a config only. Name a YAML file in place of shards."
            )
        split = options.split or ("train" if Path(options.data, "train").is_dir() else "")
        return preview_folder(
            Path(options.data, split),
            samples=options.samples,
            tokenizer=options.tokenizer,
            token_encoding_type=options.token_encoding_type or "int64",
            color=color,
        )
    return _preview_config(options, words, color)


def _preview_config(options: PreviewConfig, words: Sequence[str], color: bool) -> str:
    if options.split:
        raise ConfigError(
            "split: a config says the split of each stream. Remove it, or name a folder of shards."
        )
    if options.token_encoding_type:
        raise ConfigError(
            "token_encoding_type: a config says it, as train_loader.dataset.token_encoding_type. Remove it, "
            "or name a folder of shards."
        )
    allow_code = f"allow_code={str(options.allow_code).lower()}"
    config, _ = load_train_config(options.data, [*words, allow_code])
    if isinstance(config.train_loader, FinetuningLoaderConfig):
        return _preview_finetuning(config, config.train_loader, options, color)
    if isinstance(config.train_loader, OwnLoaderConfig):
        return _preview_own(config, config.train_loader, options, color)
    if not isinstance(config.train_loader, TextLoaderConfig):
        raise ConfigError(
            f"{options.data}: train_loader.name: labelled is not shown. Name a config of text or finetuning."
        )
    dataset, batches = config.train_loader.dataset, config.batches()
    tokens_per_step = config.global_train_batch_size * config.max_seq_len
    total_tokens = None if batches is None else batches * tokens_per_step
    rows = describe_mix(config.train_loader, config.max_seq_len, total_tokens=total_tokens)
    parts = [mix_table(rows)]
    if options.picture:
        parts.append(f"picture: {draw_mix(rows, options.picture)}")
    for name, stream in dataset.sources.items():
        folder = Path(stream.local or stream.remote or "", stream.split or dataset.split or "")
        tokenizer = options.tokenizer or config.tokenizer.name
        text = preview_folder(
            folder,
            samples=options.samples,
            tokenizer=tokenizer,
            tokenizer_kwargs=None if options.tokenizer else config.tokenizer.kwargs,
            token_encoding_type=dataset.token_encoding_type,
            as_text=dataset.special_tokens == AS_TEXT,
            color=color,
        )
        parts.append(f"{name}\n{text}")
    return "\n\n".join(parts)


def _preview_finetuning(
    config: TrainConfig, loader: FinetuningLoaderConfig, options: PreviewConfig, color: bool
) -> str:
    """Preview a finetuning config. This tokenizes new records into the cache that the run reads later."""
    from mptfoundry.data.examples.finetuning import load_examples, why_not
    from mptfoundry.data.examples.packing import plan_packing
    from mptfoundry.data.records.records import counted
    from mptfoundry.data.views.example_preview import preview_examples
    from mptfoundry.tokenizer import adds_in_words, load_tokenizer, own_borders, spelled

    dataset, length = loader.dataset, config.max_seq_len
    tokenizer = load_tokenizer(options.tokenizer or config.tokenizer.name, config.tokenizer.kwargs)
    context = _context(config, tokenizer)
    stores = load_examples(loader, context)
    adds = adds_in_words(spelled(own_borders(tokenizer), tokenizer))
    parts = [f"the tokenizer {adds}; a conversation has the special tokens that its template writes"]
    reasons: list[str] = []
    for name, (where, store) in zip(dataset.sources, stores.items(), strict=True):
        text = preview_examples(store, tokenizer, max_seq_len=length, samples=options.samples, color=color)
        packing = plan_packing(store.lengths, length, dataset.packing_ratio, (config.seed,))
        rows = f"{counted(packing.rows, 'row')}, {packing.ratio:.2f} examples in each"
        parts.append(f"{name}: {rows}, {packing.fill:.1%} of it filled\n{text}")
        if refusal := why_not(store, where, dataset):
            # The preview text already names the records.
            reasons.append(f"{refusal.reason}. {refusal.advice}")
    text = "\n\n".join(parts)
    if reasons:
        raise RunWouldEnd(reasons, text)
    return text


def _preview_own(config: TrainConfig, loader: OwnLoaderConfig, options: PreviewConfig, color: bool) -> str:
    """Preview evenly spaced items of a dataset of the user's own."""
    import numpy as np

    from mptfoundry.data.own.own_loader import open_items
    from mptfoundry.data.records.records import counted
    from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
    from mptfoundry.data.views.example_preview import show_trained
    from mptfoundry.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer or config.tokenizer.name, config.tokenizer.kwargs)
    items = open_items(loader, _context(config, tokenizer))
    count, shown = len(items), min(options.samples, len(items))
    parts = [f"{loader.name}: {counted(count, 'item')}"]
    for number in sorted({round(at) for at in np.linspace(0, count - 1, shown)}):
        item = items[number]
        trained = item.labels != NOT_IN_LOSS
        said = f"{counted(len(item.input_ids), 'token')}, {int(trained.sum()):,} in the loss"
        if len(item.lengths) > 1:
            said += f", {counted(len(item.lengths), 'document')}"
        if (item.labels != item.input_ids)[trained].any():
            said += "; its labels are other ids than its input_ids"
        text = show_trained(item.input_ids, trained, tokenizer, color=color)
        parts.append(f"item {number:,} of {count:,}: {said}\n{text}")
    return "\n\n".join(parts)


def _context(config: TrainConfig, tokenizer: Any) -> Any:
    """What a training loader needs from the run, to read its samples here."""
    from mptfoundry.data.loading import LoaderContext

    return LoaderContext(
        model=config.model,
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        device_batch_size=config.global_train_batch_size,
        seed=config.seed,
        num_workers=0,
        is_training=True,
        where="train_loader",
        allow_code=config.allow_code,
    )
