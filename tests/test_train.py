"""A run from its YAML to its end: what it learns, leaves behind, and how it goes on after a stop."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mptfoundry import build
from mptfoundry.config.load import load_train_config, parse_words
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import CheckpointError, ConfigError, DataError
from mptfoundry.evaluate import evaluate
from mptfoundry.mpt.network import MPT
from mptfoundry.plan.devices import detect_device
from mptfoundry.plan.gpus import GPU
from mptfoundry.plan.plan import make_plan
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.conftest import losses

pytestmark = pytest.mark.long

# Mean losses of batches 1 to 6 of the run below, in float32; processors differ in the last digits.
GOLDEN_LOSSES = [7.0044, 7.1258, 7.1561, 6.7707, 6.6154, 6.2096]
CONFIG = """
max_seq_len: 32
model: {{name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  resid_pdrop: 0.1, attn_config: {{alibi: true}}}}
tokenizer: {{name: {folder}/tokenizer}}
train_loader:
  name: text
  dataset:
    split: train
    streams:
      a: {{local: {folder}/a, proportion: 0.75}}
      b: {{local: {folder}/b, proportion: 0.25}}
eval_loader: {{name: text, label: held_out, dataset: {{local: {folder}/a, split: val}}}}
optimizer: {{name: decoupled_lionw, lr: 1e-3}}
scheduler: {{name: cosine_with_warmup, t_warmup: 1ba}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
max_duration: 6ba
eval_interval: 3ba
global_train_batch_size: 8
save_folder: {folder}/runs/{{run_name}}
save_interval: 3ba
log_to_console: false
"""

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(shards: Path) -> Path:
    (shards / "config.yaml").write_text(CONFIG.format(folder=shards))
    return shards


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Trains under a name, with further words; returns the run's folder."""

    def start(name: str, *words: str) -> Path:
        config, _ = load_train_config(folder / "config.yaml", [f"run_name={name}", *words])
        train(config)
        return folder / "runs" / name

    return start


@pytest.fixture(scope="module")
def finished(run: Run) -> Path:
    return run("whole")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=False)["state"]["model"]


def test_a_short_training_has_the_golden_losses(finished: Path) -> None:
    assert losses(finished) == pytest.approx(GOLDEN_LOSSES, abs=1e-3)


def test_a_run_leaves_config_tokenizer_metrics_report_and_checkpoints(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "tokenizer", "metrics.jsonl", "report.md", "report.png"} <= names
    assert {"ep0-ba3-rank0.pt", "ep0-ba6-rank0.pt", "latest-rank0.pt"} <= names
    rows = list(read_rows(finished / "metrics.jsonl"))
    assert {"batch", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(rows[0])
    assert [row["batch"] for row in rows if "eval" in row] == [3, 6]
    page = (finished / "report.md").read_text()
    assert "held_out" in page and re.search(
        r"\| data \| a: .*/a, proportion 0.75; b: .*/b, proportion 0.25 \|", page
    )


def test_the_saved_config_describes_the_same_run(finished: Path, folder: Path) -> None:
    saved, notes = load_train_config(finished / "config.yaml")
    given, _ = load_train_config(folder / "config.yaml", ["run_name=whole"])
    assert saved == given and not notes


def test_a_stopped_run_goes_on_bitwise(finished: Path, run: Run, folder: Path) -> None:
    stopped = folder / "runs" / "stopped"
    shutil.copytree(finished, stopped, symlinks=True)
    (stopped / "ep0-ba6-rank0.pt").unlink()
    (stopped / "latest-rank0.pt").unlink()
    (stopped / "latest-rank0.pt").symlink_to("ep0-ba3-rank0.pt")
    run("stopped")
    assert losses(stopped) == losses(finished)
    one, other = weights(finished / "ep0-ba6-rank0.pt"), weights(stopped / "ep0-ba6-rank0.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_says_so(finished: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = losses(finished)
    run("whole")
    assert "whole is finished: 6 batches are done." in capsys.readouterr().out
    assert losses(finished) == before


def test_microbatches_do_not_change_the_losses(finished: Path, run: Run) -> None:
    words = ["model.resid_pdrop=0", "max_duration=3ba", "eval_loader=null"]
    whole = losses(run("at-once", *words))
    split = losses(run("in-parts", *words, "device_train_microbatch_size=3"))
    assert split == pytest.approx(whole, rel=1e-5)


def test_an_exported_run_gives_the_checkpoints_logits(finished: Path, folder: Path) -> None:
    from transformers import MptForCausalLM

    from mptfoundry.checkpoints.reading import load_network
    from mptfoundry.export.folder import export

    export(finished, folder / "hf", dtype="fp32", progress=False)
    network, tokenizer = load_network(finished)
    ids = tokenizer("def f(x):\n    return x\n", return_tensors="pt")["input_ids"]
    stock = MptForCausalLM.from_pretrained(folder / "hf").eval()
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, network(ids).logits, atol=1e-5)


def test_evaluation_of_a_checkpoint_equals_that_in_the_loop(finished: Path, folder: Path) -> None:
    in_the_loop = [row["eval"] for row in read_rows(finished / "metrics.jsonl") if "eval" in row][-1]
    for batch_size in (1, 7):
        words = [f"model={finished}", f"device_eval_batch_size={batch_size}", f"out={folder}/eval.json"]
        found = evaluate(parse_words(words, EvalConfig))
        assert found["held_out"] == pytest.approx(in_the_loop["held_out"], rel=1e-6)
        assert json.loads((folder / "eval.json").read_text())["results"] == found


@pytest.mark.parametrize(
    "optimizer", ["{name: decoupled_adamw, lr: 1e-3}", "{name: decoupled_lionw, lr: 1e-4, disable_grad: wte}"]
)
@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "warmup_stable_decay"])
def test_every_optimizer_trains(run: Run, optimizer: str, scheduler: str) -> None:
    name = f"{len(optimizer)}-{scheduler}"
    words = [f"optimizer={optimizer}", f"scheduler={{name: {scheduler}, t_warmup: 1ba}}"]
    found = losses(run(name, *words, "max_duration=2ba", "eval_loader=null"))
    assert len(found) == 2


def test_a_class_of_ones_own_takes_the_place_of_a_known_algorithm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.ALGORITHMS, "gradient_clipping", dict)
    config, _ = load_train_config(folder / "config.yaml")
    assert build.build_algorithms(config) == [{"clipping_type": "norm", "clipping_threshold": 1.0}]


def test_what_is_frozen_stays_as_it_is_and_the_run_goes_on(run: Run, folder: Path) -> None:
    words = ["optimizer.disable_grad=[wte,blocks.0.]", "eval_loader=null", "max_duration=4ba"]
    whole = run("frozen", *words, "save_interval=2ba")
    (whole / "ep0-ba4-rank0.pt").rename(folder / "whole.pt")
    (whole / "latest-rank0.pt").unlink()
    (whole / "latest-rank0.pt").symlink_to("ep0-ba2-rank0.pt")
    run("frozen", *words, "save_interval=2ba")
    state = torch.load(folder / "whole.pt", weights_only=False)["state"]
    again = weights(whole / "ep0-ba4-rank0.pt")
    new = MPT(load_train_config(folder / "config.yaml")[0].model.network(), seed=17).state_dict()
    moments = state["optimizers"]["DecoupledLionW"]["state"]
    for name, tensor in state["model"].items():
        is_frozen = "wte" in name or "blocks.0." in name
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, new[name.removeprefix("model.")]) == is_frozen
        assert (name not in moments) == is_frozen


def test_without_a_save_folder_the_runs_files_lie_in_runs(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run("unsaved", "save_folder=null", "max_duration=2ba", "eval_loader=null")
    names = {path.name for path in (folder / "runs" / "unsaved").iterdir()}
    assert "metrics.jsonl" in names and not any(name.endswith(".pt") for name in names)


def test_samples_are_generated_during_training(run: Run) -> None:
    words = ["callbacks.generate_callback.prompts=[def]", "callbacks.generate_callback.interval=2ba"]
    short = ["callbacks.generate_callback.max_new_tokens=4", "max_duration=2ba", "eval_loader=null"]
    rows = list(read_rows(run("samples", *words, *short) / "metrics.jsonl"))
    assert [row["generations"][0]["prompt"] for row in rows if "generations" in row] == ["def"]


def test_a_save_folder_that_cannot_be_written_is_named(run: Run, folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match=r"save_folder: .*file/run can't be written to"):
        run("blocked", f"save_folder={folder}/file/run")


def test_a_folder_with_checkpoints_of_another_model_is_left_alone(finished: Path, run: Run) -> None:
    before = (finished / "config.yaml").read_text()
    with pytest.raises(
        CheckpointError, match=r"wte.weight is \(384, 32\) there and \(384, 64\) in this config"
    ):
        run("whole", "model.d_model=64")
    assert (finished / "config.yaml").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has both precisions")
def test_a_precision_that_a_cpu_has_not_is_refused(finished: Path, run: Run) -> None:
    said = r"^precision: amp_bf16 needs a GPU\. A CPU computes in float32: use auto or fp32\.$"
    with pytest.raises(ConfigError, match=said):
        run("half", "precision=amp_bf16")
    with pytest.raises(ConfigError, match=said):
        evaluate(parse_words([f"model={finished}", "precision=amp_bf16"], EvalConfig))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        run("small", "model.vocab_size=100")


@pytest.mark.parametrize("change", ["train_loader.dataset.streams.a.local=nowhere", "max_seq_len=64"])
def test_data_that_does_not_fit_is_refused(run: Run, change: str) -> None:
    with pytest.raises(DataError, match=r"nowhere|max_seq_len"):
        run("unfit", change)


def test_a_gpu_that_torch_cannot_use_is_refused_before_the_run_begins(folder: Path) -> None:
    config, _ = load_train_config(folder / "config.yaml", ["run_name=unsupported"])
    plan = make_plan(config, detect_device())
    device = replace(plan.device, gpus=(GPU("Tesla K80", capability=(3, 7)),))
    with pytest.raises(ConfigError, match="no code for the Tesla K80"):
        train(config, replace(plan, device=device))
    assert not (folder / "runs" / "unsupported").exists()
