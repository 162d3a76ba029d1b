from __future__ import annotations

import re
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.plan import make_plan, summary_table

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Device("cpu", "CPU", memory=16 * GIB, found="no GPU found")


def a100s(count: int) -> Device:
    return Device("gpu", "A100", count, 8, 40 * GIB, 312e12, True)


def load(name: str, *words: str) -> TrainConfig:
    return load_train_config(CONFIGS / f"{name}.yaml", words)[0]


def test_mpt_7b_is_planned_as_it_was_published() -> None:
    plan = make_plan(load("mpt-7b"), a100s(440))
    assert plan.parameters == 6_649_286_656
    assert plan.tokens_per_batch == 1760 * 2048
    assert plan.batches == -(-(10**12) // (1760 * 2048))
    assert plan.flops_per_token == 6 * 6_649_286_656 + 12 * 32 * 4096 * 2048
    assert plan.causal_flops_per_token == 6 * 6_649_286_656 + 6 * 32 * 4096 * 2048
    assert plan.tokens is not None and plan.flops == plan.tokens * plan.flops_per_token


def test_published_days_follow_from_a_usual_utilisation() -> None:
    """9.5 days on 440 A100-40GB is an MFU of 38 %."""
    seconds = make_plan(load("mpt-7b"), a100s(440)).seconds(0.38)
    assert seconds is not None and seconds / 86400 == pytest.approx(9.5, rel=0.02)


def test_no_time_is_known_where_the_peak_of_the_device_is_not() -> None:
    assert make_plan(load("mpt-tiny", "max_duration=100ba"), CPU).seconds(0.4) is None


@pytest.mark.parametrize(
    ("duration", "batches"),
    [("100ba", 100), ("409600tok", 100), ("409601tok", 101), ("1600sp", 100), ("2ep", None), ("60sec", None)],
)
def test_batches_follow_from_every_unit_that_does_not_need_the_data(
    duration: str, batches: int | None
) -> None:
    assert make_plan(load("mpt-tiny", f"max_duration={duration}"), CPU).batches == batches


def test_epochs_of_a_given_size_have_a_known_length() -> None:
    for size in ("1000", "1k"):
        config = load("mpt-tiny", "max_duration=2ep", f"train_loader.dataset.epoch_size={size}")
        assert make_plan(config, CPU).batches == 2 * 62


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
