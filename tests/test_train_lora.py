"""A LoRA run from its YAML to its end: what is learned and saved, how it goes on, and what comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.reading import load_network, open_model
from mptfoundry.config.load import load_train_config, parse_words
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import CheckpointError
from mptfoundry.evaluate import evaluate
from mptfoundry.export.folder import export
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.conftest import losses
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("a LoRA run's base was changed, or is gone", "edited, renamed, 3 starts", "refused; the error names it"),
]

pytest.importorskip("peft", reason="peft is not installed: pip install 'mptfoundry[peft]'")

CONFIG = """
max_seq_len: 32
model: {{name: mpt_causal_lm, pretrained_model_name_or_path: {base}, config_overrides: {{resid_pdrop: 0.1}},
  peft_config: {{r: 4, lora_alpha: 16, lora_dropout: 0.1, peft_type: LORA, task_type: CAUSAL_LM}}}}
tokenizer: {{name: {shards}/tokenizer}}
train_loader: {{name: text, dataset: {{local: {shards}/a, split: train}}}}
eval_loader: {{name: text, dataset: {{local: {shards}/a, split: val}}}}
optimizer: {{name: decoupled_adamw, lr: 1e-2}}
scheduler: {{name: constant_with_warmup, t_warmup: 0ba}}
max_duration: 4ba
eval_interval: 4ba
global_train_batch_size: 8
save_folder: {folder}/{{run_name}}
save_interval: 2ba
log_to_console: false
"""
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def place(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the YAML `lora.yaml` and the base's, a new model that is a run of its own."""
    folder = tmp_path_factory.mktemp("lora")
    base = CONFIG.format(base=folder / "base", shards=shards, folder=folder)
    (folder / "lora.yaml").write_text(base)
    sizes = (
        "d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true, attn_config: {alibi: true}}"
    )
    lines = [line for line in base.splitlines() if "peft_config" not in line]
    text = "\n".join(f"model: {{{sizes}" if line.startswith("model:") else line for line in lines)
    (folder / "base.yaml").write_text(text)
    train(load_train_config(folder / "base.yaml", ["run_name=base", "max_duration=2ba"])[0])
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    def start(name: str, *words: str) -> Path:
        train(load_train_config(place / "lora.yaml", [f"run_name={name}", *words])[0])
        return place / name

    return start


@pytest.fixture(scope="module")
def finished(run: Run) -> Path:
    return run("whole")


def state_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=False)["state"]


def test_a_checkpoint_has_the_adapters_alone(finished: Path) -> None:
    state = state_of(finished / "ep0-ba4-rank0.pt")
    adapters = {name for name in state["model"] if "lora_" in name}
    assert set(state["model"]) - adapters == {"model.base_fingerprint"}
    assert len(adapters) == 2 * 4 * 2
    moments = state["optimizers"]["DecoupledAdamW"]["state"]
    assert set(moments) == adapters
    assert all(state["model"][name].any() for name in adapters)


def test_a_stopped_run_goes_on_bitwise(finished: Path, run: Run, place: Path) -> None:
    stopped = place / "stopped"
    shutil.copytree(finished, stopped, symlinks=True)
    (stopped / "ep0-ba4-rank0.pt").unlink()
    (stopped / "latest-rank0.pt").unlink()
    (stopped / "latest-rank0.pt").symlink_to("ep0-ba2-rank0.pt")
    run("stopped")
    assert losses(stopped) == losses(finished)
    one, other = (state_of(f / "ep0-ba4-rank0.pt")["model"] for f in (finished, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluation_of_the_run_equals_that_in_the_loop(finished: Path, place: Path) -> None:
    in_the_loop = next(row["eval"] for row in read_rows(finished / "metrics.jsonl") if "eval" in row)
    found = evaluate(parse_words([f"model={finished}", f"out={place}/eval.json"], EvalConfig))
    assert found["eval"] == pytest.approx(in_the_loop["eval"], rel=1e-6)


def test_before_the_first_step_the_model_is_its_base(run: Run, place: Path) -> None:
    folder = run("still", "max_duration=1ba", "save_interval=1ba", "optimizer.lr=0")
    base = dict(open_model(place / "base").tensors())
    for name, tensor in open_model(folder).tensors():
        assert torch.equal(tensor, base[name]), name


def test_two_ranks_that_shard_learn_what_one_learns_and_go_on(run: Run, place: Path) -> None:
    words = ["model.peft_config.lora_dropout=0", "model.config_overrides.resid_pdrop=0", "eval_interval=0"]
    alone = run("alone", *words)
    sharded = [*words, "run_name=shared", "fsdp_config.state_dict_type=sharded"]
    for duration in ("max_duration=2ba", "max_duration=4ba"):
        two = run_on_ranks("scripts/train.py", place / "lora.yaml", *sharded, duration)
        assert two.returncode == 0, two.stdout
    assert losses(place / "shared") == pytest.approx(losses(alone), rel=1e-4)
    expected = dict(open_model(alone).tensors())
    for name, tensor in open_model(place / "shared").tensors():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", ["native", "custom"])
def test_exported_both_ways_stock_classes_compute_what_the_run_does(
    finished: Path, place: Path, tmp_path: Path, format: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, model in (("base", place / "base"), ("merged", finished)):
        export(model, tmp_path / name, dtype="fp32", format=format, progress=False)
    summary = export(finished, tmp_path / "adapter", dtype="fp32", adapter="separate")
    assert "4,096 parameters of adapters as float32" in str(summary)
    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    merged = load(tmp_path / "merged").eval()
    beside = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    network, _ = load_network(finished)
    ids = AutoTokenizer.from_pretrained(tmp_path / "adapter")("def f(x):\n    return", return_tensors="pt")
    with torch.no_grad():
        expected, base = network(ids["input_ids"]).logits, load(tmp_path / "base")(**ids).logits
        for other in (merged, beside):
            torch.testing.assert_close(other(**ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.1


def test_adapters_alone_are_refused_where_they_are_not_all(finished: Path, place: Path, run: Run) -> None:
    with pytest.raises(CheckpointError, match=r"base/ep0-ba2-rank0.pt: has no adapters to write separately"):
        export(place / "base", place / "none", adapter="separate")
    clipped = run("clipped", "max_duration=1ba", "model.config_overrides.attn_config.clip_qkv=6")
    with pytest.raises(CheckpointError, match=r"separate can't express attn_config.clip_qkv: 6"):
        export(clipped, place / "none", adapter="separate")
    assert not (place / "none").exists()


def test_a_path_to_a_base_stands_for_its_name(run: Run, place: Path, finished: Path) -> None:
    words = ["model.pretrained_model_name_or_path=null", "load_weights_only=true", f"load_path={place}/base"]
    sizes = (
        "d_model=32 n_heads=4 n_layers=2 vocab_size=384 no_bias=true attn_config.alibi=true resid_pdrop=0.1"
    )
    words += ["model.config_overrides=null", *(f"model.{size}" for size in sizes.split())]
    assert losses(run("by-path", *words)) == losses(finished)


def test_adapters_are_learned_beside_adapters_that_were_merged(run: Run, place: Path, finished: Path) -> None:
    words = [f"model.pretrained_model_name_or_path={finished}", "model.config_overrides=null"]
    second = run("second", *words, "optimizer.lr=0", "max_duration=1ba")
    expected = dict(open_model(finished).tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_model(second).tensors())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_base_in_few_bits_is_learned_beside_and_is_whole_afterwards(
    run: Run, place: Path, finished: Path, bits: int
) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install 'mptfoundry[bitsandbytes]'"
    )
    folder = run(f"few-{bits}", f"model.load_in_{bits}bit=true")
    assert losses(folder) == pytest.approx(losses(finished), rel=0.05)
    assert losses(folder) != losses(finished)
    state, other = (state_of(each / "ep0-ba4-rank0.pt")["model"] for each in (folder, finished))
    assert set(state) == set(other)
    base = dict(open_model(place / "base").tensors())
    for name, tensor in open_model(folder).tensors():
        is_adapted = f"model.{name.removesuffix('.weight')}.lora_A.default.weight" in state
        assert torch.equal(tensor, base[name]) != is_adapted


def test_another_base_is_refused(finished: Path, run: Run, place: Path) -> None:
    moved = place / "base-before"
    (place / "base").rename(moved)
    try:
        with pytest.raises(CheckpointError, match=r"the base of the adapters in .*base: no such file"):
            load_network(finished)
        shutil.copytree(moved, place / "base", symlinks=True)
        checkpoint = place / "base" / "ep0-ba2-rank0.pt"
        content = torch.load(checkpoint, weights_only=False)
        content["state"]["model"]["model.transformer.blocks.1.ffn.up_proj.weight"] += 1
        torch.save(content, checkpoint)
        with pytest.raises(CheckpointError, match=r"is not the base that these adapters were trained on"):
            load_network(finished)
        with pytest.raises(CheckpointError, match=r"is not the base that these adapters were trained on"):
            run("whole", "max_duration=6ba")
    finally:
        shutil.rmtree(place / "base", ignore_errors=True)
        moved.rename(place / "base")


def test_a_folder_with_other_adapters_is_left_alone(finished: Path, run: Run) -> None:
    before = (finished / "config.yaml").read_text()
    with pytest.raises(
        CheckpointError, match=r"lora_A.default.weight is \(4, 32\) there and \(8, 32\) in this"
    ):
        run("whole", "model.peft_config.r=8")
    assert (finished / "config.yaml").read_text() == before
