"""What a data set holds, before anything is trained on it: `preview(options)` as text, and as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mptfoundry.config.data import FinetuningLoaderConfig, TextLoaderConfig
from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import PreviewConfig
from mptfoundry.data.mix import describe_mix, draw_mix, mix_table
from mptfoundry.data.preview import preview as preview_folder
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.tokenizer import AS_TEXT


def preview(options: PreviewConfig) -> str:
    """Decoded samples of a folder of shards, or of every stream of a config with the mix that a run reads.

    Raises:
        ConfigError, DataError: Something named is missing or can't be read.
    """
    color = sys.stdout.isatty()
    if Path(options.data).suffix not in (".yaml", ".yml"):
        if options.picture:
            raise ConfigError(
                "picture: a mix can be drawn of a config only. Name a YAML file in place of shards."
            )
        split = options.split or ("train" if Path(options.data, "train").is_dir() else "")
        return preview_folder(
            Path(options.data, split), samples=options.samples, tokenizer=options.tokenizer, color=color
        )
    return _preview_config(options, color)


def _preview_config(options: PreviewConfig, color: bool) -> str:
    if options.split:
        raise ConfigError(
            "split: a config says the split of each stream. Remove it, or name a folder of shards."
        )
    words = [f"variables.{name}={json.dumps(value)}" for name, value in options.variables.items()]
    config, _ = load_train_config(options.data, [*words, f"allow_code={str(options.allow_code).lower()}"])
    if isinstance(config.train_loader, FinetuningLoaderConfig):
        return _preview_finetuning(config, config.train_loader, options, color)
    if not isinstance(config.train_loader, TextLoaderConfig):
        raise ConfigError(
            f"{options.data}: train_loader.name: labelled is not shown. Name a config of text or finetuning."
        )
    dataset, batches = config.train_loader.dataset, config.batches()
    streams = {name: asdict(stream) for name, stream in dataset.sources.items()}
    tokens_per_step = config.global_train_batch_size * config.max_seq_len
    rows = describe_mix(
        streams,
        split=dataset.split,
        max_seq_len=config.max_seq_len,
        total_tokens=None if batches is None else batches * tokens_per_step,
        eos_token_id=dataset.eos_token_id,
    )
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
    """Tokenizes what is not tokenized yet; the run finds it done."""
    from mptfoundry.data.example_preview import preview_examples
    from mptfoundry.data.finetuning import judge, load_examples
    from mptfoundry.data.packing import plan_packing
    from mptfoundry.loaders import finetuning_sources
    from mptfoundry.tokenizer import adds_in_words, load_tokenizer, own_borders, spelled

    dataset, length = loader.dataset, config.max_seq_len
    tokenizer = load_tokenizer(options.tokenizer or config.tokenizer.name, config.tokenizer.kwargs)
    sources, targets, cache = finetuning_sources(loader, "train_loader", allow_code=config.allow_code)
    stores = load_examples(
        sources, tokenizer, max_seq_len=length, targets=targets, cache=cache, where="train_loader"
    )
    adds = adds_in_words(spelled(own_borders(tokenizer), tokenizer))
    parts = [f"the tokenizer {adds}; a conversation has the special tokens that its template writes"]
    for (name, source), store in zip(sources.items(), stores, strict=True):
        text = preview_examples(store, tokenizer, max_seq_len=length, samples=options.samples, color=color)
        packing = plan_packing(store.lengths, length, dataset.packing_ratio, (config.seed,))
        rows = f"{packing.rows:,} rows, {packing.ratio:.2f} examples in each, {packing.fill:.1%} of it filled"
        parts.append(f"{name}: {rows}\n{text}")
        try:
            judge(store, source.where, dataset.max_bad_records, dataset.max_dropped)
        except DataError as error:
            parts.append(f"A run would end here. {error}")
    return "\n\n".join(parts)
