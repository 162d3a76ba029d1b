"""`mptfoundry tokenizer`: train a tokenizer on a sample of text, and compare tokenizers on a text."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from mptfoundry.config.verbs import TokenizerCompareConfig, TokenizerTrainConfig
from mptfoundry.data.examples.chat import CHATML
from mptfoundry.data.records.inputs import Inventory, find_inputs
from mptfoundry.data.records.records import BadInput, Document, plan_units, read_part
from mptfoundry.errors import ConfigError
from mptfoundry.tokenizer import count_ids, load_tokenizer, train_bpe

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def train_tokenizer(config: TokenizerTrainConfig) -> str:
    """Train a byte-level BPE tokenizer on a sample of the inputs, and return a line about it.

    Raises:
        ConfigError: The folder exists, or the template can't be read.
        DataError: An input is missing or broken.
    """
    out = Path(config.out).expanduser()
    if out.exists() and not config.overwrite:
        raise ConfigError(f"out: {out} exists. Name another folder, or add overwrite=true.")
    template, special_tokens = _template(config)
    inventory = find_inputs(
        config.inputs, text_key=config.text_key, include=config.include, exclude=config.exclude
    )
    sample = Sample(inventory, config)
    tokenizer = train_bpe(
        sample.texts(), config.vocab_size, out, special_tokens=special_tokens, chat_template=template
    )
    return (
        f"{out}: {count_ids(tokenizer):,} ids, trained on {sample.documents:,} documents "
        f"({sample.bytes / 1e6:,.1f} MB of {sample.size / 1e6:,.1f} MB)"
    )


def compare_tokenizers(config: TokenizerCompareConfig) -> str:
    """Return a table of bytes per token, with a row for each kind of file and a column for each tokenizer.

    Raises:
        ConfigError: A tokenizer can't be loaded.
        DataError: An input is missing or broken.
    """
    tokenizers: dict[str, Any] = {name: load_tokenizer(name) for name in (config.first, config.second)}
    sizes: Counter[str] = Counter()
    tokens: dict[str, Counter[str]] = defaultdict(Counter)
    changed: Counter[str] = Counter()
    for path in config.text:
        inventory = find_inputs((path,), text_key=config.text_key)
        sample = Sample(inventory, config)
        for kind, text in sample.documents_by_kind():
            sizes[kind] += len(text.encode())
            for name, tokenizer in tokenizers.items():
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                tokens[name][kind] += len(ids)
                changed[name] += tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text
    rows = [
        [kind, f"{size / 1e6:,.2f} MB", *(f"{size / tokens[name][kind]:.3f}" for name in tokenizers)]
        for kind, size in sorted(sizes.items(), key=lambda each: -each[1])
    ]
    total = sizes.total()
    rows.append(["all", f"{total / 1e6:,.2f} MB", *(f"{total / tokens[n].total():.3f}" for n in tokenizers)])
    rows.append(["ids", "", *(f"{count_ids(each):,}" for each in tokenizers.values())])
    rows.append(["documents changed by decoding", "", *(f"{changed[name]:,}" for name in tokenizers)])
    heads = ["bytes per token", "text", *tokenizers]
    return tabulate(rows, headers=heads, disable_numparse=True, colalign=("left", *["right"] * 3))


class Sample:
    """A random sample of the text in some inputs, which is read piece by piece.

    Attributes:
        size: Bytes of all inputs, as stored.
        bytes, documents: What was read of them.
    """

    def __init__(self, inventory: Inventory, config: TokenizerTrainConfig | TokenizerCompareConfig) -> None:
        self.size = sum(source.size for source in inventory.inputs)
        self.bytes = self.documents = 0
        self._inventory, self._config = inventory, config

    def texts(self) -> Iterator[str]:
        """The sampled texts."""
        for _, text in self.documents_by_kind():
            yield text

    def documents_by_kind(self) -> Iterator[tuple[str, str]]:
        """Each sampled text with the suffix of its file, or `data set`.

        Raises:
            DataError: Something can't be read.
        """
        config, datasets = self._config, self._inventory.datasets
        share = min(1.0, config.sample_bytes / max(self.size, 1))
        chosen = random.Random(config.seed)
        is_shown = config.progress and self.size > 1 << 24
        with tqdm(
            total=round(self.size * share),
            desc="reading",
            unit="B",
            unit_scale=True,
            disable=not is_shown,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        ) as bar:
            for unit in plan_units(self._inventory.inputs, datasets, cut_texts=True):
                if chosen.random() >= share:
                    continue
                for part in unit.parts:
                    kind = Path(part.source).suffix if isinstance(part.source, str) else "data set"
                    for document in read_part(part, config.text_key, datasets):
                        if isinstance(document, BadInput):
                            raise document
                        if isinstance(document, Document) and document.text:
                            self.bytes += document.size
                            self.documents += document.is_start
                            yield kind or "no suffix", document.text
                bar.update(unit.weight)


def _template(config: TokenizerTrainConfig) -> tuple[str | None, tuple[str, ...]]:
    """The chat template and all special tokens."""
    if config.chat_template is None:
        return None, config.special_tokens
    if config.chat_template == "chatml":
        return CHATML, tuple(dict.fromkeys((*config.special_tokens, *CHATML_TOKENS)))
    try:
        return Path(config.chat_template).read_text(encoding="utf-8"), config.special_tokens
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template: {config.chat_template} can't be read ({error}). Use chatml, or a Jinja file."
        ) from error
