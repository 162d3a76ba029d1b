"""Can a model find something far back in its context? Questions made from held-out text, without a download.

A needle is a key followed by a value, hidden in held-out text at some depth; the context ends with the key
again, and the model chooses among four values. Copying: the context is a text in random order, which then
begins again; the model chooses among four pieces of it how it continues.

Keys, values and pieces are tokens drawn at random from held-out text. So their order tells nothing, and a
model that can't see the needle, or can't copy, is right in a quarter of all cases. Nothing is generated:
the choices' log-likelihoods are compared, in which small models show a signal, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor

from mptfoundry.errors import DataError
from mptfoundry.mpt.network import MPT, KVCache
from mptfoundry.ranks import rank, world_size

KEY_TOKENS = VALUE_TOKENS = 8
CHOICES = 4
_MOST_TEXT = 1_000_000


@dataclass(frozen=True)
class Questions:
    """Questions of one length, each with its right choice first.

    Attributes:
        contexts: (questions, length) int64.
        choices: (questions, CHOICES, VALUE_TOKENS) int64.
    """

    contexts: Tensor
    choices: Tensor


def held_out_ids(datasets: Iterable[Any], special: Iterable[int], needed: int) -> np.ndarray:
    """The token ids of held-out text, one sample after the other, without special tokens: (tokens,) int64.

    Raises:
        DataError: There are fewer than `needed`.
    """
    pieces, count, excluded = [], 0, np.array(sorted(special), dtype=np.int64)
    for dataset in datasets:
        for number in range(int(dataset.num_samples)):
            ids = np.asarray(dataset.get_item(number)["input_ids"], dtype=np.int64)
            pieces.append(ids[~np.isin(ids, excluded)])
            count += len(pieces[-1])
            if count >= _MOST_TEXT:
                break
    if count < needed:
        raise DataError(
            f"needle, copy: the held-out text has {count:,} tokens, and a length of {needed:,} needs as "
            "many. Use shorter lengths, or an eval_loader with more text."
        )
    return np.concatenate(pieces)


def needles(text: np.ndarray, length: int, depth: float, count: int, seed: int) -> Questions:
    """Questions whose context has `length` tokens and a needle at `depth`, from 0 (begin) to 1 (end)."""
    draw = np.random.default_rng((seed, length, round(depth * 1e6)))
    hay_tokens = length - 2 * KEY_TOKENS - VALUE_TOKENS
    place = round(depth * hay_tokens)
    contexts, choices = [], []
    for _ in range(count):
        start = int(draw.integers(len(text) - hay_tokens + 1))
        hay = text[start : start + hay_tokens]
        key = draw.choice(text, KEY_TOKENS)
        values = draw.choice(text, (CHOICES, VALUE_TOKENS))
        contexts.append(np.concatenate([hay[:place], key, values[0], hay[place:], key]))
        choices.append(values)
    return Questions(torch.from_numpy(np.stack(contexts)), torch.from_numpy(np.stack(choices)))


def copies(text: np.ndarray, length: int, count: int, seed: int) -> Questions:
    """Questions whose context has at most `length` tokens: a shuffled text, and its beginning again.

    The choices are the last pieces of the text, each of which occurs once; the first of them is right.
    """
    draw = np.random.default_rng((seed, length))
    last = CHOICES * VALUE_TOKENS
    contexts, choices = [], []
    for _ in range(count):
        original = draw.choice(text, (length + last) // 2)
        contexts.append(np.concatenate([original, original[:-last]]))
        choices.append(original[-last:].reshape(CHOICES, VALUE_TOKENS))
    return Questions(torch.from_numpy(np.stack(contexts)), torch.from_numpy(np.stack(choices)))


@torch.inference_mode()
def choice_likelihoods(network: MPT, questions: Questions, chunk: int) -> Tensor:
    """The mean log-likelihood per token of each choice, (questions, CHOICES) float64, in nats.

    Args:
        network: In eval mode.
        questions: Questions of one length.
        chunk: Tokens of the context that the network reads at once.
    """
    device = next(network.parameters()).device
    contexts, choices = questions.contexts.to(device), questions.choices.to(device)
    count, length = contexts.shape
    room = length + choices.shape[2]
    cache = KVCache(network.config, count, room, device=device, dtype=next(network.parameters()).dtype)
    # The context's last token predicts the choice's first one.
    for start in range(0, length - 1, chunk):
        network(contexts[:, start : min(start + chunk, length - 1)], cache=cache, last_only=True)
    scores = []
    for number in range(choices.shape[1]):
        ids = torch.cat([contexts[:, -1:], choices[:, number]], dim=1)
        logits = network(ids[:, :-1], cache=cache).logits.float().log_softmax(-1)
        scores.append(logits.gather(-1, ids[:, 1:, None])[..., 0].double().mean(1))
        cache.length = length - 1
    return torch.stack(scores, dim=1).cpu()


def evaluate_questions(
    network: MPT, questions: Questions, *, batch_size: int, is_sharded: bool
) -> dict[str, float]:
    """Evaluate questions of one length; all ranks call it.

    Args:
        network: In eval mode; the same on all ranks.
        questions: The questions.
        batch_size: Rows of the training length in a batch; longer contexts are fewer.
        is_sharded: Whether the ranks have to compute the same number of batches.

    Returns:
        accuracy; stderr; margin, the right choice's mean log-likelihood per token minus that of the others;
        random_baseline; documents.
    """
    chunk, length = network.config.max_seq_len, questions.contexts.shape[1]
    size = max(1, batch_size * chunk // max(chunk, length))
    numbers = torch.arange(len(questions.contexts)).split(size)
    scores: dict[int, Tensor] = {}
    for first in range(0, len(numbers), world_size()):
        own = first + rank()
        if own < len(numbers) or is_sharded:
            chosen = numbers[min(own, len(numbers) - 1)]
            part = Questions(questions.contexts[chosen], questions.choices[chosen])
            scores[min(own, len(numbers) - 1)] = choice_likelihoods(network, part, chunk)
    gathered = {number: each for own in dist.all_gather_object(scores) for number, each in own.items()}
    table = torch.cat([gathered[number] for number in range(len(numbers))])
    count, right = len(table), (table.argmax(1) == 0).double()
    accuracy = float(right.mean())
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else math.nan,
        "margin": float((table[:, 0] - table[:, 1:].mean(1)).mean()),
        "random_baseline": 1 / CHOICES,
        "documents": float(count),
    }
