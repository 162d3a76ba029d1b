from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError

SMALL = """\
max_seq_len: 128
model:
  name: mpt_causal_lm
  d_model: 64
  n_heads: 4
  n_layers: 2
  attn_config:
    alibi: true
tokenizer:
  name: tok
train_loader:
  name: text
  dataset:
    streams:
      code: {local: data/code, proportion: 0.7}
      prose: {local: data/prose, proportion: 0.3}
optimizer:
  name: decoupled_lionw
  lr: 1e-4
scheduler:
  name: cosine_with_warmup
  t_warmup: 10ba
max_duration: 100ba
global_train_batch_size: 8
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a launcher or a shell may have set."""
    for name in ("RUN_NAME", "COMPOSER_RUN_NAME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a YAML of the small run, with replacements and more lines, and returns its relative name."""
    monkeypatch.chdir(tmp_path)

    def write_file(*more: str, text: str = SMALL, name: str = "run.yaml", **replaced: str) -> str:
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        Path(name).write_text(text + "".join(f"{line}\n" for line in more), encoding="utf-8")
        return name

    return write_file


@pytest.fixture
def load(write: Callable[..., str]) -> Callable[..., TrainConfig]:
    """The configuration of the small run with more lines and with words of the command line."""

    def load_file(*more: str, words: tuple[str, ...] = (), text: str = SMALL) -> TrainConfig:
        return load_train_config(write(*more, text=text), words)[0]

    return load_file


@pytest.fixture
def problems(write: Callable[..., str]) -> Callable[..., tuple[str, ...]]:
    """All problems of the small run with more lines and with words of the command line."""

    def find(*more: str, words: tuple[str, ...] = (), text: str = SMALL) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            load_train_config(write(*more, text=text), words)
        return caught.value.problems

    return find
