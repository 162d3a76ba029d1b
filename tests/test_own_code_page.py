"""The examples of docs/guide/your-own-code.md, as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mptfoundry import plugins
from mptfoundry.build import build_optimizer
from mptfoundry.cli import main
from mptfoundry.config.load import load_saved_config, load_train_config
from mptfoundry.errors import ConfigError
from mptfoundry.evals.token_loss import TokenAccuracy
from mptfoundry.loaders import build_loader
from mptfoundry.models.own_metrics import make_metric
from mptfoundry.mpt.attention import BACKENDS
from mptfoundry.mpt.position import AttentionContext, alibi_slopes
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.tokenizer import load_tokenizer
from mptfoundry.train import train
from tests.conftest import ROOT
from tests.loaders import context_of

PAGE = (ROOT / "docs/guide/your-own-code.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:] if "```python" in part}
TABLES = {
    "An optimizer": "optimizers",
    "A schedule": "schedulers",
    "A callback": "callbacks",
    "A logger": "loggers",
    "An algorithm": "algorithms",
    "Metrics": "metrics",
    "A dataset": "datasets",
    "A record format": "record_formats",
    "An attention backend": "attention_backends",
}
TOGETHER = [title for title in TABLES if title not in ("A dataset", "A record format")]


@pytest.fixture(autouse=True)
def no_own_code() -> Iterator[None]:
    """Tables without what a test wrote into them."""
    yield
    for table in (*plugins.TABLES.values(), plugins.hashes):
        table.clear()


def block(title: str, language: str) -> str:
    """The block of a language in a section of the page."""
    found = re.search(rf"```{language}\n(.*?)```", SECTIONS[title], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def write(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes the code of some sections, and a tiny run with what they add to its config."""
    monkeypatch.chdir(tmp_path)

    def write_files(*titles: str, **more: Any) -> str:
        run = yaml.safe_load(tiny_run.read_text()) | {"code_paths": []}
        for number, title in enumerate(titles):
            Path(f"mine{number}.py").write_text(block(title, "python"))
            run["code_paths"].append(f"mine{number}.py")
            added = yaml.safe_load(block(title, "yaml"))
            run["model"]["attn_config"] |= added.pop("model", {}).get("attn_config", {})
            run |= added
        Path("run.yaml").write_text(yaml.safe_dump(run | more))
        return "run.yaml"

    return write_files


def test_the_page_has_an_example_for_each_table() -> None:
    assert set(TABLES.values()) == set(plugins.TABLES)
    assert set(SECTIONS) == {*TABLES, "Files that were written for llm-foundry"}
    for name in plugins.TABLES:
        assert f"| `{name}` |" in PAGE


def test_a_run_with_all_of_them_trains_resumes_is_evaluated_and_exported(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = {"name": "text", "num_workers": 0, "drop_last": False}
    config = write(*TOGETHER)
    dataset = yaml.safe_load(Path(config).read_text())["train_loader"]["dataset"]["streams"]["a"]["local"]
    loader |= {"dataset": {"local": dataset, "split": "train", "epoch_size": 24}}
    config = write(*TOGETHER, eval_loader=loader, eval_interval="1ba", save_interval="1ba")
    words = ["allow_code=true", "run_name=own", "max_duration=1ba"]
    trainer = train(load_train_config(config, words)[0])
    assert type(trainer.state.optimizers[0]).__name__ == "SignSGD"
    train(load_train_config(config, [*words[:2], "max_duration=2ba"])[0])
    folder = tmp_path / "own"
    measured = [row["eval"]["eval"] for row in read_rows(folder / "metrics.jsonl") if "eval" in row][-1]
    assert measured["TokenAccuracy"] <= measured["top_k"] <= 1 and measured["largest_logit"] > 0
    logged = {line.split("\t")[1] for line in Path("table.tsv").read_text().splitlines()}
    assert {"weights/norm", "metrics/eval/top_k"} <= logged
    saved = load_saved_config(folder / "config.yaml")
    assert saved.model.attn_config.attn_impl == "plain" and len(saved.code_hashes) == len(TOGETHER)

    capsys.readouterr()
    assert main(["eval", str(folder), "allow_code=true", "out=with.json"]) == 0
    said = capsys.readouterr()
    assert "code_paths: running mine0.py (sha256 " in said.err
    found = json.loads(Path("with.json").read_text())["results"]["eval"]
    assert found["top_k"] == pytest.approx(measured["top_k"]) and found["largest_logit"] > 0
    for table in plugins.TABLES.values():
        table.clear()
    assert main(["eval", str(folder), "out=without.json"]) == 0
    said = capsys.readouterr()
    assert f"of {folder} does not run here; allow_code=true runs it." in said.err and not plugins.metrics
    without = json.loads(Path("without.json").read_text())["results"]["eval"]
    assert without == {key: value for key, value in found.items() if key not in ("top_k", "largest_logit")}

    Path("mine0.py").write_text(block("An optimizer", "python") + "\n# changed\n")
    assert main(["export", str(folder), "hf", "allow_code=true"]) == 0
    assert "note: code_paths: mine0.py has changed since the run saved its config" in capsys.readouterr().err
    assert main(["generate", str(folder), "a", "max_new_tokens=2", "code_paths=[mine1.py]"]) == 2
    assert "code_paths=[mine1.py]: names code, which runs only with" in capsys.readouterr().err
    Path("mine0.py").unlink()
    assert main(["generate", str(folder), "a", "max_new_tokens=2", "allow_code=true"]) == 2
    assert "code_paths: names a file that is missing here." in capsys.readouterr().err
    words = ["allow_code=true", "attn_impl=plain", "temperature=0", "max_new_tokens=2"]
    words += ["code_paths=[mine6.py]"]
    assert main(["generate", str(folder), "a", *words]) == 0


def test_a_run_trains_on_the_dataset(write: Callable[..., str], tmp_path: Path) -> None:
    for name, tokens in (("train.bin", 20 * 32), ("val.bin", 9 * 32 + 5)):
        np.random.default_rng(tokens).integers(0, 384, tokens, np.uint16).tofile(name)
    words = ["allow_code=true", "run_name=own", "train_loader.num_workers=0", "eval_loader.num_workers=0"]
    run, _ = load_train_config(write("A dataset"), [*words, "max_duration=2ba"])
    trainer = train(run)
    assert trainer.state.timestamp.token == 2 * 8 * 32
    assert trainer.state.eval_metrics["eval"]["tokens"].compute() == 9 * 31
    loader: Any = trainer.state.train_dataloader
    batch = next(iter(loader))
    ids = np.fromfile("train.bin", np.uint16).reshape(20, 32)[batch["sample_id"]]
    assert (batch["input_ids"].numpy() == ids).all()
    assert "token_file: path 'train.bin'" in (tmp_path / "own/report.md").read_text()
    assert main(["export", str(tmp_path / "own"), "hf"]) == 0


def test_a_record_format_is_read_and_made_again_when_its_code_changes(write: Callable[..., str]) -> None:
    Path("talk.tsv").write_text("prompt\tresponse\n" + "".join(f"say {n}\t{n}\n" for n in range(6)))
    config = write("A record format", global_train_batch_size=2)
    for times in (1, 2):
        run, _ = load_train_config(config, ["allow_code=true"])
        tokenizer = load_tokenizer(run.tokenizer.name, max_seq_len=32)
        batch = next(iter(build_loader(run.train_loader, context_of(tokenizer, max_seq_len=32)).dataloader))
        assert (batch["labels"] != -100).any()
        assert len([path for path in Path("examples").iterdir() if len(path.name) == 32]) == times
        Path("mine0.py").write_text(block("A record format", "python") + "\n# changed\n")


def test_a_record_format_that_fails_says_where(write: Callable[..., str]) -> None:
    Path("talk.tsv").write_text("prompt\tresponse\na\tb\n")
    config = write("A record format")
    code = block("A record format", "python").replace("    with", '    yield {"prompt": 1 / 0}\n    with')
    Path("mine0.py").write_text(code)
    run, _ = load_train_config(config, ["allow_code=true"])
    with pytest.raises(Exception, match=r"talk.tsv: its format of your own fails after record 0: ZeroDiv"):
        build_loader(run.train_loader, context_of(load_tokenizer(run.tokenizer.name), max_seq_len=32))


def test_the_attention_backend_computes_what_ours_do(write: Callable[..., str]) -> None:
    run, _ = load_train_config(write("An attention backend"), ["allow_code=true"])
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 12, 4, 8) for _ in range(3))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    context = AttentionContext(scale=0.3, slopes=alibi_slopes(4, 8, torch.device("cpu")), documents=documents)
    own = plugins.attention_backends[run.model.attn_config.attn_impl]
    expected = BACKENDS["torch"].attend(query, key, value, context)
    torch.testing.assert_close(own.attend(query, key, value, context), expected)
    with pytest.raises(ConfigError, match=r"plan: .plan. is not allowed here. Did you mean plain\?"):
        load_train_config("run.yaml", ["allow_code=true", "model.attn_config.attn_impl=plan"])
    from mptfoundry.check import check

    run, _ = load_train_config("run.yaml", ["allow_code=true", "model.attn_config.sliding_window_size=4"])
    assert "attn_impl: plain can't be used: it is for plain ALiBi." in check(run)


def test_a_function_of_logits_and_labels_is_averaged_over_tokens(write: Callable[..., str]) -> None:
    load_train_config(write("Metrics"), ["allow_code=true"])
    metric, ours = make_metric("top_k", plugins.metrics["top_k"], {"k": 1}), TokenAccuracy()
    torch.manual_seed(0)
    for rows in (3, 1):
        labels = torch.randint(0, 3, (rows, 6))
        labels[:, 4:] = -100
        logits = torch.randn(rows, 6, 3)
        correct = torch.zeros(rows, 6, dtype=torch.bool)
        correct[:, :-1] = logits[:, :-1].argmax(-1) == labels[:, 1:]
        fields = {"logits": logits, "token_loss": torch.zeros(rows, 6), "token_correct": correct}
        outputs = type("Outputs", (), fields)
        metric.update({"labels": labels}, outputs)
        ours.update({"labels": labels}, outputs)
    assert metric.compute() == ours.compute()
    wrong = make_metric("mean", lambda logits, labels: logits.mean(), {})
    with pytest.raises(
        ConfigError, match=r"eval_metrics.mean: has to return a number for each of \d+ tokens"
    ):
        wrong.update({"labels": labels}, outputs)
    with pytest.raises(ConfigError, match=r"eval_metrics.top_kk: is not known. Did you mean top_k\?"):
        load_train_config("run.yaml", ["allow_code=true", "eval_metrics={top_kk: {}}"])


def test_a_file_for_llm_foundry_registers_with_us(write: Callable[..., str]) -> None:
    import sys

    run, _ = load_train_config(write("Files that were written for llm-foundry"), ["allow_code=true"])
    assert set(plugins.callbacks) == {"quiet"} and not any("llmfoundry" in name for name in sys.modules)
    from types import SimpleNamespace

    model: Any = SimpleNamespace(model=torch.nn.Linear(2, 2))
    assert build_optimizer(run, model).defaults["lr"] == 1e-2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from llmfoundry.registry import models", "llmfoundry.registry.models has no table here."),
        (
            "from llmfoundry import registry; registry.callbacks.get('x')",
            r"Use register, or mptfoundry\.plugins",
        ),
        ("from llmfoundry import train", "Write into mptfoundry.plugins.TABLE instead."),
        (
            "import llmfoundry.utils.builders",
            "llmfoundry.utils is not here: of llm-foundry a file can import",
        ),
    ],
)
def test_anything_else_of_llm_foundry_names_our_table(
    write: Callable[..., str], line: str, said: str
) -> None:
    config = write("A callback")
    Path("mine0.py").write_text(line)
    with pytest.raises(ConfigError, match=said):
        load_train_config(config, ["allow_code=true"])
