"""TensorBoard's events: one file for each start, in the run's folder, and only once the run begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from composer import Trainer

pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")

from mptfoundry.callbacks.tensorboard import TensorBoardFile


def events(folder: Path) -> list[Path]:
    return sorted(folder.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("log_dir", [None, "logs"])
def test_a_start_is_one_file_in_the_runs_folder(
    make_trainer: Callable[..., Trainer], tmp_path: Path, log_dir: str | None
) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    given = None if log_dir is None else str(tmp_path / log_dir)
    logger = TensorBoardFile(tmp_path / "run", log_dir=given, flush_interval=1)
    trainer = make_trainer(
        max_duration="4ba", with_eval=True, eval_interval="2ba", loggers=[logger], run_name="some"
    )
    trainer.logger.log_hyperparameters({"config": "model: {}"})
    assert events(tmp_path) == []
    trainer.fit()
    trainer.close()
    (file,) = events(tmp_path)
    assert file.parent == (
        tmp_path / "run" / "tensorboard" if log_dir is None else tmp_path / "logs" / "some"
    )
    found = [
        (value.tag, event.step)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert {step for tag, step in found if tag == "loss/train/total"} == {0, 1, 2, 3}
    assert any(tag == "metrics/held_out/LanguageCrossEntropy" for tag, _ in found)
    assert any("hparams" in tag for tag, _ in found)
