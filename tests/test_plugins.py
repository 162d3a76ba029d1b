"""Classes of the user's own, under their own names: checked like ours, built, and kept by their hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mptfoundry import build, plugins, ranks
from mptfoundry.check import check_on
from mptfoundry.config.load import load_saved_config, load_train_config, to_yaml
from mptfoundry.errors import ConfigError
from mptfoundry.train import train
from tests.ranks import run_on_ranks

CODE = """
import torch
from composer.core import Callback
from mptfoundry import plugins

class Halved(torch.optim.AdamW):
    def __init__(self, params, lr: float, share: float = 0.5, **kwargs):
        super().__init__(params, lr * share, **kwargs)

class Counts(Callback):
    def __init__(self, every: int = 2, prefix: "str | None" = None):
        self.every, self.prefix = every, prefix

    def batch_end(self, state, logger):
        if state.timestamp.batch.value % self.every == 0:
            logger.log_metrics({f"{self.prefix}/batches": state.timestamp.batch.value})

def constant(factor: float = 1.0):
    return lambda state, ssr=1.0: factor

plugins.optimizers["halved"] = Halved
plugins.callbacks["counts"] = Counts
plugins.schedulers["constant"] = constant
"""
OWN = """
optimizer: {name: halved, lr: 0.01, share: 0.25, weight_decay: 0.1, disable_grad: [norm]}
scheduler: {name: constant, factor: 0.5}
callbacks: {counts: {every: 1, prefix: mine}}
code_paths: [mine.py]
"""


@pytest.fixture(autouse=True)
def no_own_code() -> Iterator[None]:
    """Tables without what a test wrote into them."""
    yield
    for table in plugins.TABLES.values():
        table.clear()


@pytest.fixture
def write(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the file of code and the config of a tiny run that names what is in it."""
    monkeypatch.chdir(tmp_path)
    lines = tiny_run.read_text().splitlines()
    plain = "\n".join(line for line in lines if not line.startswith(("optimizer", "scheduler")))

    def write_files(own: str = OWN, code: str = CODE) -> Path:
        Path("mine.py").write_text(code)
        tiny_run.write_text(f"{plain}{own}")
        return tiny_run

    return write_files


def problems(config: Path, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_train_config(config, words)
    return [problem.partition(": ")[2] for problem in caught.value.problems]


def test_a_run_trains_with_code_of_its_own_and_a_resume_says_what_changed(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["allow_code=true", "run_name=own", "save_interval=1ba", "log_to_console=false"]
    config, _ = load_train_config(write(), [*words, "max_duration=1ba"])
    trainer = train(config)
    optimizer = trainer.state.optimizers[0]
    assert type(optimizer).__name__ == "Halved"
    assert optimizer.param_groups[0]["initial_lr"] == 0.0025 and optimizer.param_groups[0]["lr"] == 0.00125
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert any(type(each).__name__ == "Counts" and each.prefix == "mine" for each in trainer.state.callbacks)
    folder = Path(str(config.save_folder).format(run_name="own"))
    saved = (folder / "config.yaml").read_text()
    assert "name: halved" in saved and f"mine.py: {config.code_hashes['mine.py']}" in saved
    assert load_saved_config(folder / "config.yaml") == config
    said = capsys.readouterr().out
    assert f"code_paths: running mine.py (sha256 {config.code_hashes['mine.py']})" in said
    assert "halved: up to" not in said and "halved: 0.01 along constant" in said

    again, _ = load_train_config(write(code=f"{CODE}\n# changed"), [*words, "max_duration=2ba"])
    train(again)
    before, after = config.code_hashes["mine.py"], again.code_hashes["mine.py"]
    assert f"code_hashes.mine.py: {before} -> {after}" in capsys.readouterr().out
    _, notes = load_train_config(write(f"{OWN}code_hashes: {{mine.py: {before}}}\n", f"{CODE}\n#"), words)
    assert any("mine.py has changed since the run saved its config" in note for note in notes)


def test_arguments_are_those_of_the_signature(write: Callable[..., Path]) -> None:
    own = OWN.replace("share: 0.25", "shar: 0.25").replace("every: 1", "every: often")
    assert problems(write(own), "allow_code=true") == [
        "optimizer.shar: unknown key. Did you mean share? halved takes name, disable_grad, param_groups, lr, "
        "share, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused.",
        "callbacks.counts.every: 'often' is not allowed here. Expected a whole number.",
    ]
    own = OWN.replace("lr: 0.01, ", "").replace("name: halved", "name: halvd").replace("counts:", "count:")
    found = problems(write(own), "allow_code=true")
    assert found[0].startswith("optimizer.name: 'halvd' is not known. Did you mean halved? Allowed: ")
    assert found[1] == "optimizer.lr: is missing. Expected a number."
    assert found[2].startswith("callbacks.count: is not known. Did you mean counts? Allowed: ")


def test_nothing_runs_unless_the_command_line_allows_it(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(code=f"{CODE}\nopen('it-ran', 'w')\n")
    text = "names code, which runs only with allow_code=true on the command line."
    assert problems(config) == [f"code_paths: {text}"]
    lacking: dict[str, str] = {}
    checked, _ = load_train_config(config, [], lacking)
    assert lacking == {"code_paths": text}
    assert f"here: code_paths: {text[:-1]}; train refuses this here" in check_on(checked, None, lacking).text
    assert not Path("it-ran").exists() and not plugins.optimizers
    config.write_text(to_yaml(checked))
    assert load_saved_config(config).optimizer.name == "halved"
    assert not Path("it-ran").exists()
    load_train_config(config, ["allow_code=true"])
    assert Path("it-ran").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\n1 / 0", "code_paths: mine.py:2: ZeroDivisionError: division by zero"),
        ("def f(:", "code_paths: mine.py:1: SyntaxError: "),
        (
            "import nowhere_at_all",
            "code_paths: mine.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
    ],
)
def test_a_file_that_fails_is_one_sentence_with_its_line(
    write: Callable[..., Path], code: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(write(code=code), ["allow_code=true"])
    assert str(caught.value).startswith(said) and len(str(caught.value).splitlines()) == 1


def test_all_ranks_run_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from composer.utils import dist

    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    gathered = [{"mine.py": "a"}, {"mine.py": "a"}, {"mine.py": "b"}]
    monkeypatch.setattr(dist, "all_gather_object", lambda value: gathered)
    with pytest.raises(ConfigError, match="the files of rank 2 are not those of rank 0"):
        build.compare_code(["mine.py"], gathered[0])
    with pytest.raises(ConfigError, match=r"code_paths: gone\.py is missing"):
        build.compare_code(["gone.py"], gathered[0])
    gathered.pop()
    build.compare_code(["mine.py"], gathered[0])


@pytest.mark.soak
def test_two_ranks_with_different_files_do_not_start(write: Callable[..., Path], tmp_path: Path) -> None:
    """As on two machines: each rank has a folder of its own, and a file of the same name in it."""
    config = write().absolute()
    for rank, code in enumerate((CODE, CODE.replace("lr * share", "lr * share / 2"))):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.py").write_text(code)
    script = tmp_path / "each_in_its_folder.py"
    script.write_text(
        "import os, sys\nfrom mptfoundry.cli import main\n"
        f"os.chdir(f'{tmp_path}/{{os.environ[\"RANK\"]}}')\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    done = run_on_ranks(script, config, "allow_code=true", "run_name=two")
    assert done.returncode == 2
    text = "error: code_paths: the files of rank 1 are not those of rank 0 (their sha256 differ)."
    assert done.stdout.count(text) == done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout


def test_a_class_that_fails_is_named_where_the_config_names_it(write: Callable[..., Path]) -> None:
    code = CODE.replace("self.every, self.prefix = every, prefix", "raise OSError('the disk is full')")
    config, _ = load_train_config(write(code=code), ["allow_code=true"])
    with pytest.raises(
        ConfigError, match=r"^callbacks.counts: Counts \(mine.py\) fails: OSError: the disk is full\. MPT"
    ):
        build.build_callbacks(config, None, Path())
