"""What `positions`, `needle` and `copy` of an evaluation measure: how a model uses a long context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError
from mptfoundry.evals.needles import Questions, copies, evaluate_questions, held_out_ids, needles
from mptfoundry.evals.positions import evaluate_positions
from mptfoundry.mpt.network import MPT
from mptfoundry.ranks import say
from mptfoundry.tokenizer import token_byte_lengths

Results = dict[str, dict[str, float]]
Buckets = dict[str, dict[int, dict[str, float]]]


def evaluate_long_context(
    network: Any,
    tokenizer: Any,
    datasets: Mapping[str, Any],
    options: EvalConfig,
    *,
    batch_size: int,
    is_sharded: bool,
) -> tuple[Results, Buckets]:
    """Evaluate what the options name; all ranks call it.

    Args:
        network: In eval mode; the same on all ranks.
        tokenizer: The model's.
        datasets: label -> a StreamingDataset of token ids, of held-out text.
        options: The options of the evaluation.
        batch_size: Rows of the training length in a batch.
        is_sharded: Whether the ranks have to compute the same number of batches.

    Returns:
        label -> metric -> value, as of any evaluation, with a label for each bucket, needle and copy; and the
        buckets of each label.

    Raises:
        ConfigError: The model or the data can't be evaluated so.
        DataError: The held-out text is too short.
    """
    refuse_unsuitable(network, datasets, options)
    results: Results = {}
    buckets: Buckets = {}
    if options.positions:
        length = options.length_for(network.config.max_seq_len)
        joined = length // options.sample_length_for(network.config.max_seq_len)
        lengths = torch.as_tensor(token_byte_lengths(tokenizer, network.config.vocab_size))
        token_bytes = lengths.to(next(network.parameters()).device)
        for label, dataset in datasets.items():
            results[label], buckets[label] = evaluate_positions(
                network,
                dataset,
                length=length,
                joined=joined,
                batch_size=batch_size,
                token_bytes=token_bytes,
                is_sharded=is_sharded,
            )
        for label, losses in buckets.items():
            stops = [*list(losses)[1:], length]
            named = zip(losses.items(), stops, strict=True)
            results |= {f"{label}/{first}-{stop - 1}": metrics for (first, metrics), stop in named}
    for label, questions in _questions(datasets, tokenizer, options).items():
        results[label] = evaluate_questions(network, questions, batch_size=batch_size, is_sharded=is_sharded)
        say(f"{label}: {results[label]['accuracy']:.4f}")
    return results, buckets


def refuse_unsuitable(network: Any, datasets: Mapping[str, Any], options: EvalConfig) -> None:
    """Raise ConfigError for a model or data without such a context, or with one that is too short."""
    key = next(name for name in ("positions", "needle", "copy") if getattr(options, name))
    if not isinstance(network, MPT):
        raise ConfigError(f"{key}: is for language models, and this model has a head. Remove it.")
    for label, dataset in datasets.items():
        if not hasattr(dataset, "samples_per_stream"):
            raise ConfigError(f"{key}: needs an eval_loader of text, and {label} is of another kind.")
    config = network.config
    if config.attn_config.attn_uses_sequence_id:
        raise ConfigError(
            f"{key}: this model's documents don't attend to each other (attn_uses_sequence_id), so that a "
            "token's context is its document, and not the row. Evaluate without it."
        )
    lengths = [options.length_for(config.max_seq_len)] if options.positions else []
    lengths += [length for section in (options.needle, options.copy) if section for length in section.lengths]
    if config.has_learned_positions and max(lengths) > config.max_seq_len:
        raise ConfigError(
            f"{key}: {max(lengths)} tokens, but the model has {config.max_seq_len} learned positions. Use "
            "shorter lengths."
        )


def _questions(datasets: Mapping[str, Any], tokenizer: Any, options: EvalConfig) -> dict[str, Questions]:
    needle, copy = options.needle, options.copy
    lengths = [length for section in (needle, copy) if section is not None for length in section.lengths]
    if not lengths:
        return {}
    text = held_out_ids(datasets.values(), tokenizer.all_special_ids, max(lengths))
    questions = {}
    if needle is not None:
        for length in needle.lengths:
            for depth in np.linspace(0, 1, needle.depths):
                name = f"needle/{length}/depth {depth:.2f}"
                questions[name] = needles(text, length, float(depth), needle.documents, options.seed)
    if copy is not None:
        for length in copy.lengths:
            questions[f"copy/{length}"] = copies(text, length, copy.documents, options.seed)
    return questions
