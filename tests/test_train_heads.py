"""Models with heads from a YAML to their exported folder: they learn something, go on after a stop, and stock
transformers computes the same."""

from __future__ import annotations

import runpy
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mptfoundry.checkpoints.reading import load_network, network_of, open_model, tokenizer_of
from mptfoundry.config.load import load_train_config, parse_words
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.evaluate import evaluate
from mptfoundry.export.folder import export
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.train import train
from tests.conftest import losses

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
SOURCES = ["textwrap.py", "shlex.py", "pprint.py", "configparser.py"]
SMALL = """
max_seq_len: 96
model: {{name: mpt_{task}, {labels} d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  resid_pdrop: 0.1, attn_config: {{alibi: true}}}}
tokenizer: {{name: {folder}/tokenizer}}
train_loader:
  name: labelled
  dataset: {{local: {folder}/{data}, split: train, cache_folder: {folder}/.cache}}
eval_loader:
  name: labelled
  label: held_out
  dataset: {{local: {folder}/{data}, split: val, cache_folder: {folder}/.cache}}
optimizer: {{name: decoupled_adamw, lr: 3e-3}}
scheduler: {{name: constant_with_warmup, t_warmup: 2ba}}
max_duration: {batches}ba
eval_interval: {batches}ba
global_train_batch_size: 16
device_train_microbatch_size: 6
save_folder: {folder}/runs/{{run_name}}
save_interval: 20ba
log_to_console: false
"""
KINDS_OF_WORDS = ("keyword", "name", "operator", "number", "string")
KINDS = "{" + ", ".join(f"{number}: {name}" for number, name in enumerate(KINDS_OF_WORDS)) + "}"
# By task: what `model` says of labels, the examples, batches, the measure and what it has to reach.
TASKS: dict[str, tuple[str, str, int, str, float]] = {
    "sequence_classification": ("id2label: {0: code, 1: docstring},", "lines", 45, "f1", 0.65),
    "token_classification": (f"num_labels: 5, id2label: {KINDS},", "words", 30, "accuracy", 0.75),
    "question_answering": ("", "functions", 50, "f1", 25.0),
}

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled examples out of a few modules of the standard library, and a tokenizer."""
    from mptfoundry.tokenizer import train_bpe

    made = tmp_path_factory.mktemp("heads")
    files = [Path(textwrap.__file__).with_name(name) for name in SOURCES]
    script = runpy.run_path(str(ROOT / "scripts" / "labelled_examples.py"))
    script["main"]([f"out={made}", *map(str, files)])
    train_bpe([file.read_text() for file in files], 384, made / "tokenizer")
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Trains a task under a name, with further words; returns the run's folder."""

    def start(task: str, name: str, *words: str) -> Path:
        labels, data, batches, _, _ = TASKS[task]
        text = SMALL.format(task=task, labels=labels, folder=folder, data=data, batches=batches)
        (folder / f"{name}.yaml").write_text(text)
        train(load_train_config(folder / f"{name}.yaml", words)[0])
        return folder / "runs" / name

    return start


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def finished(run: Run, task: str) -> Path:
    return run(task, task)


def last_measures(run_folder: Path) -> dict[str, float]:
    return [row["eval"] for row in read_rows(run_folder / "metrics.jsonl") if "eval" in row][-1]["held_out"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=False)["state"]["model"]


def test_a_short_training_learns_what_the_labels_say(finished: Path, task: str) -> None:
    measure, least = TASKS[task][3:]
    assert last_measures(finished)[measure] > least, last_measures(finished)
    assert "held_out" in (finished / "report.md").read_text()


def test_evaluation_of_a_run_and_of_its_export_equals_that_in_the_loop(
    finished: Path, task: str, tmp_path: Path
) -> None:
    export(finished, tmp_path / "hf", dtype="fp32", progress=False)
    saved, _ = load_train_config(finished / "config.yaml")
    data = saved.eval_loaders["held_out"].dataset
    loader = [f"eval_loader.dataset.{key}={getattr(data, key)}" for key in ("local", "split", "cache_folder")]
    loader += ["eval_loader.name=labelled", "eval_loader.label=held_out"]
    for words in ([f"model={finished}"], [f"model={tmp_path}/hf", *loader]):
        words += [f"device_eval_batch_size={7 if loader[0] in words else 64}", f"out={tmp_path}/eval.json"]
        found = evaluate(parse_words(words, EvalConfig))
        assert found["held_out"] == pytest.approx(last_measures(finished), rel=1e-5)


def test_stock_transformers_computes_the_same(finished: Path, task: str, tmp_path: Path) -> None:
    summary = export(finished, tmp_path / "hf", dtype="fp32", progress=False)
    assert summary.format.startswith("native") and summary.comparison.difference < 1e-4
    source = open_model(finished)
    tokenizer: Any = tokenizer_of(source)
    ours: Any = network_of(source)
    ours.pad_token_id = tokenizer.pad_token_id
    kind = getattr(transformers, source.config.architecture.replace("Mpt", "AutoModel"))  # type: ignore[attr-defined]
    theirs = kind.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == source.config.architecture  # type: ignore[attr-defined]
    texts = ["def wrap(self, text):", "Return a list of the lines in the text, each at most width long."]
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        output, wanted = ours(**batch), theirs(**batch)
    if task == "question_answering":
        logits = torch.stack([wanted.start_logits, wanted.end_logits], -1)
    else:
        logits = wanted.logits
        names = {number: name for name, number in source.config.label2id.items()}  # type: ignore[attr-defined]
        assert theirs.config.id2label == names and set(names.values()) <= {
            *KINDS_OF_WORDS,
            "code",
            "docstring",
        }
    mask = batch["attention_mask"].bool() if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(output.logits[mask], logits[mask], atol=1e-4, rtol=1e-4)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"pipeline_tag: {source.config.task}" in card and type(theirs).__name__ in card  # type: ignore[attr-defined]
    exported = open_model(tmp_path / "hf").config.to_dict()
    assert exported == source.config.to_dict()


def test_a_stopped_run_goes_on_bitwise(run: Run, folder: Path) -> None:
    whole = run("token_classification", "whole", "max_duration=30ba", "eval_loader=null")
    stopped = folder / "runs" / "stopped"
    shutil.copytree(whole, stopped, symlinks=True)
    for name in ("ep0-ba30-rank0.pt", "latest-rank0.pt"):
        (stopped / name).unlink()
    (stopped / "latest-rank0.pt").symlink_to("ep0-ba20-rank0.pt")
    run("token_classification", "stopped", "max_duration=30ba", "eval_loader=null")
    assert losses(stopped) == losses(whole)
    one, other = weights(whole / "ep0-ba30-rank0.pt"), weights(stopped / "ep0-ba30-rank0.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("key", ["model.pretrained_model_name_or_path", "load_path"])
def test_a_base_model_loads_into_each_head(
    key: str, run: Run, task: str, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_run()
    given = base if key.startswith("model") else base / "ep0-ba10-rank0.pt"
    name = f"{task}-{key.rpartition('.')[2]}"
    # The first step has a rate of zero: what is saved are the weights that the run began with.
    words = [f"{key}={given}", "max_duration=1ba", "eval_loader=null", "model.resid_pdrop=0"]
    found = weights(run(task, name, *words, "load_weights_only=true") / "ep0-ba1-rank0.pt")
    expected = weights(base / "ep0-ba10-rank0.pt")
    new = [weight for weight in found if weight not in expected]
    assert all(torch.equal(found[weight], tensor) for weight, tensor in expected.items())
    assert f"weights: drawn are {', '.join(weight.removeprefix('model.') for weight in new)}\n" in (
        capsys.readouterr().out
    )
    assert new and all(weight.endswith(("weight", "bias")) for weight in new)


def test_a_base_checkpoint_gives_its_weights_alone(run: Run, write_run: Callable[..., Path]) -> None:
    base = write_run()
    with pytest.raises(ConfigError, match=r"load_path: .* lacks score, .*set load_weights_only: true"):
        run("sequence_classification", "greedy", f"load_path={base}")
    with pytest.raises(ConfigError, match=r"model.d_model: 64 is not what .* says, 32"):
        run(
            "sequence_classification",
            "other",
            f"load_path={base}",
            "load_weights_only=true",
            "model.d_model=64",
        )


def test_a_checkpoint_of_the_same_head_is_loaded_whole(run: Run, folder: Path) -> None:
    first = run(
        "sequence_classification", "first", "max_duration=2ba", "eval_loader=null", "save_interval=1ba"
    )
    words = [f"load_path={first}/ep0-ba1-rank0.pt", "max_duration=2ba", "eval_loader=null"]
    assert losses(run("sequence_classification", "second", *words)) == losses(first)[1:]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["train_loader={name: text, dataset: {local: x}}"],
            "train_loader.name: text: .* trains on labels",
        ),
        (
            ["model={name: mpt_causal_lm}"],
            "train_loader.name: labelled: model.name: mpt_causal_lm has no head",
        ),
        (["callbacks.generate_callback.prompts=[a]"], "generate_callback: .* generates no text"),
        (["model.num_labels=3"], "model.id2label: has the numbers 0, 1. Name each from 0 to 2"),
        (["model.problem_typ=regression"], "problem_typ.*: unknown key. Did you mean problem_type"),
        (["model.problem_type=ranking"], "'ranking' is not allowed here. Expected regression, single_label"),
        (["model.loss_fn=fused_crossentropy"], "'fused_crossentropy' is not allowed here"),
    ],
)
def test_what_does_not_fit_a_head_is_refused_before_anything_is_read(
    words: list[str], text: str, folder: Path
) -> None:
    labels, data, batches, _, _ = TASKS["sequence_classification"]
    written = SMALL.format(
        task="sequence_classification", labels=labels, folder=folder, data=data, batches=batches
    )
    (folder / "wrong.yaml").write_text(written)
    with pytest.raises(ConfigError, match=text):
        load_train_config(folder / "wrong.yaml", words)


def test_a_head_makes_no_text_and_has_no_code_of_its_own(run: Run, tmp_path: Path) -> None:
    words = ["max_duration=1ba", "eval_loader=null", "model.attn_config.alibi_bias_max=16"]
    trained = run("question_answering", "steep", *words)
    with pytest.raises(
        CheckpointError, match=r"ends in a head \(MptForQuestionAnswering\) and makes no text"
    ):
        load_network(trained)
    with pytest.raises(CheckpointError, match=r"MptForQuestionAnswering.* attn_config.alibi_bias_max is 16"):
        export(trained, tmp_path / "hf", progress=False)
