"""What all ranks decide together at each step, before the weights change: take it, skip it, stop or fail.

Each rank contributes three numbers: whether it was asked to stop, whether its loss is not finite, and its
loss. One small collective after that of the gradients sums them over the ranks, and we read them together
with the gradient norm right before Composer reads the loss. So there is no extra synchronization, and all
ranks decide on the same values. On a request to stop, training ends after the batch in Composer's own way: it
writes a checkpoint, and skips everything else that comes at the end of a run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import Any

import torch
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from mptfoundry.errors import TrainingError
from mptfoundry.ranks import RankWatch, say, world_size
from mptfoundry.run.signals import StopSignals

LAUNCHER_SECONDS = 30.0
SHOWN_LOSSES, SHOWN_SAMPLES = 8, 16


class EvaluationLeft(Exception):
    """The run was asked to stop during an evaluation; raised on all ranks at the same batch."""


class StepGuard(Callback):
    """Guards each step of training.

    Args:
        signals: Tells whether this process was asked to stop.
        watch: Receives this rank's progress.

    Attributes:
        is_stopping: All ranks stop at the end of this batch.
        owes_evaluation: An evaluation was due where the run stopped, and was skipped. The checkpoint records
            this, and the evaluation runs when the run continues.

    Raises:
        TrainingError: At a step whose loss or gradient is not finite, or whose loss is out of bounds. On all
            ranks, with the same text, and with the weights from before the step.
        EvaluationLeft: Within an evaluation, when the run is asked to stop.
    """

    def __init__(self, signals: StopSignals, watch: RankWatch) -> None:
        self.is_stopping = self.owes_evaluation = False
        self.signals = signals
        self._watch = watch
        self._spikes: Any = None
        self._clipping: Any = None
        self._losses: list[Tensor] = []
        self._recent: deque[float] = deque(maxlen=SHOWN_LOSSES)
        self._started_at = 0.0
        self._steps: deque[float] = deque(maxlen=5)
        self._saver: Any = None
        self._has_warned = False

    def init(self, state: State, logger: Logger) -> None:
        """Find the callbacks that judge losses, measure the gradient norm, and save."""
        self._spikes = next(c for c in state.callbacks if hasattr(c, "judge"))
        self._clipping = next(a for a in state.algorithms if hasattr(a, "grad_norm"))
        self._saver = next((c for c in state.callbacks if hasattr(c, "save_seconds")), None)
        self._watch.batch = lambda: state.timestamp.batch.value

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start timing the step."""
        self._started_at = time.monotonic()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Clear the losses of the previous batch, or of an attempt that ran out of memory."""
        self._losses = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keep the microbatch's loss, on its device."""
        assert isinstance(state.loss, Tensor)
        self._losses.append(state.loss.detach().float().mean())

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Decide after the gradients are computed and before the weights change."""
        own = torch.stack(self._losses).mean()
        told = torch.stack([own, torch.full_like(own, self.signals.requested is not None)])
        if world_size() > 1:
            dist.all_reduce(told)
        norm = self._clipping.grad_norm
        told = told if norm is None else torch.cat([told, norm.to(told).reshape(1)])
        total, asked_by, *norms = told.tolist()
        self._clipping.grad_norm = norms[0] if norms else None
        loss = total / world_size()
        # With a gradient scaler, an overflow only lowers the scale.
        is_scaled = state.precision == Precision.AMP_FP16
        if not (math.isfinite(total) and (is_scaled or all(map(math.isfinite, norms)))):
            raise TrainingError(self._what_broke(state, own, norms))
        if verdict := self._spikes.judge(loss):
            self._obey(verdict, loss, state, logger)
        self._recent.append(loss)
        if asked_by:
            self._stop(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop after this batch, or record how long it took."""
        if self.is_stopping:
            self._end_training(state)
        else:
            self._steps.append(time.monotonic() - self._started_at)
            step, save = statistics.median(self._steps), self._saver.save_seconds if self._saver else 0.0
            if step + save > LAUNCHER_SECONDS and len(self._steps) >= 3:
                self._warn_of_a_slow_stop(step, save)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Leave the evaluation if any rank was asked to stop."""
        asked = state.device.tensor_to_device(torch.tensor(float(self.signals.requested is not None)))
        dist.all_reduce(asked)
        if asked.item():
            self._stop(state)
            self.owes_evaluation = True
            raise EvaluationLeft

    def state_dict(self) -> dict[str, Any]:
        """Return whether an evaluation is still due."""
        return {"owes_evaluation": self.owes_evaluation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load that from a checkpoint."""
        self.owes_evaluation = state["owes_evaluation"]

    def _end_training(self, state: State) -> None:
        is_last = state.max_duration is not None and state.timestamp >= state.max_duration
        due = [each.eval_interval(state, Event.BATCH_END) for each in state.evaluators]  # type: ignore[misc]
        self.owes_evaluation = bool(due) and (is_last or any(due))
        state.evaluators = []
        state.stop_training()

    def _stop(self, state: State) -> None:
        self.is_stopping = True
        # Callbacks that only show progress would take time that the checkpoint needs.
        state.callbacks = [c for c in state.callbacks if not getattr(c, "skipped_when_stopping", False)]

    def _obey(self, verdict: Any, loss: float, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value + 1
        if verdict.stops:
            raise TrainingError(
                f"batch {batch}: {verdict.text}. Its step was not taken. Continue from a checkpoint before "
                "the rise, with a lower optimizer.lr or with callbacks.kill_loss_spike.skip_batch: true."
            )
        logger.log_metrics({"loss_spike": loss})
        say(f"batch {batch}: {verdict.text}{'; its step is left out' if verdict.skips else ''}")
        if verdict.skips:
            for parameter in state.model.parameters():
                parameter.grad = None

    def _what_broke(self, state: State, own: Tensor, norms: list[float]) -> str:
        """Return the error's text, the same on all ranks, which gather their losses once more for it."""
        ids = state.batch.get("sample_id", torch.empty(0)).flatten().tolist()
        ranks = dist.all_gather_object((own.item(), ids))
        bad = [(rank, loss, ids) for rank, (loss, ids) in enumerate(ranks) if not math.isfinite(loss)]
        if bad:
            shown = ", ".join(f"{loss} on rank {rank}{_samples(ids)}" for rank, loss, ids in bad[:4])
            more = f" and on {len(bad) - 4} more ranks" if len(bad) > 4 else ""
            what = f"the loss is {shown}{more}"
        else:
            what = f"the gradient's norm is {norms[0]}, while the loss is finite on every rank"
        before = ", ".join(f"{loss:.4g}" for loss in self._recent) or "none"
        return (
            f"batch {state.timestamp.batch.value + 1}: {what}. The weights are as they were before it, and "
            f"nothing was saved. Losses before: {before}. Continue from the newest checkpoint with a lower "
            "optimizer.lr, with algorithms.gradient_clipping, or look at these samples."
        )

    def _warn_of_a_slow_stop(self, step: float, save: float) -> None:
        if not self._has_warned:
            self._has_warned = True
            say(
                f"note: a stop takes a step, {step:.0f} s, and a save, {save:.0f} s. The launcher kills "
                f"{LAUNCHER_SECONDS:g} s after SIGTERM, and the run continues from an older checkpoint. "
                "Start the ranks without it, with a longer grace, or save more often."
            )


def _samples(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN_SAMPLES]))
    return f" (samples {shown}{', ...' if len(ids) > SHOWN_SAMPLES else ''})" if ids else ""
