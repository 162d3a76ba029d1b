"""Finetuning from a YAML to a model that can be talked with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.cli import main
from mptfoundry.config.load import load_train_config
from mptfoundry.data.examples.chat import CHATML
from mptfoundry.errors import ConfigError
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.tokenizer import load_tokenizer
from mptfoundry.train import train
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
# The layout of llm-foundry's mpt-7b_dolly_sft.yaml and mpt-30b-instruct.yaml: their keys, in their places.
DOLLY = """
variables: {{global_seed: 17, max_seq_len: 2048, run_name: }}
max_seq_len: ${{variables.max_seq_len}}
run_name: ${{variables.run_name}}
model:
  name: hf_causal_lm
  pretrained: true
  pretrained_model_name_or_path: mosaicml/mpt-7b
  config_overrides:
    max_seq_len: ${{variables.max_seq_len}}
    attn_config: {{attn_impl: flash, attn_uses_sequence_id: false}}
  {more}
tokenizer: {{name: mosaicml/mpt-7b, kwargs: {{model_max_length: "${{variables.max_seq_len}}"}}}}
train_loader: &loader
  name: finetuning
  dataset:
    hf_name: mosaicml/dolly_hhrlhf
    split: train
    max_seq_len: ${{variables.max_seq_len}}
    allow_pad_trimming: false
    decoder_only_format: true
    {packing}
    shuffle: true
  drop_last: true
  num_workers: 8
  pin_memory: false
  prefetch_factor: 2
  persistent_workers: true
  timeout: 0
eval_loader:
  <<: *loader
  dataset:
    hf_name: mosaicml/dolly_hhrlhf
    split: test
    max_seq_len: ${{variables.max_seq_len}}
    decoder_only_format: true
    {packing}
    shuffle: false
scheduler: {{name: linear_decay_with_warmup, t_warmup: 50ba, alpha_f: 0}}
optimizer: {{name: decoupled_adamw, lr: 5.0e-6, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
max_duration: 2ep
eval_interval: 1ep
eval_first: true
global_train_batch_size: 48
seed: ${{variables.global_seed}}
device_eval_batch_size: 8
device_train_microbatch_size: 8
precision: amp_bf16
fsdp_config: {{sharding_strategy: FULL_SHARD, mixed_precision: PURE, activation_checkpointing: true,
  activation_checkpointing_reentrant: false, activation_cpu_offload: false, limit_all_gathers: true}}
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks: {{speed_monitor: {{window_size: 10}}, lr_monitor: {{}}, runtime_estimator: {{}}}}
{tasks}
"""
LAYOUTS = {
    "mpt-7b_dolly_sft": DOLLY.format(more="use_auth_token: false", packing="", tasks=""),
    "mpt-30b-instruct": DOLLY.format(
        more="init_device: mixed",
        packing="packing_ratio: 3",
        tasks="icl_max_seq_len: 2048\nicl_tasks:\n- {label: piqa, dataset_uri: , num_fewshot: [0], "
        "icl_task_type: multiple_choice}",
    ),
}
SHRUNK = ["max_duration=2ba", "eval_interval=2ba", "global_train_batch_size=4", "precision=fp32"]
SHRUNK += ["model.config_overrides.attn_config.attn_impl=auto", "log_to_console=false"]
SHRUNK += ["train_loader.num_workers=0", "eval_loader.num_workers=0", "device_train_microbatch_size=2"]
SHRUNK += ["device_eval_batch_size=1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 5)):
        rows = [{"prompt": f"Say {n}.\n", "response": f"{n} " * (n % 4 + 1)} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def words(tmp_path: Path, data: Path, write_run: Callable[..., Path]) -> list[str]:
    """What points a config of a published model at small local data, and at a small model."""
    base = write_run(name="base")
    names = ["train_loader.dataset", "eval_loader.dataset"]
    return [
        *(f"{name}.hf_name={data}" for name in names),
        *(f"{name}.cache_folder={tmp_path}/cache" for name in names),
        f"model.pretrained_model_name_or_path={base}",
        f"tokenizer.name={base}/tokenizer",
        f"save_folder={tmp_path}/run",
    ]


def measured(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    rows = list(read_rows(folder / "metrics.jsonl"))
    return [row["loss"] for row in rows if "loss" in row], [row["eval"] for row in rows if "eval" in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_llm_foundrys_finetuning_files_train(
    name: str, words: list[str], data: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    (tmp_path / f"{name}.yaml").write_text(LAYOUTS[name])
    words = [*words, *SHRUNK, "variables.max_seq_len=64"]
    config, notes = load_train_config(tmp_path / f"{name}.yaml", words)
    assert any("hf_causal_lm is now mpt_causal_lm" in note for note in notes)
    for text in ("icl_tasks is left out", "packed examples never see one another here"):
        assert any(text in note for note in notes) == (name == "mpt-30b-instruct")
    train(config)
    losses, evaluations = measured(tmp_path / "run")
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"| base | {tmp_path / 'base'} |" in page and "| samples | 8 |" in page
    assert re.search(
        rf"\| data \| train: {data}, 24 examples of \d+ tokens, \d+ of them in the loss \|", page
    )
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    learned = sum(len(tiny_tokenizer(row["response"])["input_ids"]) + 1 for row in rows)
    assert [each["eval"]["tokens"] for each in evaluations] == [learned, learned]


SMALL = """
max_seq_len: 64
model: {{name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  attn_config: {{alibi: true}}}}
tokenizer: {{name: {tokenizer}}}
train_loader: {{name: finetuning, dataset: {{local: {records}, target_responses: all, packing_ratio: auto,
  cache_folder: {folder}/cache}}}}
optimizer: {{name: decoupled_adamw, lr: 1e-3}}
scheduler: {{name: constant_with_warmup, t_warmup: 1ba}}
max_duration: 1ba
global_train_batch_size: 2
save_folder: {folder}/run
log_to_console: false
"""


@pytest.fixture
def small(tmp_path: Path, tokenizer_folder: Path) -> Callable[[list[Any]], Path]:
    """A config that trains a new model on records."""

    def write(records: list[Any]) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        text = SMALL.format(folder=tmp_path, records=path, tokenizer=tokenizer_folder)
        (tmp_path / "small.yaml").write_text(text)
        return tmp_path / "small.yaml"

    return write


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_the_chat_template_is_saved_with_the_run(small: Callable[..., Path], tmp_path: Path) -> None:
    train(load_train_config(small([TALK] * 8))[0])
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer")).chat_template == CHATML


def test_records_that_were_edited_at_equal_lengths_are_refused(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    config = small([TALK] * 8)
    train(load_train_config(config)[0])
    edited = json.dumps(TALK).replace('"b"', '"c"')
    small([json.loads(edited), *[TALK] * 7])
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(
        ConfigError, match=r"train_loader\.dataset: its content .*\n.*allow_changes=\[train_lo"
    ):
        train(load_train_config(config, ["max_duration=2ba"])[0])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_preview_shows_what_a_run_would_learn_and_why_it_would_end(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small([TALK, TALK, {"prompt": "x"}])
    assert main(["preview", str(config), "samples=1"]) == 1
    text, error = capsys.readouterr()
    assert text[text.index("data: 2 rows") :].startswith("data: 2 rows, 1.00 examples in each, ")
    assert "<|im_start|>assistant\n⟦b<|im_end|>\n<|endoftext|>⟧" in text
    assert (text + error).count("response: is missing or null") == 1
    assert "A run would end here. train_loader.dataset: 1 of 3 records is bad. Fix them, or" in error
    assert main(["preview", str(config), "train_loader.dataset.max_bad_records=1", "max_seq_len=96"]) == 0
    assert "cut at max_seq_len, 96: 0" in capsys.readouterr().out
    assert main(["preview", str(config), "train_loader.dataset.max_bad=1"]) == 2
    assert "train_loader.dataset.max_bad" in capsys.readouterr().err
    assert main(["preview", str(config.parent), "max_seq_len=32"]) == 2
    assert "max_seq_len" in capsys.readouterr().err


def test_preview_of_records_that_are_all_bad_is_an_error_of_two_sentences(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", str(small([7]))]) == 1
    text, error = capsys.readouterr()
    assert "0 examples of 1 record; 0 tokens" in text
    assert (
        error.strip()
        .splitlines()[-1]
        .endswith("1 of 1 record is bad. Fix them, or leave them out with dataset.max_bad_records: 1.")
    )


def test_the_type_of_ids_in_bytes_is_that_of_the_config(small: Callable[..., Path]) -> None:
    words = ["train_loader.dataset.token_encoding_type=int32"]
    for given, expected in ((words, "int32"), ([], "int64")):
        loader: Any = load_train_config(small([TALK]), given)[0].train_loader
        assert loader.dataset.token_encoding_type == expected
    with pytest.raises(ConfigError, match=r"token_encoding_type.*float32"):
        load_train_config(small([TALK]), ["train_loader.dataset.token_encoding_type=float32"])


def test_all_ranks_wait_for_the_one_that_prepares_and_share_its_error(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    config = small([TALK] * 8)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3, "response": "three"}\n')
    held_out = f"{{name: finetuning, dataset: {{local: {tmp_path}/bad.jsonl}}}}"
    config.write_text(f"{config.read_text()}eval_loader: {held_out}\n")
    result = run_on_ranks("scripts/train.py", config)
    said = result.stdout
    assert result.returncode == 1, said
    assert said.count("train_loader.dataset: 8 examples; ") == 1
    assert said.count("bad.jsonl:1: prompt: is a number, not a text.") == 1
