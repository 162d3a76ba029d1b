from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config, parse_words, to_yaml
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import EvalConfig, ExportConfig, PrepareConfig, PreviewConfig
from mptfoundry.errors import ConfigError

from .conftest import SMALL

FULL = """\
eval_loader:
- {name: text, label: a, dataset: {local: x, split: val, cache_limit: 10gb}, num_workers: 2}
- {name: text, label: b, dataset: {remote: s3://x, local: y, eos_token_id: 0}}
algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
callbacks: {speed_monitor: {window_size: 10}, lr_monitor: {}}
loggers: {file_logger: {filename: logs.txt}}
fsdp_config: {sharding_strategy: SHARD_GRAD_OP, mixed_precision: PURE, activation_checkpointing: true}
compile_config: {mode: max-autotune}
save_folder: runs/{run_name}
load_path: x.pt
load_ignore_keys: [state/optimizers/*]
variables: {text: "1e-4", n: 3}
metadata:
  {note: "a: b # ${variables.n}", odd: "null", "yes": "no",
   price: '\\${cost}', path: 'C:\\\\\\\\\\${x}', Ü: "é\\n"}
"""


def test_a_resolved_config_loads_to_an_equal_one(write: Callable[..., str]) -> None:
    config, _ = load_train_config(write(text=SMALL + FULL), ["optimizer.betas=[0.9,0.95]"])
    Path("config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again, notes = load_train_config("config.yaml")
    assert again == config
    assert notes == []


def test_the_resolved_config_says_every_value_that_is_not_blank(load: Callable[..., TrainConfig]) -> None:
    text = to_yaml(load())
    assert "seed: 17" in text
    assert "weight_decay: 0.0" in text
    assert "load_path" not in text


def test_loading_imports_neither_torch_nor_composer_nor_transformers(write: Callable[..., str]) -> None:
    path = write(text=SMALL + FULL)
    code = (
        "import sys; from mptfoundry.config.load import load_train_config; "
        f"import mptfoundry.explain; load_train_config({path!r}); "
        "print({'torch', 'composer', 'transformers', 'streaming', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_run_is_named_by_its_file_unless_it_says_another_name(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("variables: {name: }", "run_name: ${variables.name}", name="mpt-tiny.yaml")
    assert load_train_config(path)[0].run_name == "mpt-tiny"
    monkeypatch.setenv("RUN_NAME", "from-shell")
    assert load_train_config(path)[0].run_name == "from-shell"
    assert load_train_config(path, ["run_name=mine"])[0].run_name == "mine"


def test_the_model_is_as_long_as_the_run(load: Callable[..., TrainConfig]) -> None:
    config = load()
    assert config.model.max_seq_len == 128
    assert config.model.network().max_seq_len == 128


def test_code_runs_only_when_the_command_line_allows_it(
    load: Callable[..., TrainConfig], problems: Callable[..., tuple[str, ...]]
) -> None:
    code = "code_paths: [mine.py]"
    said = "run.yaml:25: code_paths: names code, which runs only with allow_code=true on the command line."
    assert problems(code) == (said,)
    assert problems(code, "allow_code: true") == (
        "run.yaml:26: allow_code: is only taken from the command line. Remove it from the file.",
    )
    config = load(code, words=("allow_code=true",))
    assert config.code_paths == ("mine.py",)
    assert "allow_code" not in to_yaml(config)


def test_a_config_made_in_python_has_the_same_rules(load: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match="save_folder"):
        replace(load(), autoresume=True)


def test_a_config_is_never_written_to(load: Callable[..., TrainConfig]) -> None:
    with pytest.raises(AttributeError):
        load().seed = 3  # type: ignore[misc]


def test_verbs_read_their_words() -> None:
    words = ["inputs=[a,b]", "out=shards", "tokenizer=tok", "max_seq_len=2048", "workers=3"]
    config = parse_words(words, PrepareConfig)
    assert (config.inputs, config.out, config.workers) == (("a", "b"), "shards", 3)
    words = ['model="runs/a"', "eval_loader.name=text", "eval_loader.dataset.local=x"]
    assert parse_words(words, EvalConfig).eval_loaders["eval"].dataset.local == "x"


def test_workers_and_a_cluster_are_not_given_at_once() -> None:
    words = ["inputs=[a]", "out=shards", "tokenizer=tok", "max_seq_len=2048", "engine=spark"]
    assert parse_words(words, PrepareConfig).engine == "spark"
    with pytest.raises(ConfigError, match=r"workers=3: belongs to this machine, and engine: spark has"):
        parse_words([*words, "workers=3"], PrepareConfig)


def test_verbs_report_all_problems_of_their_words() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_words(["model=runs/a", "dtyp=bf16", "overwrite=maybe"], ExportConfig)
    assert caught.value.problems == (
        "command line: out: is missing. Expected text. Folder to write to.",
        "command line: dtyp=bf16: unknown key. Did you mean dtype?",
        "command line: overwrite=maybe: 'maybe' is not allowed here. Expected true or false.",
    )


@pytest.mark.parametrize(
    ("schema", "word", "said"),
    [
        (EvalConfig, "device_eval_batch_size=0", "0 is too small. Use 1 or more."),
        (EvalConfig, "eval_subset_num_batches=0", "0 batches leave nothing to do. Use -1 for all of them."),
        (EvalConfig, "max_seq_len=0", "0 is too small. Use 1 or more."),
        (EvalConfig, "eval_loader=[{dataset: {local: a}}, {dataset: {local: b}}]", "label: is missing."),
        (PrepareConfig, "workers=0", "0 is too small. Use 1 or more."),
        (PreviewConfig, "samples=-1", "-1 is too small. Use 0 or more."),
        (PreviewConfig, "picture=mix.foo", "mix.foo is not a picture. Use a name that ends in .png."),
    ],
)
def test_what_a_verb_cannot_do_is_refused(schema: type, word: str, said: str) -> None:
    given = {EvalConfig: "model=x", PreviewConfig: "data=x"}
    needed = given.get(schema, "inputs=x out=x tokenizer=x max_seq_len=2").split()
    with pytest.raises(ConfigError) as error:
        parse_words([*needed, word], schema)
    assert str(error.value).startswith(f"command line: {word}: ") and said in str(error.value)


@pytest.mark.parametrize("positions", ["alibi", "rope"])
def test_a_resolved_config_says_which_positions_are_computed(
    load: Callable[..., TrainConfig], positions: str
) -> None:
    switches = ("model.attn_config.alibi=false", "model.learned_pos_emb=true")
    assert "learned_pos_emb: true" in to_yaml(load(words=switches))
    assert "learned_pos_emb: false" in to_yaml(load(words=(*switches, f"model.attn_config.{positions}=true")))


def test_settings_of_evaluation_without_loaders_are_said_to_have_no_effect(write: Callable[..., str]) -> None:
    _, notes = load_train_config(write("eval_interval: 5ba", "eval_first: true"))
    assert notes == [
        "eval_interval: has no effect without eval_loader or icl_tasks.",
        "eval_first: has no effect without eval_loader or icl_tasks.",
    ]


FOUNDRY_EVALUATION = """\
variables: {model_name_or_path: EleutherAI/gpt-neo-125m, precision: fp32}
max_seq_len: 1024
seed: 1
precision: ${variables.precision}
models:
- model_name: ${variables.model_name_or_path}
  model: {name: hf_causal_lm, pretrained_model_name_or_path: x, init_device: mixed, pretrained: true}
  tokenizer: {name: x, kwargs: {model_max_length: 1024}}
device_eval_batch_size: 4
icl_tasks: eval/yamls/tasks.yaml
eval_gauntlet: eval/yamls/eval_gauntlet.yaml
"""


def test_files_that_describe_no_training_are_answered_in_one_sentence(
    problems: Callable[..., tuple[str, ...]],
) -> None:
    [said] = problems(text=FOUNDRY_EVALUATION)
    assert said.startswith("run.yaml:5: models: this file describes an evaluation, not a training.")
    [said] = problems(text="name: run\ncompute: {gpus: 8}\nparameters:\n  seed: 3\ncommand: composer x\n")
    assert said.startswith("run.yaml:3: parameters: this is a platform's job file.")
