"""What a run was made of, for its report: the model, its base and the data."""

from __future__ import annotations

from typing import Any

from mptfoundry.config.run import TrainConfig
from mptfoundry.mpt.flops import count_parameters


def facts_of(config: TrainConfig, dataset: Any) -> dict[str, str]:
    """Rows of the report's table; empty where there is nothing to say.

    Args:
        config: The run's.
        dataset: What its training loader reads; one of finetuning knows its streams' examples.
    """
    sources = config.train_loader.dataset.sources
    stores = getattr(dataset, "stores", [None] * len(sources))
    data = [_stream(*each) for each in zip(sources.items(), stores, strict=True)]
    return {
        "model": config.model.name,
        "parameters": f"{count_parameters(config.model):,}",
        "base": config.model.pretrained_model_name_or_path or config.load_path or "",
        "data": "; ".join(data),
    }


def _stream(named: tuple[str, Any], store: Any) -> str:
    """Where a stream lies, its share of the mix, and what its examples hold."""
    name, source = named
    words = [str(place) for key in ("hf_name", "local", "remote") if (place := getattr(source, key, None))][
        :1
    ]
    for key in ("proportion", "repeat", "choose"):
        if (value := getattr(source, key, None)) is not None:
            words.append(f"{key} {value:g}")
    if store is not None:
        tokens, learned = int(store.lengths.sum()), int(store.learned.sum())
        words.append(f"{len(store):,} examples of {tokens:,} tokens, {learned:,} of them learned")
    return f"{name}: {', '.join(words)}"
