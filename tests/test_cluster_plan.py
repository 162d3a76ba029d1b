"""`mptfoundry plan`: what a run takes on clusters that are elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mptfoundry.check import look_here
from mptfoundry.cli import main
from mptfoundry.cluster_plan import plan_clusters
from mptfoundry.config.load import load_train_config
from mptfoundry.config.verbs import PlanConfig
from mptfoundry.forecast.run_cost import expected_goodput, run_length, times_in_run

CONFIGS = Path(__file__).parent.parent / "configs"
Plan = Callable[..., str]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """What `mptfoundry plan` prints for a config that ships."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, *words: str) -> str:
        assert main(["plan", str(CONFIGS / f"{name}.yaml"), *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table, each with the cells after its name."""
    lines = text.split(f"{title}")[1].splitlines()[1:]
    table = [re.split(r"\s{2,}", line.strip()) for line in lines[: lines.index("") if "" in lines else None]]
    return {cells[0]: cells[1:] for cells in table}


def number(cell: str) -> float:
    return float(re.sub(r"[$,%a-z]|\(.*", "", cell))


def test_a_line_for_each_cluster_says_time_and_cost(plan: Plan) -> None:
    text = plan("mpt-7b", "gpus=88,440", "gpu=a100-40gb,h100", "dollars_per_gpu_hour=1.5,2.5", "goodput=1")
    assert "6,649,286,656 parameters" in text and "4.312e+10, 4.151e+10 if causal" in text
    rows = rows_of(text, "fastest setting that fits")
    assert list(rows)[1:] == ["88 x a100-40gb", "440 x a100-40gb", "88 x h100", "440 x h100"]
    for name, cells in list(rows.items())[1:]:
        speed, days, hours, dollars = (number(cells[n]) for n in (4, 6, 7, 9))
        price = 1.5 if "a100" in name else 2.5
        assert dollars == pytest.approx(price * hours, rel=0.01)
        assert hours == pytest.approx(days * 24 * int(name.split()[0]), rel=0.01)
        assert days >= 1e12 / speed / 86400 * 0.99
    # 9.5 days were published.
    assert 7 < number(rows["440 x a100-40gb"][6]) < 10
    assert "\nhere:" not in text and "estimate may be off by 20%" in text
    assert re.search(r"cheapest by cost: 88 x h100: .*device_train_microbatch_size=\d+", text)


def test_the_words_that_it_proposes_give_a_config_that_setting(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan("mpt-30b", "gpus=192", "gpu=h100", "global_train_batch_size=1536")
    [line] = [line for line in text.splitlines() if line.startswith("cheapest")]
    words = line.split(": ")[2].split()
    again = plan("mpt-30b", "gpus=192", "gpu=h100", "global_train_batch_size=1536", *words)
    assert "192 x h100: as the config says" in again
    command = ["check", str(CONFIGS / "mpt-30b.yaml"), "gpu=h100", "gpus=192", "global_train_batch_size=1536"]
    assert main([*command, *words]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_memory_is_a_table_by_part_and_policy(plan: Plan) -> None:
    text = plan("mpt-7b", "gpus=88", "gpu=h100")
    rows = rows_of(text, "memory of 88 x h100, sharding FULL_SHARD")
    assert list(rows)[:8] == [
        "GiB of a GPU, activations:",
        *("weights", "gradients", "optimizer", "gathered", "activations", "logits", "overhead"),
    ]
    total = next(cells for name, cells in rows.items() if name.startswith("total"))
    for n in range(3):
        parts = [float(cells[n]) for name, cells in list(rows.items())[1:9]]
        assert sum(parts) == pytest.approx(float(total[n]), abs=0.05)
    kept, recomputed, offloaded = map(int, rows["largest microbatch"])
    assert kept < recomputed <= offloaded


def test_a_gpu_that_was_never_measured_is_said_to_be_an_estimate(plan: Plan) -> None:
    text = plan("mpt-7b", "gpus=88", "gpu=b200")
    assert "an estimate: those of the h100" in text and "may be off by 30%" in text
    text = plan("mpt-125m", "gpus=8", "gpu=v100-32gb", "global_train_batch_size=256")
    assert "no estimate: precision is fp32" in text


def test_what_does_not_fit_and_what_does_not_split_is_said(plan: Plan) -> None:
    assert "nothing fits: take more GPUs" in plan(
        "mpt-70b", "gpus=8", "gpu=a100-40gb", "global_train_batch_size=8"
    )
    text = plan("mpt-7b", "gpus=88,64", "gpu=h100")
    assert "left out: 64 x h100: global_train_batch_size: 1760 does not split over 64" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=h100"], "gpus"),
        (["gpus=8"], "gpu"),
        (["gpus=8", "gpu=h1000"], "h1000 is not in the table of GPUs"),
        (["gpus=7", "gpu=h100"], "1760 does not split over 7 devices"),
        (["gpus=8", "gpu=h100", "goodput=2"], "2 is not a share above 0"),
        (["gpus=8", "gpu=h100", "dollars_per_gpu_hour=1,2"], "2 prices for 1 kinds of GPUs"),
        (["gpus=0", "gpu=h100"], "0 is too small"),
        (["gpus=8", "gpu=h100", "picture=plan.doc"], "plan.doc is not a picture"),
        (["gpus=8", "gpu=h100", "network_gbps=0"], "0 is not a rate"),
    ],
)
def test_words_that_can_not_be_are_an_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIGS / "mpt-7b.yaml"), *words]) == 2
    assert said in capsys.readouterr().err


def test_streams_that_lie_here_are_counted(tiny_run: Path) -> None:
    options = PlanConfig(gpus=(1,), gpu=("h100",))
    config, _ = load_train_config(
        tiny_run, ["max_duration=2000ba", "eval_interval=100ba", "save_interval=0.5dur"]
    )
    text = plan_clusters(config, options)
    assert re.search(r"a +[\d,]+ tokens, read [\d.e+]+ times", text)
    assert "warning: a is repeated" in text and "arXiv:2305.16264" in text
    config, _ = load_train_config(tiny_run, ["max_duration=1ba"])
    assert "note: a is not exhausted" in plan_clusters(config, options)


def test_the_length_of_a_finetuning_run_follows_from_its_examples(tiny_run: Path) -> None:
    loader = (
        "train_loader={name: finetuning, dataset: {hf_name: some/data, split: train, packing_ratio: PACK}}"
    )

    def batches(pack: str, examples: int | None, tokens: float | None = None) -> int | None:
        words = ["train_loader=null", loader.replace("PACK", pack), "max_duration=2ep"]
        config, _ = load_train_config(tiny_run, words)
        return run_length(config, look_here(config).streams, examples, tokens).batches

    assert batches("null", None) is None and batches("auto", 8000) is None
    assert batches("null", 8000) == 2 * 8000 // 8
    assert batches("4", 8000) == 2 * 2000 // 8
    assert batches("auto", 8000, 8.0) == 2 * int(8000 * 8 / (32 * 0.95) // 8)


def test_intervals_and_interruptions_are_counted(tiny_run: Path) -> None:
    config, _ = load_train_config(tiny_run, ["max_duration=1000ba"])
    length = run_length(config, {}, None, None)
    assert times_in_run(config, "100ba", length) == 10
    assert times_in_run(config, "0.25dur", length) == 4
    assert times_in_run(config, "8000sp", length) == 1
    assert 0.9 < expected_goodput(1024, 3600) < expected_goodput(8, 3600) < 1
    assert expected_goodput(1024, 36000) < expected_goodput(1024, 3600)


def test_checkpoints_that_stay_cost_by_the_month(plan: Plan) -> None:
    text = plan(
        "mpt-7b", "gpus=88", "gpu=h100", "dollars_per_gb_month=0.02", "save_num_checkpoints_to_keep=10"
    )
    assert "checkpoints: 53.19 GB each, 138 saved, 10 kept: 531.94 GB, $10.64 a month" in text
    lora = plan("mpt-7b-instruct-lora", "gpus=8", "gpu=h100", "examples=60000", "tokens_per_example=200")
    assert "trainable" in lora and re.search(r"checkpoints: 0\.\d+ GB each", lora)


def test_it_answers_without_torch_and_at_once() -> None:
    code = (
        "import sys, time; from mptfoundry.cli import main; "
        f"code = main(['plan', {str(CONFIGS / 'mpt-7b.yaml')!r}, 'gpus=88,440', 'gpu=h100,b200']); "
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert code == 0 and time.process_time() < 3, time.process_time()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_picture_is_drawn_when_asked(plan: Plan, tmp_path: Path) -> None:
    text = plan("mpt-7b", "gpus=88,440", "gpu=h100", f"picture={tmp_path}/plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and "picture: " in text


def test_a_benchmark_of_this_gpu_replaces_the_estimate(plan: Plan, tmp_path: Path) -> None:
    row = {
        "device": "NVIDIA B200",
        "network": {"d_model": 768, "n_heads": 12, "n_layers": 12, "max_seq_len": 2048, "vocab_size": 50368},
        "batch x seq_len": "8 x 2048",
        "tokens per second": 500000,
    }
    (tmp_path / "step.json").write_text(json.dumps([row]))
    text = plan("mpt-7b", "gpus=88", "gpu=b200", f"measured={tmp_path}/step.json")
    assert "constants: fitted to 1 measured step of" in text
