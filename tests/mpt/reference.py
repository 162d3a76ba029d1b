"""The plain formulas, in full matrices and any dtype: float64 is the truth, float32 the yardstick.

Letters of the shapes: keys = tokens in the cache + seq.
"""

from __future__ import annotations

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
    """What a function of tensors gives in a dtype, and the gradients of its inputs, as float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(dtype))
    return [x.detach().double() for x in (out, *gradients)]


def livelier(config: MPTConfig, by: float = 0.1) -> MPT:
    """A network whose biases and norms say something, too, and whose choices depend on what was said."""
    made = MPT(config, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return made


def in_float64(made: MPT) -> MPT:
    exact = MPT(made.config)
    exact.load_state_dict(made.state_dict())
    return exact.double().train(made.training)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_exact(
    fast: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    floor: float = 0,
) -> None:
    """Fast results are at most twice as far from the truth as the plain formula's.

    ``floor`` is a distance that is always allowed, for cases so small that the plain formula is exact.
    """
    for place, (some, yardstick, true) in enumerate(zip(fast, plain, truth, strict=True)):
        distance, allowed = rms(some - true), rms(yardstick - true)
        assert distance <= max(2 * allowed, floor), f"result {place}: {distance:.2e}, plain {allowed:.2e}"
