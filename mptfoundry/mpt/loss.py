"""The last matrix and the cross entropy in one, a few tokens at a time.

Logits of all tokens never exist together. Where gradients are wanted, those of a chunk are computed as soon
as its logits are there, and the logits are dropped: backward only scales what forward has summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .norm import compute_dtype

IGNORED = -100

# Logits of a chunk. Fewer would add up the weight's gradient more often, more would only take memory.
_CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross entropy of ``softmax(hidden @ weight.T)``, under autocast in its dtype, summed in float32.

    Differentiable once, in ``hidden`` and ``weight``.

    Args:
        hidden: (tokens, d_model).
        weight: (vocab, d_model).
        targets: (tokens,) int64; -100 where nothing is learned.
        softcap: Logits become ``softcap * tanh(logit / softcap)``.

    Returns:
        The mean over the learned tokens, 0 if there are none, a float32 scalar; and each token's loss,
        (tokens,) float32, 0 where not learned, which carries no gradient; and where no gradient is wanted
        whether the target has the highest logit, (tokens,) bool.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, losses, correct = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, wants_grad)
    return total / (targets != IGNORED).sum().clamp_(min=1), losses, correct


def mean_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the targets that are not `ignored`, 0 if there are none; and how many those are."""
    total = F.cross_entropy(wide(logits), targets, ignore_index=ignored, reduction="sum")
    count = (targets != ignored).sum()
    return total / count.clamp(min=1), count


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float | None,
        wants_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        dtype = compute_dtype(hidden) or hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            if wants_grad:
                wanted = ctx.needs_input_grad[:2]
                correct = None
                losses, ctx.grads = _losses_and_grads(hidden, matrix, targets, softcap, wanted)
                ctx.dtypes = hidden.dtype, weight.dtype
            else:
                losses, correct = _losses(hidden, matrix, targets, softcap)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The loss can be differentiated once: its gradients were made in forward.")
        grads, ctx.grads = ctx.grads, None
        scaled = (
            None if x is None else x.mul_(grad).to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def _losses(
    hidden: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's loss, (tokens,) float32, and whether its target has the highest logit, (tokens,) bool."""
    step = _tokens_of_chunk(matrix)
    losses, correct = [], []
    for some, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logits = _logits(some, matrix, softcap)
        losses.append(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none"))
        correct.append(logits.argmax(-1) == wanted)
    return torch.cat(losses).float(), torch.cat(correct)


def _losses_and_grads(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Each token's loss, (tokens,) float32, and the gradients of their sum.

    Returns:
        The losses; the gradients of ``hidden`` and of ``matrix``, the latter float32 or wider, each None
        unless ``wanted``.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    step = _tokens_of_chunk(matrix)
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    matrix_grad = torch.zeros_like(matrix, dtype=wide) if wanted[1] else None
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        some = hidden[part].to(matrix.dtype)
        learned = (targets[part] != IGNORED)[:, None]
        target = targets[part].clamp(min=0)[:, None]
        logits = _logits(some, matrix, softcap)  # (tokens of the chunk, vocab)
        steepness = None if softcap is None else 1 - (logits / softcap).square()
        log_probabilities = torch.log_softmax(logits, -1, out=logits)
        losses[part] = (-log_probabilities.gather(1, target) * learned)[:, 0]
        grad = log_probabilities.exp_()
        grad.scatter_add_(1, target, grad.new_full((1, 1), -1).expand_as(target))
        if steepness is not None:
            grad *= steepness
        grad = grad.to(matrix.dtype)
        if hidden_grad is not None:
            hidden_grad[part] = (grad @ matrix) * learned
        if matrix_grad is not None and matrix_grad.dtype == grad.dtype:
            matrix_grad.addmm_(grad.T, some * learned)
        elif matrix_grad is not None:
            matrix_grad += grad.T @ (some * learned)
    return losses, (hidden_grad, matrix_grad)


def _tokens_of_chunk(matrix: torch.Tensor) -> int:
    budget = _CHUNK_LOGITS.get(matrix.device.type, _CHUNK_LOGITS["cuda"])
    return max(16, budget // matrix.shape[0])


def _logits(hidden: torch.Tensor, matrix: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits of a chunk in float32 or wider, (tokens, vocab)."""
    logits = wide(hidden.to(matrix.dtype) @ matrix.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
