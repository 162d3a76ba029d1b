from __future__ import annotations

from collections.abc import Callable

import pytest

from mptfoundry.config.load import load_train_config

from .conftest import SMALL

Problems = Callable[..., tuple[str, ...]]


def test_a_batch_that_does_not_split_over_the_devices_is_refused(
    problems: Problems, load: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    word = "global_train_batch_size=250"
    assert problems(words=(word,)) == (
        f"command line: {word}: 250 does not split over 8 devices. Use a multiple of 8: 248 or 256.",
    )
    assert problems(words=("global_train_batch_size=4",))[0].endswith("Use a multiple of 8: 8.")
    load(words=("global_train_batch_size=256",))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.max_seq_len=256", "256 is not the max_seq_len of the run, 128."),
        ("train_loader.dataset.max_seq_len=256", "256 is not the max_seq_len of the run, 128."),
        ("train_loader.dataset.shuffle_seed=1", "1 is not the seed of the run, 17."),
        ("tokenizer.kwargs.model_max_length=64", "64 is not the max_seq_len of the run, 128."),
    ],
)
def test_what_is_said_twice_has_to_agree(problems: Problems, word: str, said: str) -> None:
    assert problems(words=(word,)) == (f"command line: {word}: {said} Remove it, or make them equal.",)


def test_what_is_said_twice_may_agree(load: Callable[..., object]) -> None:
    config = load(words=("model.max_seq_len=128", "tokenizer.kwargs.model_max_length=128"))
    assert config.model.max_seq_len == 128


def test_several_evaluation_loaders_need_labels_of_their_own(problems: Problems) -> None:
    data = "dataset: {local: x}"
    more = f"eval_loader: [{{{data}}}, {{label: a, {data}}}, {{label: a, {data}}}]"
    assert problems(more) == (
        "run.yaml:25: eval_loader[0].label: is missing. Each of several loaders needs its own label.",
        "run.yaml:25: eval_loader[2].label: 'a' is another loader's. Use a label of its own.",
    )


def test_one_evaluation_loader_is_called_eval(load: Callable[..., object]) -> None:
    assert [*load("eval_loader: {dataset: {local: x}}").eval_loaders] == ["eval"]
    assert load().eval_loaders == {}


def test_attention_by_document_needs_a_token_that_separates_documents(
    problems: Problems, load: Callable[..., object]
) -> None:
    word = "model.attn_config.attn_uses_sequence_id=true"
    said = problems(words=(word,))
    assert said[0].startswith(
        "run.yaml:13: train_loader.dataset: model.attn_config.attn_uses_sequence_id needs"
    )
    load(words=(word, "train_loader.dataset.eos_token_id=0"))


def test_documents_separated_for_nothing_are_noted(write: Callable[..., str]) -> None:
    _, notes = load_train_config(write(), ["train_loader.dataset.eos_token_id=0"])
    assert "tokens of a packed row see the documents before theirs" in notes[0]


@pytest.mark.parametrize("t_decay", ["95ba", "0.95dur", "97280tok"])
def test_warmup_and_decay_have_to_fit_into_the_run(problems: Problems, t_decay: str) -> None:
    text = SMALL.replace("cosine_with_warmup", "warmup_stable_decay")
    said = problems(f"variables: {{t: {t_decay}}}", text=text, words=(f"scheduler.t_decay={t_decay}",))
    assert said == (
        f"command line: scheduler.t_decay={t_decay}: together with t_warmup: 10ba, {t_decay} is longer than "
        "the run, max_duration: 100ba. Use less.",
    )


def test_a_warmup_that_the_run_cuts_off_is_noted(write: Callable[..., str]) -> None:
    _, notes = load_train_config(write(), ["max_duration=5ba"])
    assert notes == [
        "scheduler.t_warmup: 10ba is longer than the run, max_duration: 5ba: the learning rate never "
        "reaches its peak."
    ]


def test_a_save_folder_makes_a_run_resume(load: Callable[..., object]) -> None:
    assert not load().resumes
    assert load("save_folder: x").resumes
    assert not load("save_folder: x", "save_overwrite: true").resumes
    assert not load("save_folder: x", "save_weights_only: true").resumes
    assert not load("save_folder: x", "autoresume: false").resumes


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["autoresume: true"], "autoresume: needs save_folder, which holds the checkpoint to resume from."),
        (
            ["autoresume: true", "save_folder: x", "save_weights_only: true"],
            "autoresume: needs whole checkpoints. Set save_weights_only: false.",
        ),
        (["eval_subset_num_batches: 0"], "eval_subset_num_batches: 0 batches leave nothing to do."),
        (["device_train_microbatch_size: 0"], "device_train_microbatch_size: 0 is too small. Use 1 or more."),
        (["save_interval: 0ba"], "save_interval: 0ba is not longer than 0. Use more than 0."),
        (
            ["callbacks: {generate_callback: {prompts: [a], top_p: 0}}"],
            "callbacks.generate_callback.top_p: 0.0. Use a number above 0 and up to 1.",
        ),
        (["run_name: ''"], "run_name: is empty. Name the run's folder."),
        (["save_folder: x/{foo}"], "save_folder: {foo} is not a placeholder here. Allowed: {run_name}."),
        (["load_path: 'x/{'"], "load_path: x/{ has an unmatched brace. Remove it."),
        (
            ["save_filename: 'ba{bacth}.pt'"],
            "save_filename: {bacth} is not a placeholder here. Allowed: {",
        ),
        (["save_latest_filename: a/b"], "save_latest_filename: a/b contains a folder."),
    ],
)
def test_values_that_no_run_can_have_are_refused(problems: Problems, lines: list[str], said: str) -> None:
    found = problems(*lines)
    assert len(found) == 1
    assert f"run.yaml:25: {said}" in found[0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_duration=0.5dur", "can't be given in dur, which is a fraction of max_duration. Use batches"),
        ("scheduler.alpha_f=-1", "-1.0 is too small. Use 0 or more."),
        ("scheduler.t_max=50ba", "50ba is shorter than max_duration: 100ba. Use 1dur, the whole run."),
        ("train_loader.dataset.eos_token_id=-1", "-1 is not one of the 50368 ids that the model has."),
        ("train_loader.dataset.bos_token_id=50368", "50368 is not one of the 50368 ids"),
        ("optimizer.disable_grad=(", "( is not a regular expression: missing ), unterminated"),
    ],
)
def test_a_word_that_no_run_can_have_is_refused(problems: Problems, word: str, said: str) -> None:
    (found,) = problems(words=(word,))
    assert said in found


def test_a_wrong_section_does_not_hide_what_is_wrong_between_the_others(problems: Problems) -> None:
    said = problems(words=("optimizer.lr=x", "global_train_batch_size=-2", "model.max_seq_len=7"))
    assert len(said) == 3


@pytest.mark.parametrize(
    ("max_duration", "batches"),
    [("100ba", 100), ("1024tok", 1), ("1025tok", 2), ("17sp", 3), ("2ep", None), ("9sec", None)],
)
def test_batches_are_counted_where_they_do_not_depend_on_the_data(
    load: Callable[..., object], max_duration: str, batches: int | None
) -> None:
    config = load(words=(f"max_duration={max_duration}", "scheduler.t_warmup=0ba"))
    assert config.batches() == batches


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (("model.activation_checkpointing_target=mlp",), "target=mlp", "has no effect without fsdp_config"),
        (
            ("fsdp_config.activation_cpu_offload=true", "compile_config.dynamic=false"),
            "activation_cpu_offload=true",
            "can't be combined with compile_config",
        ),
        (
            (
                "model.activation_checkpointing_target=[norm,act_fn]",
                "fsdp_config={activation_checkpointing: true, activation_cpu_offload: true}",
            ),
            "target=[norm,act_fn]",
            "act_fn can't be offloaded, only recomputed",
        ),
    ],
)
def test_what_sharding_and_activation_checkpointing_cannot_combine_is_refused(
    problems: Problems, words: tuple[str, ...], key: str, said: str
) -> None:
    (problem,) = problems(words=words)
    assert key in problem and said in problem


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/../../b", "/etc/x", "'a\tb'"])
def test_a_run_is_not_called_what_lies_outside_of_the_folder_of_runs(problems: Problems, name: str) -> None:
    (said,) = problems(f"run_name: {name}" if "\t" not in name else 'run_name: "a\\tb"')
    assert "has an empty part, `.` or `..`" in said or "holds a control character" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["save_filename=ep{epoch}-ba{batch}.bin"],
            "would not be found again. Use a name that ends in .pt",
        ),
        (["save_filename=.ep{epoch}-ba{batch}.pt"], "would not be found again"),
        (
            ["save_folder=s3://b/x", "save_filename=my-{batch}.pt"],
            "has no batch number. In a store use ep",
        ),
        (["save_filename=my-{batch}.pt", "save_num_checkpoints_to_keep=2"], "which checkpoint is the oldest"),
        (["save_filename=latest-rank{rank}.pt"], "is the name of the link to the newest checkpoint"),
        (
            ["train_loader.dataset.streams.code.remote=s3://b/a#1"],
            "contains #, and StreamingDataset reads a URL",
        ),
    ],
)
def test_a_name_that_would_lose_data_is_refused(problems: Problems, words: list[str], said: str) -> None:
    assert any(said in problem for problem in problems(words=tuple(words)))
