"""Output projection and cross entropy, fused and computed in chunks of tokens.

The logits of all tokens never exist at once. If gradients are needed, forward computes each chunk's
gradients right after its logits and frees the logits; backward only scales the accumulated gradients.

Log-probabilities are written over the logits on a CPU alone: CUDA's kernel doesn't promise a result for that.
The target's 1 is subtracted by index, each element once: on CUDA scatter_add depends on the order of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .norm import compute_dtype

IGNORED = -100

# Logits per chunk. Fewer mean more accumulations into the weight's gradient; more only take memory.
_CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross entropy of ``softmax(hidden @ weight.T)``, in the dtype of autocast, summed in float32.

    It is differentiable once, with respect to ``hidden`` and ``weight``.

    Args:
        hidden: (tokens, d_model).
        weight: (vocab, d_model).
        targets: (tokens,) int64; -100 for tokens that are not in the loss.
        softcap: Logits become ``softcap * tanh(logit / softcap)``.

    Returns:
        The mean over the tokens in the loss, a float32 scalar, 0 if there are none; each token's loss,
        (tokens,) float32, detached, 0 for tokens that are not in the loss; and, unless a gradient is
        needed, whether the target has the highest logit, (tokens,) bool.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, losses, correct = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, wants_grad)
    return total / (targets != IGNORED).sum().clamp_(min=1), losses, correct


def mean_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the targets that are not `ignored`, 0 if there are none; and their number."""
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
                correct, needs_grad = None, ctx.needs_input_grad[:2]
                losses, ctx.grads = _losses_and_grads(hidden, matrix, targets, softcap, needs_grad)
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
    for part, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = _logits(part, matrix, softcap)
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none"))
        correct.append(logits.argmax(-1) == target)
    return torch.cat(losses).float(), torch.cat(correct)


def _losses_and_grads(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    needs_grad: tuple[bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Each token's loss, (tokens,) float32, and the gradients of their sum.

    Those are of ``hidden`` and of ``matrix``, the latter float32 or wider; None if ``needs_grad`` is False.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    step = _tokens_of_chunk(matrix)
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if needs_grad[0] else None
    matrix_grad = torch.zeros_like(matrix, dtype=wide) if needs_grad[1] else None
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        chunk = hidden[part].to(matrix.dtype)
        in_loss = (targets[part] != IGNORED)[:, None]
        target = targets[part].clamp(min=0)[:, None]
        logits = _logits(chunk, matrix, softcap)  # (tokens of the chunk, vocab)
        tanh_grad = None if softcap is None else 1 - (logits / softcap).square()
        logits = torch.log_softmax(logits, -1, out=logits if logits.is_cpu else None)  # now log-probabilities
        losses[part] = (-logits.gather(1, target) * in_loss)[:, 0]
        grad = logits.exp_()
        grad[torch.arange(len(target), device=target.device), target[:, 0]] -= 1
        if tanh_grad is not None:
            grad *= tanh_grad
        grad = grad.to(matrix.dtype)
        del logits
        if hidden_grad is not None:
            hidden_grad[part] = (grad @ matrix) * in_loss
        if matrix_grad is not None and matrix_grad.dtype == grad.dtype:
            matrix_grad.addmm_(grad.T, chunk * in_loss)
        elif matrix_grad is not None:
            matrix_grad += grad.T @ (chunk * in_loss)
        del grad
    return losses, (hidden_grad, matrix_grad)


def _tokens_of_chunk(matrix: torch.Tensor) -> int:
    budget = _CHUNK_LOGITS.get(matrix.device.type, _CHUNK_LOGITS["cuda"])
    return max(16, budget // matrix.shape[0])


def _logits(hidden: torch.Tensor, matrix: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits of a chunk in float32 or wider, (tokens, vocab)."""
    logits = wide(hidden.to(matrix.dtype) @ matrix.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
