"""The plain formulas, in full matrices and any dtype: float64 is the truth, float32 the yardstick.

Letters of the shapes: keys = tokens in the cache + seq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.mpt.position import AttentionContext


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AttentionContext,
    kept: torch.Tensor | None = None,
    half: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention with its whole (batch, n_heads, seq, keys) matrix of scores.

    ``kept`` (batch, n_heads, seq, keys) says which weights the context's dropout leaves. ``half`` is what
    tensor cores multiply: weights, and in backward the gradients of the scores, are rounded to it.
    """
    n_heads, past = query.shape[2], key.shape[1] - query.shape[1]
    q, k, v = (x.repeat_interleave(n_heads // x.shape[2], 2).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT * context.scale
    if half is not None and scores.requires_grad:
        scores.register_hook(lambda grad: grad.to(half).to(grad.dtype))
    if context.softcap is not None:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    places = torch.arange(key.shape[1])
    distance = places[past:, None] - places
    if context.slopes is not None:
        scores = scores - context.slopes.to(q.dtype)[:, None, None] * distance.abs()
    visible = (distance >= 0)[None]
    if context.prefix is not None:
        visible = visible | context.prefix[:, past:, None] & context.prefix[:, None]
    if context.window is not None:
        visible = visible & (distance.abs() <= context.window)
    if context.documents is not None:
        visible = visible & (context.documents[:, past:, None] == context.documents[:, None])
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * kept / (1 - context.dropout)
    if half is not None:
        weights = weights + (weights.to(half).to(weights.dtype) - weights).detach()
    return (weights @ v).transpose(1, 2)


def with_gradients(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """What a function of tensors gives in a dtype, and the gradients of its inputs."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(dtype))
    return [x.detach() for x in (out, *gradients)]


def livelier(config: MPTConfig, by: float = 0.1) -> MPT:
    """A network whose biases and norms say something, too, and whose choices depend on what was said."""
    made = MPT(config, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return made


def in_float64(made: MPT) -> MPT:
    exact = MPT(made.config, empty=True)
    exact.load_state_dict(made.state_dict())
    return exact.double().train(made.training)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def rounding(size: float, dtype: torch.dtype) -> float:
    """The RMS distance that rounding alone may cause in numbers of a dtype whose RMS is ``size``.

    Rounding to the nearest number of the dtype moves each by at most half an epsilon of itself. So even the
    truth, written down in this dtype, may be that far away, and whether a formula comes closer is decided by
    the order in which one processor and its library add.
    """
    return torch.finfo(dtype).eps / 2 * size


def assert_as_exact(
    fast: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    terms: Sequence[float] = (),
) -> None:
    """Fast results are at most twice as far (RMS) from the truth as the plain formula's or as rounding alone.

    The yardstick is a mean over many numbers: of few, the plain formula may have all exactly by luck. Below
    the distance of rounding, how exact the plain formula is depends on the processor and its library.
    ``terms`` says for each result the RMS of the numbers that cancel in it, if it is smaller than these:
    their rounding stays in it.
    """
    results = zip(fast, plain, truth, terms or [0.0] * len(truth), strict=True)
    for place, (some, yardstick, true, size) in enumerate(results):
        distance, of_plain = rms(some - true), rms(yardstick - true)
        floor = rounding(max(rms(true), size), some.dtype)
        assert distance <= 2 * max(of_plain, floor), (
            f"result {place}: {distance:.2e} from the truth, the plain formula {of_plain:.2e}, "
            f"rounding {floor:.2e}"
        )


def assert_attention_as_exact(
    fast: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    context: AttentionContext,
) -> None:
    """`assert_as_exact` for an output and the gradients of queries, keys and values, all drawn from normals.

    The gradient of a score is the difference of two scaled products of a gradient and a value, which cancel
    where queries see few keys, and where they see many the sum over all queries is small. Queries that share
    a key's head add up.

    Backward computes a weight again as the exponential of its score minus the log-sum of its row. Both are
    rounded at their own size, which is that of a score and of the logarithm of the number of keys, so that
    each weight in the gradient of values has the rounding of a number that many times as large.
    """
    _, of_query, of_key, of_value = truth
    product = context.scale * of_query.shape[-1] ** 0.5
    shared = (of_query.shape[2] / of_key.shape[2]) ** 0.5
    log_sum = product + math.log(of_key.shape[1])
    terms = (0, 2 * product, 2 * product * shared, rms(of_value) * log_sum)
    assert_as_exact(fast, plain, truth, terms=terms)


def assert_gradients_as_exact(
    fast: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> None:
    """`assert_as_exact` for the gradients of all of a network's weights together.

    The rounding of a few numbers, such as a batch's logits, goes into all of them: one weight alone may have
    little of it by luck. Each is the truth to four digits by itself; one that has no influence (a bias before
    a softmax) is nothing next to the largest.
    """
    largest = max(rms(true) for true in truth)
    for place, (some, true) in enumerate(zip(fast, truth, strict=True)):
        assert rms(some - true) < 1e-4 * rms(true) + 1e-6 * largest, f"gradient {place}"
    assert_as_exact(*([torch.cat([x.flatten() for x in each])] for each in (fast, plain, truth)))
