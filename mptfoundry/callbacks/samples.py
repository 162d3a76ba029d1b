"""Texts that the model generates during training, from the user's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.core import Callback, Event, State, get_precision_context
from composer.loggers import Logger, TensorboardLogger
from composer.utils import create_interval_scheduler, model_eval_mode

from mptfoundry.errors import ConfigError
from mptfoundry.ranks import rank

COLUMNS = ["batch", "prompt", "generation"]


class Generate(Callback):
    """Lets the network continue prompts at an interval, prints the texts, and logs them as `generations`.

    Loggers get a table of `batch`, `prompt` and `generation`. TensorBoard, which has no tables, gets text.

    Every rank takes part, because a sharded network needs them all. The run's random state doesn't change:
    training with and without generations gives the same weights.

    Args:
        generate: Called with the network and the prompts; returns one text for each prompt.
        prompts: The texts to continue.
        interval: How often, such as `100ba` or `1ep`; it also runs at the end of training.
    """

    # See run.step_guard: generation would take time that the last checkpoint needs.
    skipped_when_stopping = True

    def __init__(
        self,
        generate: Callable[[torch.nn.Module, Sequence[str]], Sequence[str]],
        prompts: Sequence[str],
        *,
        interval: str | int = "1ep",
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(
                "callbacks.generate_callback.prompts: no prompts. Give a list of one text or more."
            )
        self.generate = generate
        self.prompts = list(prompts)
        self._generated_at = -1
        self._is_due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Generate if an interval in batches, samples or tokens is over."""
        self._generate_if_due(Event.BATCH_END, state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Generate if an interval in epochs is over."""
        self._generate_if_due(Event.EPOCH_END, state, logger)

    def _generate_if_due(self, event: Event, state: State, logger: Logger) -> None:
        # Training may end at the end of a batch and of an epoch at the same time.
        if not self._is_due(state, event) or self._generated_at == int(state.timestamp.batch):
            return
        self._generated_at = int(state.timestamp.batch)
        model: Any = state.model.module if state.is_model_ddp else state.model
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            model_eval_mode(state.model),
            get_precision_context(state.precision, state.precision_config),
        ):
            texts = list(self.generate(model.model, self.prompts))
        batch = int(state.timestamp.batch)
        rows = [[batch, prompt, text] for prompt, text in zip(self.prompts, texts, strict=True)]
        logger.log_table(COLUMNS, rows, name="generations")
        if rank() != 0:
            return
        for destination in logger.destinations:
            if isinstance(destination, TensorboardLogger) and destination.writer is not None:
                destination.writer.add_text("generations", markdown(COLUMNS, rows), global_step=batch)
        for _, prompt, text in rows:
            print(f"[batch {batch}]  {prompt!r} -> {text!r}", flush=True)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; each text stays on one line in its cell."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(cell).replace("|", "\\|").replace("\n", "\\n") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
