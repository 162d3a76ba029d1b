from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, Precision, State
from composer.loggers import InMemoryLogger, Logger

from mptfoundry.callbacks.loss_spikes import LossSpikes
from mptfoundry.errors import TrainingError
from mptfoundry.ranks import RankWatch
from mptfoundry.run.signals import StopSignals
from mptfoundry.run.step_guard import EvaluationLeft, StepGuard

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("loss or gradient not finite; overflow under fp16", "in one process, 3", "weights unchanged; no error"),
    ("a loss spike", "loss times 5, 3", "reported, skipped, or ends the run, as configured"),
]

MakeTrainer = Callable[..., Trainer]


class At(Callback):
    """Does something at a batch's event."""

    def __init__(self, event: str, batch: int, act: Callable[[State], None]) -> None:
        self._batch, self._act = batch, act
        setattr(self, event, self._run)

    def _run(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self._batch:
            self._act(state)


def guarded(make_trainer: MakeTrainer, *others: Callback, **options: Any) -> tuple[Trainer, StepGuard]:
    guard = StepGuard(StopSignals(), RankWatch(10))
    spikes = [] if any(isinstance(each, LossSpikes) for each in others) else [LossSpikes()]
    trainer = make_trainer(callbacks=[guard, *others, *spikes], **options)
    # Last, so that it sees what the others have done to a loss.
    trainer.state.callbacks = sorted(trainer.state.callbacks, key=lambda each: isinstance(each, StepGuard))
    return trainer, guard


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.state.model.parameters()]


def lose(state: State) -> None:
    state.loss.mul_(float("nan"))  # type: ignore[union-attr]


def break_a_gradient(state: State) -> None:
    next(parameter for parameter in state.model.parameters() if parameter.grad is not None).grad[0] = float(
        "inf"
    )  # type: ignore[index]


@pytest.mark.parametrize(
    ("event", "breaks", "said"),
    [
        ("before_backward", lose, r"batch 3: the loss is nan on rank 0 \(samples [\d, ]+\)"),
        (
            "after_backward",
            break_a_gradient,
            r"batch 3: the gradient's norm is inf, while the loss is finite",
        ),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_before_the_weights_change(
    make_trainer: MakeTrainer, tmp_path: Any, event: str, breaks: Callable[[State], None], said: str
) -> None:
    seen: list[list[torch.Tensor]] = []
    look = At("before_train_batch", 2, lambda state: seen.append(weights(trainer)))
    trainer, _ = guarded(make_trainer, At("after_loss" if breaks is lose else event, 2, breaks), look)
    with pytest.raises(TrainingError, match=rf"{said}.* Losses before: \d\.\d+, \d\.\d+\. "):
        trainer.fit()
    assert all(torch.equal(one, other) for one, other in zip(seen[0], weights(trainer), strict=True))


def test_under_a_gradient_scaler_an_overflow_is_no_error(make_trainer: MakeTrainer) -> None:
    def overflow(state: State) -> None:
        break_a_gradient(state)
        # A CPU has no fp16 training; the guard is told that this is one.
        state._precision = Precision.AMP_FP16

    def settle(state: State) -> None:
        state._precision = Precision.FP32

    trainer, _ = guarded(make_trainer, At("after_backward", 2, overflow), At("batch_end", 3, settle))
    trainer.fit()
    assert trainer.state.timestamp.batch == 6


def test_a_guarded_training_has_the_weights_of_one_that_is_not(make_trainer: MakeTrainer) -> None:
    plain = make_trainer()
    plain.fit()
    trainer, _ = guarded(make_trainer)
    trainer.fit()
    assert all(torch.equal(one, other) for one, other in zip(weights(plain), weights(trainer), strict=True))


def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(make_trainer: MakeTrainer) -> None:
    before: list[Any] = []

    def note(state: State) -> None:
        before.append((weights(trainer), [dict(each) for each in optimizer_states(state)]))

    def rise(state: State) -> None:
        state.loss.mul_(5)  # type: ignore[union-attr]

    memory = InMemoryLogger()
    trainer, _ = guarded(
        make_trainer,
        At("after_loss", 4, rise),
        At("before_train_batch", 4, note),
        At("batch_end", 5, note),
        LossSpikes(window_size=3, skip_batch=True),
        loggers=[memory],
    )
    trainer.fit()
    (old, old_moments), (new, new_moments) = before
    assert all(torch.equal(one, other) for one, other in zip(old, new, strict=True))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(old_moments, new_moments, strict=True))
    assert [int(time.batch) for time, _ in memory.data["loss_spike"]] == [4]
    assert trainer.state.timestamp.batch == 6


def optimizer_states(state: State) -> list[dict[str, torch.Tensor]]:
    return [
        {name: value.clone() for name, value in each.items() if isinstance(value, torch.Tensor)}
        for each in state.optimizers[0].state.values()
    ]


def test_a_spike_ends_the_run_where_that_is_asked_for(make_trainer: MakeTrainer) -> None:
    spikes = LossSpikes(window_size=3, patience=0, log_only=False)
    rise = At("after_loss", 4, lambda state: state.loss.mul_(5))  # type: ignore[union-attr]
    trainer, _ = guarded(make_trainer, rise, spikes)
    with pytest.raises(TrainingError, match=r"batch 5: loss spike: .* Its step was not taken."):
        trainer.fit()


def test_a_request_is_answered_at_the_end_of_its_batch_with_a_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    def ask(state: State) -> None:
        guard.signals.requested = "SIGTERM"

    options = {
        "save_folder": str(tmp_path),
        "save_interval": "100ba",
        "with_eval": True,
        "eval_interval": "3ba",
    }
    trainer, guard = guarded(make_trainer, At("before_forward", 2, ask), **options)
    evaluated: list[int] = []
    trainer.state.callbacks.append(At("eval_start", 3, lambda state: evaluated.append(3)))
    trainer.fit()
    assert guard.is_stopping and trainer.state.timestamp.batch == 3
    assert (tmp_path / "ep0-ba3-rank0.pt").is_file() and not evaluated


def test_an_evaluation_is_left_when_a_request_comes(make_trainer: MakeTrainer) -> None:
    trainer, guard = guarded(make_trainer, with_eval=True, eval_interval="2ba")
    seen: list[int] = []

    def ask(state: State) -> None:
        seen.append(int(state.eval_timestamp.batch))
        guard.signals.requested = "SIGTERM"

    trainer.state.callbacks.append(At("eval_batch_start", 2, ask))
    with pytest.raises(EvaluationLeft):
        trainer.fit()
    assert seen == [0] and guard.is_stopping


def test_a_stop_that_takes_longer_than_the_launcher_waits_is_said_once(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mptfoundry.run.step_guard.LAUNCHER_SECONDS", 0.0)
    trainer, _ = guarded(make_trainer)
    trainer.fit()
    said = re.findall(r"note: a stop takes a step, \d+ s, and a save, \d+ s\.", capsys.readouterr().out)
    assert len(said) == 1
