from __future__ import annotations

import re
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.table import summary_table

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Device("cpu", "CPU", memory=16 * GIB, found="no GPU found")


def a100s(count: int) -> Device:
    return Device("gpu", "A100", count, 8, 40 * GIB, 312e12, True)


def load(name: str, *words: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"{name}.yaml", words)[0]


def test_the_table_says_what_the_run_is() -> None:
    table = summary_table(load("mpt-7b"), a100s(440))
    assert "6,649,286,656 parameters" in table and "ALiBi" in table
    assert "1760 sequences of 2048: 3,604,480 tokens" in table
    assert "decoupled_lionw: up to 3e-05 over 2000ba, then along a cosine to 3e-06 at the end" in table
    assert re.search(r"33\.00%  mc4 +s3://my-bucket/mpt-7b-data/mc4/train", table)
    assert re.search(r"run folder +runs/mpt-7b\n", table)
    assert re.search(r"precision += amp_bf16", table)
    assert "assumed, not measured" in table


def test_the_table_of_a_run_counted_in_epochs_says_what_is_missing() -> None:
    table = summary_table(load("mpt-tiny", "max_duration=3ep"), CPU)
    assert "3 epochs; how many batches depends on the size of the data" in table
    assert "not known before it is measured" in table


def test_what_is_given_is_not_listed_as_auto() -> None:
    table = summary_table(load("mpt-tiny", "precision=fp32", "device_train_microbatch_size=4"), CPU)
    auto = table.split("auto, here\n")[1]
    assert "precision" not in auto and "device_train_microbatch_size" not in auto
    assert "attn_impl" in auto


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("{name: constant_with_warmup, t_warmup: 5ba}", "up to 0.001 over 5ba, then 0.001"),
        (
            "{name: linear_decay_with_warmup, t_warmup: 5ba, alpha_f: 0.1}",
            "then along a line to 0.0001 at the end",
        ),
        (
            "{name: warmup_stable_decay, t_warmup: 5ba, t_decay: 20ba}",
            "level, in the last 20ba falling (linear) to 0 at the end",
        ),
        (
            "{name: inv_sqrt_with_warmup, t_warmup: 5ba, t_scale: 9ba, t_cooldown: 7ba}",
            "falling as 1 / sqrt(time) on the scale of 9ba, in the last 7ba to 0 at the end",
        ),
    ],
)
def test_every_schedule_is_told_in_words(schedule: str, words: str, tmp_path: Path) -> None:
    text = (CONFIGS / "mpt-tiny.yaml").read_text()
    section = re.compile(r"^scheduler:\n(?:  .*\n)+", re.MULTILINE)
    (tmp_path / "run.yaml").write_text(section.sub(f"scheduler: {schedule}\n", text))
    assert words in summary_table(load_train_config(tmp_path / "run.yaml")[0], CPU)


def test_a_remote_save_folder_is_named_beside_the_local_one() -> None:
    table = summary_table(load("mpt-tiny", "save_folder=s3://bucket/{run_name}"), CPU)
    assert "runs/mpt-tiny, checkpoints in s3://bucket/mpt-tiny" in table


def test_a_tokenizer_on_this_machine_is_looked_at(adding_tokenizers: dict[str, str]) -> None:
    for adds, text in {
        "nothing": "adds no special tokens by itself",
        "bos": "adds <s> before each text by itself",
        "both": "adds <s> before and </s> after each text by itself",
    }.items():
        table = summary_table(load("mpt-tiny", f"tokenizer.name={adding_tokenizers[adds]}"), CPU)
        assert re.search(rf"^  tokenizer +{adding_tokenizers[adds]} {text}$", table, re.M)
    assert "by itself" not in summary_table(load("mpt-tiny", "tokenizer.name=not/here"), CPU)
