"""Output projection and cross entropy, fused and computed in chunks of tokens.

The logits of all tokens never exist at once. If gradients are needed, forward computes each chunk's
gradients right after its logits and frees the logits; backward only scales the accumulated gradients.

On CUDA one kernel writes a chunk's gradient over its logits, in their dtype; see loss_kernel.py. Where it
can't run, PyTorch's operators do the same: on a CPU they write log-probabilities over the logits, for which
CUDA's kernel doesn't promise a result. The target's 1 is subtracted by index, each element once: on CUDA
scatter_add depends on the order of threads.

Under autocast both ways round the logits to its dtype once, in the product, as an output layer outside of the
loss does, and compute in float32 from there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import why_not_here
from .norm import compute_dtype

IGNORED = -100

# Logits per chunk. Fewer mean more accumulations into the weight's gradient; more only take memory.
_CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
# Bytes of a chunk of logits that the kernel writes over: what the other way takes at its peak, in float32.
_CHUNK_BYTES = 2**30
# The release of PyTorch from which products of bfloat16 can be added to float32.
_ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, fused: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross entropy of ``softmax(hidden @ weight.T)``, in the dtype of autocast, summed in float32.

    It is differentiable once, with respect to ``hidden`` and ``weight``.

    Args:
        hidden: (tokens, d_model).
        weight: (vocab, d_model).
        targets: (tokens,) int64; -100 for tokens that are not in the loss.
        softcap: Logits become ``softcap * tanh(logit / softcap)``.
        fused: Use the kernel of `loss_kernel.py` for the gradients, where it can run.

    Returns:
        The mean over the tokens in the loss, a float32 scalar, 0 if there are none; each token's loss,
        (tokens,) float32, detached, 0 for tokens that are not in the loss; and, unless a gradient is
        needed, whether the target has the highest logit, (tokens,) bool.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    compute = _fused_losses_and_grads if fused and hidden.is_cuda else _losses_and_grads
    options = softcap, compute if wants_grad else None
    total, losses, correct = _LinearCrossEntropy.apply(hidden, weight, targets, *options)
    return total / (targets != IGNORED).sum().clamp_(min=1), losses, correct


def mean_cross_entropy(logits: Tensor, targets: Tensor, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    """The mean over the targets that are not `ignored`, 0 if there are none; and their number."""
    total = F.cross_entropy(wide(logits), targets, ignore_index=ignored, reduction="sum")
    count = (targets != ignored).sum()
    return total / count.clamp(min=1), count


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        compute: Callable[..., Any] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = compute_dtype(hidden) or hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            if compute is not None:
                correct, needs_grad = None, ctx.needs_input_grad[:2]
                losses, ctx.grads = compute(hidden, matrix, targets, softcap, needs_grad)
                ctx.dtypes = hidden.dtype, weight.dtype
            else:
                losses, correct = _losses(hidden, matrix, targets, softcap)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The loss can be differentiated once: its gradients were made in forward.")
        grads, ctx.grads = ctx.grads, None
        scaled = (
            None if x is None else x.mul_(grad).to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def _losses(hidden: Tensor, matrix: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Each token's loss, (tokens,) float32, and whether its target has the highest logit, (tokens,) bool."""
    step = _tokens_of_chunk(matrix)
    losses, correct = [], []
    for part, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = _logits(part, matrix, softcap)
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none"))
        correct.append(logits.argmax(-1) == target)
    return torch.cat(losses).float(), torch.cat(correct)


def _losses_and_grads(
    hidden: Tensor, matrix: Tensor, targets: Tensor, softcap: float | None, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
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


def _has_kernel(matrix: Tensor) -> bool:
    """Whether the kernel of `loss_kernel.py` runs on the matrix's GPU and in its dtype."""
    if matrix.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    capability = torch.cuda.get_device_capability(matrix.device)
    return why_not_here("triton", "cuda", str(matrix.dtype), capability) is None


def _fused_losses_and_grads(
    hidden: Tensor, matrix: Tensor, targets: Tensor, softcap: float | None, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """As `_losses_and_grads`; where the kernel runs, it writes a chunk's gradient over its logits."""
    if not _has_kernel(matrix):
        return _losses_and_grads(hidden, matrix, targets, softcap, needs_grad)
    from .loss_kernel import cross_entropy

    tokens = hidden.shape[0]
    hidden_grad = torch.empty_like(hidden) if needs_grad[0] else None
    wide = torch.promote_types(matrix.dtype, torch.float32)
    matrix_grad = torch.empty_like(matrix, dtype=wide) if needs_grad[1] else None
    losses = []
    chunks = max(1, -(-tokens * matrix.shape[0] * matrix.element_size() // _CHUNK_BYTES))
    for start, stop in pairwise(tokens * number // chunks for number in range(chunks + 1)):
        chunk = hidden[start:stop].to(matrix.dtype)
        logits = chunk @ matrix.T  # (tokens of the chunk, vocab), then their gradient
        losses.append(cross_entropy(logits, targets[start:stop], IGNORED, softcap or 0.0))
        if hidden_grad is not None:
            _multiply(logits, matrix, hidden_grad[start:stop], adds=False)
        if matrix_grad is not None:
            _multiply(logits.T, chunk, matrix_grad, adds=start > 0)
        del logits
    return torch.cat(losses), (hidden_grad, matrix_grad)


def _multiply(first: Tensor, second: Tensor, out: Tensor, *, adds: bool) -> None:
    """Write a product to ``out``, or add it; ``out`` may be wider than the factors."""
    if out.dtype == first.dtype:
        torch.addmm(out, first, second, out=out) if adds else torch.mm(first, second, out=out)
    elif _ADDS_TO_FLOAT32 and out.is_cuda and out.dtype == torch.float32:
        into: dict[str, Any] = {"out_dtype": out.dtype, "out": out}  # rounded once, in the sum
        torch.addmm(out, first, second, **into) if adds else torch.mm(first, second, **into)
    else:
        out.add_(first @ second) if adds else out.copy_(first @ second)


def _tokens_of_chunk(matrix: Tensor) -> int:
    budget = _CHUNK_LOGITS.get(matrix.device.type, _CHUNK_LOGITS["cuda"])
    return max(16, budget // matrix.shape[0])


def _logits(hidden: Tensor, matrix: Tensor, softcap: float | None) -> Tensor:
    """Logits of a chunk in float32 or wider, (tokens, vocab)."""
    logits = wide(hidden.to(matrix.dtype) @ matrix.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
