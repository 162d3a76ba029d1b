"""`compare` of runs: what differs in their configs, their losses at equal tokens, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mptfoundry.cli import main
from mptfoundry.config.load import load_train_config, to_yaml

CONFIG = Path(__file__).parent.parent.parent / "configs" / "mpt-tiny.yaml"

Capture = pytest.CaptureFixture[str]


def write_run(folder: Path, *words: str, steps: int = 100, per_step: int = 1000, floor: float = 4.0) -> Path:
    """A run as it is on disk, whose loss falls from 9 to `floor` and that is evaluated every 10 steps."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    config, _ = load_train_config(CONFIG, words)
    (folder / "config.yaml").write_text(to_yaml(config))
    rows: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        loss = floor + (9 - floor) / step
        row = {"batch": step, "tokens": step * per_step, "seconds": 1.0 * step}
        rows.append({**row, "loss": loss})
        if step % 10 == 0:
            rows.append(
                {**row, "eval": {"val": {"LanguageCrossEntropy": loss + 0.5, "bits_per_byte": loss / 4}}}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compared(capsys: Capture, *words: str | Path, code: int = 0) -> str:
    assert main(["compare", *map(str, words)]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def test_a_sweep_is_told_by_what_differs_and_by_its_losses(tmp_path: Path, capsys: Capture) -> None:
    rates = {"1e-3": 4.0, "2e-3": 3.8, "4e-3": 4.3}
    runs = [
        write_run(tmp_path / f"lr-{rate}", f"optimizer.lr={rate}", floor=loss) for rate, loss in rates.items()
    ]
    lines = [line.split() for line in compared(capsys, *runs).splitlines()]
    assert ["optimizer.lr", "0.001", "0.002", "0.004"] in lines
    assert not any(line[:1] in (["run_name"], ["save_folder"], ["seed"]) for line in lines)
    assert [
        "lr-2e-3",
        "100,000",
        "3.8531",
        "4.3520",
    ] in lines  # the mean over 5 steps, and the last evaluation


@pytest.mark.pictures
def test_losses_are_compared_at_equal_tokens_and_drawn(tmp_path: Path, capsys: Capture) -> None:
    short = write_run(tmp_path / "short", steps=50)
    long = write_run(tmp_path / "long", steps=60, per_step=2000, floor=3.0)
    picture = tmp_path / "losses.png"
    text = compared(capsys, short, long, f"picture={picture}")
    assert "loss at 50,000" in text and "eval val at 40,000" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("long"))
    assert row[:2] == ["long", "120,000"]
    assert row[4:] == ["3.2400", "3.8000"]  # steps 25 and 20
    assert picture.stat().st_size > 10_000


def test_other_tokenizers_are_compared_by_bits_per_byte_alone(tmp_path: Path, capsys: Capture) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    (runs[1] / "tokenizer" / "tokenizer.json").write_text("another")
    text = compared(capsys, *runs)
    assert "val bits_per_byte" in text and "eval val" not in text
    assert "note: their tokenizers differ" in text


def test_what_is_not_two_runs_is_refused_in_a_sentence(tmp_path: Path, capsys: Capture) -> None:
    run, empty = write_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    assert "is neither a run" in compared(capsys, run, empty, code=1)
    assert "there is no such file or folder" in compared(capsys, run, tmp_path / "nowhere", code=1)
    assert "has no steps" in compared(capsys, run, tmp_path / "new", code=1)
    assert ": 1 named. Name two runs" in compared(capsys, run, code=2)
    assert "fail_if: is for evaluations" in compared(capsys, run, run, "fail_if=worse", code=2)
    assert "is not a picture" in compared(capsys, run, run, "picture=losses.gif", code=2)
    assert "can't be written" in compared(
        capsys, run, run, f"picture={tmp_path}/run/config.yaml/x.png", code=1
    )
