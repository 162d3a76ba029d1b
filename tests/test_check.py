"""`check` judges a file: what another machine may have is a line, what disagrees is an error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from mptfoundry.check import check, planned_device, refuse_here
from mptfoundry.cli import main
from mptfoundry.config.load import load_train_config
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError, DataError, MPTFoundryError
from mptfoundry.forecast.constants import SIZES
from mptfoundry.plan.devices import GIB, Device
from mptfoundry.plan.gpus import Visible
from mptfoundry.ranks import report

# llm-foundry's pretraining files for MPT, with all the keys that they have.
FOUNDRY = """\
variables:
  data_local: ./my-copy-c4
  data_remote:
  tokenizer_name: EleutherAI/gpt-neox-20b
  global_seed: 17
  max_seq_len: 2048
  run_name:
max_seq_len: ${variables.max_seq_len}
run_name: ${variables.run_name}
model:
  name: mpt_causal_lm
  init_device: meta
  d_model: SIZE
  n_heads: HEADS
  n_layers: LAYERS
  expansion_ratio: 4
  max_seq_len: ${variables.max_seq_len}
  vocab_size: 50368
  attn_config:
    attn_impl: flash
  loss_fn: fused_crossentropy
tokenizer:
  name: ${variables.tokenizer_name}
  kwargs:
    model_max_length: ${variables.max_seq_len}
train_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    remote: ${variables.data_remote}
    split: train
    shuffle: true
    max_seq_len: ${variables.max_seq_len}
    shuffle_seed: ${variables.global_seed}
  drop_last: true
  num_workers: 8
eval_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    remote: ${variables.data_remote}
    split: val
    shuffle: false
    max_seq_len: ${variables.max_seq_len}
    shuffle_seed: ${variables.global_seed}
  drop_last: false
  num_workers: 8
scheduler:
  name: cosine_with_warmup
  t_warmup: 100ba
  alpha_f: 0.1
optimizer:
  name: decoupled_adamw
  lr: 6.0e-4
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.0
algorithms:
  gradient_clipping:
    clipping_type: norm
    clipping_threshold: 1.0
max_duration: 4800ba
eval_interval: 500ba
eval_first: false
eval_subset_num_batches: -1
global_train_batch_size: 256
seed: ${variables.global_seed}
device_eval_batch_size: 16
device_train_microbatch_size: 16
precision: amp_bf16
fsdp_config:
  sharding_strategy: FULL_SHARD
  mixed_precision: PURE
  activation_checkpointing: false
  activation_checkpointing_reentrant: false
  activation_cpu_offload: false
  limit_all_gathers: true
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks:
  speed_monitor:
    window_size: 10
  lr_monitor: {}
  memory_monitor: {}
  runtime_estimator: {}
"""
CPU = Device("cpu", "CPU", memory=16 * GIB, found="no GPU found")

Load = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no GPU, and no launcher has said how many processes there are."""
    for name in ("WORLD_SIZE", "RUN_NAME", "COMPOSER_RUN_NAME", "TRITON_INTERPRET", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mptfoundry.plan.devices.visible_gpus", lambda *_: Visible((), "no GPU found"))


@pytest.fixture
def tiny(tiny_run: Path) -> Load:
    """The config of a tiny run whose data and tokenizer lie here, with words of the command line."""
    return lambda *words: load_train_config(tiny_run, words)[0]


def here(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("here: ")]


@pytest.mark.parametrize("size", SIZES)
def test_foundrys_files_are_planned_without_a_gpu_as_they_ask(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = FOUNDRY
    for word, number in zip(("SIZE", "HEADS", "LAYERS"), SIZES[size], strict=True):
        text = text.replace(word, str(number))
    Path("run.yaml").write_text(text)
    assert main(["check", "run.yaml"]) == 0
    printed = capsys.readouterr().out
    lines = here(printed)
    assert [line for line in lines if "attn_impl: flash can't be used: it needs a GPU" in line]
    assert [line for line in lines if "precision: amp_bf16 needs a GPU" in line]
    assert [line for line in lines if "the folder my-copy-c4 is missing" in line]
    assert all("train refuses this here" in line for line in lines if "needs a GPU" in line)
    assert "4,800 batches" in printed


def test_a_plan_is_made_in_the_dtype_that_is_asked_for(tiny: Load) -> None:
    def activations(*words: str) -> float:
        text = check(tiny("global_train_batch_size=64", "model.d_model=512", "model.n_layers=8", *words))
        return float(text.split("activations ")[1].split(",")[0])

    assert activations("precision=amp_bf16", "device_train_microbatch_size=64") == pytest.approx(
        activations("precision=fp32", "device_train_microbatch_size=64") / 2, abs=0.02
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["precision=amp_bf16"], "precision: amp_bf16 needs a GPU"),
        (["precision=amp_fp16"], "precision: amp_fp16 needs a GPU"),
        (
            ["model.attn_config.attn_impl=triton", "model.head_dim=16"],
            "model.attn_config.attn_impl: triton can't be used",
        ),
        (["loggers.mlflow={}"], "loggers.mlflow: needs the package mlflow: pip install mlflow"),
        (["loggers.cometml={}"], "loggers.cometml: needs the package comet_ml: pip install 'comet_ml>=3.58'"),
        (["loggers.wandb={}"], "loggers.wandb: needs the package wandb: pip install 'wandb<0.28'"),
        (["tokenizer.name=./nowhere"], "tokenizer.name: ./nowhere is not a folder"),
        (
            ["tokenizer.name=some/name"],
            "tokenizer.name: some/name is neither a folder nor in the Hugging Face",
        ),
        (
            ["train_loader.dataset.streams.a.local=/nowhere"],
            "train_loader.dataset.streams.a: the folder /nowhere is missing",
        ),
        (["eval_loader={name: text, dataset: {local: /nowhere}}"], "eval_loader eval.dataset: the folder"),
        (["code_paths=[nowhere.py]", "allow_code=true"], "code_paths: nowhere.py is missing"),
    ],
)
def test_what_only_this_machine_lacks_is_a_line_that_train_refuses(
    words: list[str], said: str, tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("mlflow", "comet_ml", "wandb"):  # whatever is installed
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tiny(*words)
    lines = here(check(config))
    assert [line for line in lines if line.startswith(f"here: {said}") and "train refuses this here" in line]
    with pytest.raises(MPTFoundryError) as refused:
        refuse_here(config)
    assert said in str(refused.value)


def test_a_run_whose_machine_has_all_of_it_is_not_told_of_anything(tiny: Load) -> None:
    assert here(check(tiny())) == []
    refuse_here(tiny())


@pytest.mark.parametrize(
    ("words", "said", "kind"),
    [
        (
            ["model.vocab_size=300"],
            r"^model\.vocab_size: 300 is smaller than the tokenizer's 372",
            ConfigError,
        ),
        (
            ["max_seq_len=64"],
            r"^train_loader\.dataset\.streams\.a: the samples of .* have 32 tokens, but max_seq_len is 64",
            DataError,
        ),
        (
            ["train_loader.dataset.split=vall"],
            r"streams\.b: .* has no split 'vall'\. It has train",
            DataError,
        ),
        (
            ["model.attn_config.attn_impl=flash", "model.head_dim=300"],
            "flash can't be used: head_dim is 300, it takes multiples of 8 up to 256. Use auto or torch;",
            ConfigError,
        ),
        (
            ["model.attn_config.attn_impl=flash", "precision=fp32"],
            "flash can't be used: it computes in bfloat16 and float16, not in float32",
            ConfigError,
        ),
    ],
)
def test_what_disagrees_is_an_error_of_check_and_of_train(
    words: list[str], said: str, kind: type[MPTFoundryError], tiny: Load
) -> None:
    config = tiny(*words)
    for judge in (check, refuse_here):
        with pytest.raises(kind, match=said):
            judge(config)


def test_all_that_disagrees_is_said_at_once(tiny: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tiny("model.vocab_size=300", "max_seq_len=64"))
    assert len(str(caught.value).splitlines()) == 3


def test_shards_of_another_tokenizer_are_an_error(tiny: Load, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was prepared with another tokenizer"):
        check(tiny(f"tokenizer.name={tokenizer_folder}"))
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    options = tmp_path / "other" / "tokenizer_config.json"
    given = json.loads(options.read_text()) | {"tokenizer_class": "GPTNeoXTokenizer"}
    options.write_text(json.dumps(given))
    lines = here(check(tiny(f"tokenizer.name={tmp_path}/other")))
    assert len(lines) == 2 and "seems to be prepared with another tokenizer" in lines[0]


def test_a_damaged_tokenizer_is_an_error(tiny: Load, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    with pytest.raises(ConfigError, match=r"tok holds neither tokenizer\.json nor"):
        check(tiny(f"tokenizer.name={tmp_path}/tok"))
    for content in ("{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'):
        (tmp_path / "tok" / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.name: .*/tok can't be read"):
            check(tiny(f"tokenizer.name={tmp_path}/tok"))


def test_a_tokenizer_of_the_hubs_cache_is_looked_at(
    tiny: Load, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--name"
    shutil.copytree(shards / "tokenizer", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert here(check(tiny("tokenizer.name=some/name"))) == []
    with pytest.raises(ConfigError, match="300 is smaller than the tokenizer's 372 ids"):
        check(tiny("tokenizer.name=some/name@abc", "model.vocab_size=300"))


def test_a_start_that_is_not_here_is_a_line_that_train_does_not_refuse_before_it_looks(tiny: Load) -> None:
    config = tiny("load_path=runs/{run_name}/nowhere.pt")
    [line] = here(check(config))
    assert line.startswith(
        "here: load_path: runs/tiny/nowhere.pt is not on this machine; train needs it unless"
    )
    refuse_here(config)


def test_what_one_machine_of_several_lacks_is_said_there(
    tiny: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_here(tiny("precision=amp_bf16"))
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    report(refused.value)
    assert capsys.readouterr().err.startswith("rank 8: error: precision: amp_bf16 needs a GPU.")


def test_a_tokenizer_that_the_hub_has_is_said_to_be_fetched(
    tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    [line] = here(check(tiny("tokenizer.name=some/name")))
    assert line == "here: tokenizer.name: some/name is not on this machine; train fetches it from the hub"
    refuse_here(tiny("tokenizer.name=some/name"))


def test_the_epochs_of_each_stream_are_said(tiny: Load, shards: Path) -> None:
    samples = {
        name: sum(
            shard["samples"]
            for shard in json.loads((shards / name / "train/index.json").read_text())["shards"]
        )
        for name in ("a", "b")
    }
    text = check(tiny("max_duration=100ba"))
    for name, share in (("a", 0.75), ("b", 0.25)):
        epochs = 100 * 8 * share / samples[name]
        assert f"{name}/train: {samples[name]:,} samples, read {epochs:.3g} times" in text
    mixed = [f"train_loader.dataset.streams.{name}.proportion=null" for name in ("a", "b")]
    mixed.append("train_loader.dataset.streams.a.repeat=2")
    text = check(tiny("max_duration=3ep", *mixed))
    epoch = 2 * samples["a"] + samples["b"]
    assert "read 6 times" in text and "read 3 times" in text
    assert f"3 epochs, about {3 * (epoch // 8):,} batches" in text


def test_a_model_that_does_not_fit_is_said_in_a_line(tiny: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model.d_model=8192", "model.n_layers=60", "model.n_heads=64"]
    lines = here(check(tiny(*words)))
    assert len(lines) == 1 and "the model does not fit: it needs about " in lines[0]


def test_a_batch_that_does_not_split_over_this_machines_gpus_is_planned_for_fewer(
    tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = Device("gpu", "GPU", 3, 3, 80 * GIB, has_bf16=True)
    device, problem = planned_device(tiny(), three)
    assert device.count == 2 and problem is not None
    assert problem.startswith("global_train_batch_size: 8 does not split over 3 devices")
    device, problem = planned_device(tiny("fsdp_config.data_parallel_shard_degree=4"), CPU)
    assert device.count == 4 and "are not the 1 devices" in str(problem)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="does not split over 4 devices"):
        planned_device(tiny("global_train_batch_size=9"), Device("gpu", "GPU", 4, 4))


FINETUNING = "{{name: finetuning, dataset: {{{keys}}}}}"


def finetuning(tiny: Load, keys: str) -> TrainConfig:
    return tiny("train_loader=null", f"train_loader={FINETUNING.format(keys=keys)}")


def test_finetuning_names_the_real_files(tiny: Load, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "data").mkdir()
    for name in ("train-0.jsonl", "train-1.jsonl", "train-2.jsonl", "val-0.jsonl"):
        (tmp_path / "data" / name).write_text("{}\n")
    keys = f"hf_name: json, hf_kwargs: {{data_files: {tmp_path}/chat.jsonl}}, split: train"
    assert f"train  {tmp_path}/chat.jsonl\n" in check(finetuning(tiny, keys))
    text = check(finetuning(tiny, f"hf_name: {tmp_path}/data, split: train"))
    assert f"{tmp_path}/data/train-0.jsonl, {tmp_path}/data/train-1.jsonl and 1 more files\n" in text


@pytest.mark.parametrize(
    "keys",
    [
        "hf_name: ./nowhere.jsonl",
        "local: nowhere",
        "hf_name: json, hf_kwargs: {data_files: nowhere.jsonl}, split: train",
    ],
)
def test_records_that_are_not_here_are_a_line(keys: str, tiny: Load) -> None:
    config = finetuning(tiny, keys)
    [line] = here(check(config))
    assert "there is no such file" in line
    with pytest.raises(DataError, match="there is no such file"):
        refuse_here(config)


def test_an_empty_folder_of_records_is_an_error(tiny: Load, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/data"):
        check(finetuning(tiny, f"hf_name: {tmp_path}/data"))


def test_data_of_the_hub_or_of_a_store_is_not_looked_for(tiny: Load) -> None:
    assert here(check(finetuning(tiny, "hf_name: some/data, split: train"))) == []
    remote = "train_loader.dataset.streams.a={remote: s3://bucket/a, local: /nowhere, proportion: 1}"
    assert here(check(tiny(remote))) == []


def test_a_stores_index_in_the_cache_is_looked_at(tiny: Load, shards: Path) -> None:
    remote = f"train_loader.dataset.streams.a={{remote: s3://bucket/a, local: {shards}/a, proportion: 1}}"
    assert "s3://bucket/a/train: " in check(tiny(remote))
    with pytest.raises(DataError, match="have 32 tokens, but max_seq_len is 16"):
        check(tiny(remote, "max_seq_len=16"))


FOUNDRY_FINETUNING = """\
variables: {tokenizer_name: mosaicml/mpt-30b, global_seed: 17, max_seq_len: 8192, run_name: }
max_seq_len: ${variables.max_seq_len}
run_name: ${variables.run_name}
model:
  name: hf_causal_lm
  pretrained: true
  pretrained_model_name_or_path: mosaicml/mpt-30b
  init_device: mixed
  config_overrides:
    max_seq_len: ${variables.max_seq_len}
    attn_config: {attn_impl: flash, attn_uses_sequence_id: false}
tokenizer: {name: "${variables.tokenizer_name}", kwargs: {model_max_length: "${variables.max_seq_len}"}}
train_loader:
  name: finetuning
  dataset:
    hf_name: json
    hf_kwargs: {data_dir: /path/to/data/dir/}
    preprocessing_fn: my.import.path:my_preprocessing_fn
    split: train
    max_seq_len: ${variables.max_seq_len}
    packing_ratio: 9
    shuffle: true
scheduler: {name: linear_decay_with_warmup, t_warmup: 50ba, alpha_f: 0}
optimizer: {name: decoupled_lionw, lr: 5.0e-7, betas: [0.9, 0.95], weight_decay: 0}
max_duration: 2ep
global_train_batch_size: 72
device_train_microbatch_size: 1
precision: amp_bf16
fsdp_config: {sharding_strategy: FULL_SHARD, state_dict_type: local}
"""
FOUNDRY_EVALUATION = """\
tokenizer_name: EleutherAI/gpt-neox-20b
max_seq_len: 1024
precision: amp_fp16
models:
- model_name: mpt_test
  tokenizer: {name: "${tokenizer_name}", kwargs: {model_max_length: "${max_seq_len}"}}
  model: {name: mpt_causal_lm, d_model: 768, n_heads: 12, n_layers: 12, vocab_size: 50368}
load_path:
device_eval_batch_size: 16
fsdp_config: {sharding_strategy: FULL_SHARD}
icl_tasks:
- {label: piqa, dataset_uri: eval/piqa.jsonl, num_fewshot: [5], icl_task_type: multiple_choice}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            FOUNDRY_FINETUNING,
            [
                "here: model.pretrained_model_name_or_path: mosaicml/mpt-30b: is neither a folder nor in the",
                "here: train_loader.dataset.preprocessing_fn: names code, which runs only with",
                "here: model.attn_config.attn_impl: flash can't be used: it needs a GPU",
                "29,957,200,896 parameters: 48 layers, width 7168, 64 heads",
            ],
        ),
        (FOUNDRY_EVALUATION, ["here: models[0].load_path: is blank.", "1 tasks with their numbers"]),
    ],
)
def test_foundrys_other_files_pass_and_their_misspelt_copies_do_not(
    text: str,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("run.yaml").write_text(text)
    assert main(["check", "run.yaml"]) == 0
    printed = capsys.readouterr().out
    assert [each for each in said if each not in printed] == []
    Path("run.yaml").write_text(text.replace("\nprecision:", "\nprecisions:"))
    assert main(["check", "run.yaml"]) == 2
    assert "precisions: unknown key" in capsys.readouterr().err


def test_of_a_base_that_nobody_knows_here_no_numbers_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "run.yaml").write_text(FOUNDRY_FINETUNING.replace("mosaicml/mpt-30b", "some/mpt"))
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "the size of some/mpt is not known here" in printed and "parameters" not in printed


def test_the_stricter_question_has_its_exit_code(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_run), "here=true"]) == 0
    assert main(["check", str(tiny_run), "here=true", "precision=amp_bf16"]) == 1
    printed = capsys.readouterr()
    assert "here: precision: amp_bf16 needs a GPU" in printed.out and "error: here=true: train" in printed.err
    assert main(["check", str(tiny_run), "precision=amp_bf16"]) == 0


def test_a_cluster_that_is_elsewhere_is_planned_from_the_table_of_gpus(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_run), "gpu=h100", "model.head_dim=64", "fsdp_config={}"]
    assert main(["check", *words, "gpus=16", "global_train_batch_size=32"]) == 0
    printed = capsys.readouterr().out
    assert "16 x NVIDIA H100 80GB HBM3 (as asked, 8 on a machine)" in printed and here(printed) == []
    for line in (r"precision += amp_bf16", r"attn_impl += triton", r"fsdp_config += 16 shards"):
        assert re.search(line, printed)
    assert re.search(r"init_device += meta", printed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=h100"], "Add gpus=64."),
        (["gpus=8"], "Add gpu=h100."),
        (["gpu=h1000", "gpus=8"], "h1000 is not in the table of GPUs. Use one of"),
        (["gpu=h100", "gpus=12"], "12 are not whole machines of 8 GPUs"),
        (["gpu=h100", "gpus=8", "here=true"], "asks about this machine"),
        (["gpu=h100", "gpus=16"], "8 does not split over 16 devices"),
        (["gpu=h100", "gpus=-1"], "-1 is too small"),
    ],
)
def test_a_cluster_that_can_not_be_is_an_error(
    words: list[str], said: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_run), *words]) == 2
    assert said in capsys.readouterr().err
