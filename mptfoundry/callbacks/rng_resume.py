"""A run that is resumed in the middle of an epoch draws the random numbers of one that was never stopped.

Composer saves the random state with a checkpoint. On a resume it restores it where an epoch begins, or while
it skips the batches that have been seen. StreamingDataset resumes by itself, so there is nothing to skip, and
the state stays at the seed: dropout differs from the first batch on. Here the state is restored where
training really goes on: right before the first batch's forward, or, if the checkpoint lies at an epoch's very
end, at that end.
"""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger
from composer.trainer import Trainer
from composer.utils import reproducibility


class RestoreRandomState(Callback):
    """Restores, once, what the trainer has loaded and not restored itself.

    Args:
        trainer: The trainer, after its construction, which loads the checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def batch_start(self, state: State, logger: Logger) -> None:
        """Restore before the first batch, after whatever the loader drew when it was opened."""
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Restore at the end of an epoch that had no batch left."""
        self._restore()

    def _restore(self) -> None:
        if self._trainer._rng_state is not None:
            reproducibility.load_rng_state(self._trainer._rng_state)
            self._trainer._rng_state = None


def restore_random_state(trainer: Trainer) -> None:
    """Let `trainer` go on with the random state of the checkpoint that it has loaded, if any.

    Call it between the trainer's construction and `fit`.
    """
    trainer.state.callbacks.append(RestoreRandomState(trainer))
