"""What a user sees: help at once, errors in a sentence, each said once under the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.cli import VERBS, main
from mptfoundry.errors import CheckpointError
from tests.nvidia_smi import gpu_row, put_nvidia_smi
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "mpt-tiny.yaml")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert VERBS[verb].example in printed and VERBS[verb].words in printed


def test_help_lists_what_a_verb_takes_and_no_more(capsys: Capture) -> None:
    for verb, has, lacks in (("chat", "system", "prompts"), ("generate", "prompts", "system")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        printed = capsys.readouterr().out
        assert f"  {has}: " in printed and f"  {lacks}: " not in printed


def test_check_prints_the_run(capsys: Capture) -> None:
    assert main(["check", TINY, "max_duration=7ba"]) == 0
    printed = capsys.readouterr().out
    assert "4,196,608 parameters" in printed and "7 batches" in printed and "attn_impl" in printed


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["chekc", "a.yaml"], 2, "error: chekc: there is no such verb. Did you mean check?"),
        (["check"], 2, "error: no config named."),
        (["check", "nowhere.yaml"], 2, "error: nowhere.yaml: there is no such file."),
        (["check", TINY, "max_duration"], 2, "'max_duration' is not of the form key=value"),
        (["check", TINY, "optimizer.lrr=1"], 2, "optimizer.lrr=1: unknown key. Did you mean lr?"),
        (["explain", "optimizer.lrr"], 2, "there is no such key. Did you mean optimizer.lr"),
        (["explain", "a", "b"], 2, "explain: takes one key"),
        (["generate", "model"], 2, "prompts: none is given"),
        (["generate", "model", "file::nowhere.txt"], 2, "prompts: file::nowhere.txt can't be read"),
        (["generate", "model", "a", "stop=['']"], 2, "an empty text would end each continuation at once"),
        (
            ["generate", "model", "a", "system=b"],
            2,
            "system=b: is not supported: only a chat begins with it.",
        ),
        (
            ["chat", "model", "prompts=[a]"],
            2,
            "prompts=[a]: is not supported: a chat asks for each line itself.",
        ),
        (["export", "nowhere", "out", "more"], 2, "more: is not key=value"),
        (["export", "nowhere", "out"], 1, "nowhere: no such file or folder"),
        (
            ["export", "a", "b", "adapter=separate", "license=mit"],
            2,
            "license=mit: has no effect",
        ),
        (["eval", "nowhere"], 1, "nowhere: no such file or folder"),
        (["preview", "nowhere"], 1, "nowhere"),
        (["prepare", "nowhere", "out=o", "tokenizer=t"], 2, "max_seq_len: is missing"),
    ],
)
def test_bad_words_are_answered_in_a_sentence(
    words: list[str], code: int, said: str, capsys: Capture
) -> None:
    assert main(words) == code
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err


def test_a_prompt_may_hold_an_equals_sign(shards: Path, capsys: Capture) -> None:
    assert main(["generate", "nowhere", "x = 1", "y=2 and", "seed=3"]) == 2
    assert "unknown key" in capsys.readouterr().err
    assert main(["generate", "nowhere", "x = 1", "seed=3"]) == 1


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_generates_in_bfloat16_only_if_it_has_it(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, **options: Any) -> None:
        asked.append(options["dtype"])
        raise CheckpointError("read no further.")

    asked: list[torch.dtype] = []
    monkeypatch.setattr("mptfoundry.checkpoints.reading.load_network", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert main(["generate", "nowhere", "a"]) == 1
    assert asked == [torch.bfloat16 if has_bf16 else torch.float32]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from mptfoundry.errors import ConfigError

    monkeypatch.setenv("MPTFOUNDRY_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["check", "nowhere.yaml"])


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of scripts/train.py on the tiny config."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", "scripts/train.py", TINY]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def words_of(shards: Path) -> list[str]:
    """The tiny config on data that lies here."""
    return [
        f"tokenizer.name={shards}/tokenizer",
        "max_seq_len=32",
        "train_loader.dataset.streams=null",
        f"train_loader.dataset.local={shards}/a",
        "eval_loader=null",
    ]


def test_an_error_of_all_ranks_is_printed_once() -> None:
    done = launch("optimizer.lrr=1")
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("optimizer.lrr=1: unknown key") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_data_missing_on_all_ranks_is_said_once(shards: Path, tmp_path: Path) -> None:
    words = [*words_of(shards), f"save_folder={tmp_path}", "train_loader.dataset.split=nowhere"]
    done = run_on_ranks("scripts/train.py", TINY, *words)
    assert done.returncode == 1
    assert done.stdout.count("nowhere") > 0
    assert done.stdout.count("error: ") == 1
    assert "Traceback" not in done.stdout


def test_an_error_of_one_rank_names_the_rank(shards: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "import os, time\nfrom mptfoundry.errors import DataError\n"
        "if os.environ['RANK'] == '1':\n    raise DataError('the disk is full.')\n"
        "time.sleep(60)\n"
    )
    words = [*words_of(shards), f"code_paths=[{code}]", "allow_code=true", f"save_folder={tmp_path}/run"]
    done = run_on_ranks("scripts/train.py", TINY, *words)
    assert done.returncode != 0
    assert "rank 1: error: the disk is full." in done.stdout
    assert "code_paths: running" in done.stdout


def test_two_ranks_train_as_one(shards: Path, tmp_path: Path) -> None:
    """The same samples in every batch, and the same losses up to rounding."""
    from mptfoundry.run.metrics_file import read_rows

    words = [f"tokenizer.name={shards}/tokenizer", "max_seq_len=32", "model.d_model=32", "model.n_heads=4"]
    words += ["train_loader.dataset.streams=null", f"train_loader.dataset.local={shards}/a"]
    words += ["train_loader.dataset.num_canonical_nodes=2", "max_duration=3ba", "eval_loader=null"]
    losses = []
    for ranks in ("1", "2"):
        name = f"save_folder={tmp_path}/{ranks}"
        if ranks == "1":
            assert main(["train", TINY, *words, name]) == 0
        else:
            done = run_on_ranks("scripts/train.py", TINY, *words, name)
            assert done.returncode == 0, done.stdout
        rows = read_rows(tmp_path / ranks / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_torchruns_name_for_the_number_of_a_machine_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NODE_RANK", raising=False)
    monkeypatch.setenv("GROUP_RANK", "3")
    assert main(["explain", "seed"]) == 0
    assert os.environ["NODE_RANK"] == "3"


@pytest.mark.parametrize("words", [["eval", "nowhere"], ["generate", "nowhere", "x"], ["chat", "nowhere"]])
def test_a_gpu_that_torch_cannot_use_is_refused_before_a_model_is_opened(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, [gpu_row("Tesla K80", "3.7", "470.82.01")])
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: torch: version ") and "has no code for the Tesla K80" in said


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("omegaconf", None, "omegaconf is not installed. Install all that mptfoundry needs: "),
        (
            "omegaconf",
            "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ImportError('outer') from error",
            "fails here: division by zero. Install packages that fit together: ",
        ),
        ("omegaconf", "from missing_parser import parse", "fails here: No module named 'missing_parser'."),
    ],
)
def test_a_failing_import_is_one_sentence(module: str, text: str | None, said: str, tmp_path: Path) -> None:
    """The innermost cause, and the command that installs a tested set."""
    shadow = text if text is not None else "raise ModuleNotFoundError('gone', name=__name__)"
    (tmp_path / f"{module}.py").write_text(shadow)
    paths = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "mptfoundry.cli", "check", TINY]
    done = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "pip install --no-deps -r" in done.stderr
    assert "Traceback" not in done.stderr
