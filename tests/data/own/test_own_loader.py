"""Datasets of the user's own: a run resumes exactly, every item comes once, a mistake is one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mptfoundry import plugins
from mptfoundry.check import check, check_on
from mptfoundry.cli import main
from mptfoundry.config.load import load_saved_config, load_train_config, to_yaml
from mptfoundry.data.own import own_loader
from mptfoundry.data.own.items import read_item
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.loaders import build_loader
from mptfoundry.train import train
from tests.conftest import losses
from tests.loaders import context_of
from tests.ranks import run_on_ranks

CODE = """
import numpy as np
from mptfoundry import plugins

class Counting:
    def __init__(self, items: int, tokenizer, max_seq_len: int, first: int = 2, path: "str | None" = None):
        self.items, self.first, self.longest, self.eos = items, first, max_seq_len, tokenizer.eos_token_id

    def __len__(self):
        return self.items

    def __getitem__(self, number):
        tokens = 2 + number * 7 % (self.longest - 1)
        ids = np.random.default_rng((self.first, number)).integers(0, 384, tokens)
        ids[0] = number
        return {"input_ids": ids, "labels": np.where(np.arange(tokens) % 3 == 0, -100, ids)}

plugins.datasets["counting"] = Counting
"""
OWN: dict[str, Any] = {"name": "counting", "items": 42, "num_workers": 0}


@pytest.fixture(autouse=True)
def no_own_code() -> Iterator[None]:
    """Tables without what a test wrote into them."""
    yield
    for table in (*plugins.TABLES.values(), plugins.hashes):
        table.clear()


@pytest.fixture
def write(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the file of code and the config of a tiny run that trains on what is in it."""
    monkeypatch.chdir(tmp_path)

    def write_files(code: str = CODE, loader: dict[str, Any] | None = None, **more: Any) -> Path:
        Path("mine.py").write_text(code)
        run = yaml.safe_load(tiny_run.read_text()) | {"train_loader": OWN | (loader or {})}
        Path("run.yaml").write_text(yaml.safe_dump(run | {"code_paths": ["mine.py"]} | more))
        return Path("run.yaml")

    return write_files


def built(config: Path, **context: Any) -> Any:
    """The training loader of a config."""
    from mptfoundry.tokenizer import load_tokenizer

    run, _ = load_train_config(config, ["allow_code=true"])
    tokenizer = load_tokenizer(run.tokenizer.name)
    return build_loader(run.train_loader, context_of(tokenizer, max_seq_len=32, **context)).dataloader


def test_a_stopped_run_resumes_bitwise(write: Callable[..., Path], tmp_path: Path) -> None:
    """Also in the second epoch, and with workers after the stop."""
    evaluated = {"name": "counting", "items": 9, "num_workers": 0, "drop_last": False, "first": 5}
    schedule = {"name": "cosine_with_warmup", "t_warmup": "1ba", "t_max": "8ba"}
    config = write(eval_loader=evaluated, eval_interval="7ba", save_interval="2ba", scheduler=schedule)
    words = ["allow_code=true", "log_to_console=false"]
    whole = train(load_train_config(config, [*words, "max_duration=8ba", "run_name=whole"])[0])
    train(load_train_config(config, [*words, "max_duration=6ba", "run_name=cut"])[0])
    two = ["train_loader.num_workers=2", "max_duration=8ba", "run_name=cut"]
    cut = train(load_train_config(config, [*words, *two])[0])
    assert cut.state.timestamp.epoch == 1 and losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, weight in whole.state.model.state_dict().items():
        assert torch.equal(weight, cut.state.model.state_dict()[name]), name
    tokens = sum(len(Reference(CODE)[number]["input_ids"]) for number in range(9))
    assert whole.state.eval_metrics["eval"]["tokens"].compute() < tokens
    assert whole.state.timestamp.token == cut.state.timestamp.token < 8 * 8 * 32


class Reference:
    """The dataset of some code, outside of any run."""

    def __new__(cls, code: str) -> Any:
        from types import SimpleNamespace

        space: dict[str, Any] = {}
        exec(code.replace("plugins.datasets", "{}"), space)
        return space["Counting"](42, SimpleNamespace(eos_token_id=0), 32)


def test_a_batch_holds_the_items_and_counts_what_is_in_the_loss(write: Callable[..., Path]) -> None:
    loader = built(write(loader={"shuffle": False}))
    batch, items = next(iter(loader)), Reference(CODE)
    for row in range(4):
        item = items[row]
        length = len(item["input_ids"])
        assert (batch["input_ids"][row, :length].numpy() == item["input_ids"]).all()
        assert (batch["labels"][row, 1:length].numpy() == item["labels"][1:]).all()
        assert batch["attention_mask"][row].sum() == length == batch["row_tokens"][row]
        assert batch["row_trained"][row] == (item["labels"][1:] != -100).sum()
    assert "sequence_id" not in batch
    shuffled = built(write())
    orders = []
    for epoch in (0, 1):
        shuffled.sampler.set_epoch(epoch)
        orders.append(torch.cat([each["sample_id"] for each in shuffled]).tolist())
    assert len(set(orders[0])) == len(orders[0]) == 40 and orders[0] != orders[1]


def test_documents_and_other_labels_are_kept() -> None:
    values = {"input_ids": [5, 6, 7, 8, 0], "attention_mask": [1, 1, 1, 1, 0], "sequence_id": [0, 0, 3, 3, 3]}
    item = read_item(values, 8, 10)
    assert item.input_ids.tolist() == [5, 6, 7, 8] and item.lengths.tolist() == [2, 2]
    assert item.labels.tolist() == [-100, 6, -100, 8]
    item = read_item({"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 1, 2])}, 8, 10)
    assert item.labels.tolist() == [-100, 1, 2]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("[1, 2]", "has no input_ids, but list. Return a dict with input_ids"),
        ("{'tokens': [1, 2]}", "has no input_ids, but the keys tokens. Return a dict"),
        (
            "{'input_ids': [0.5, 1.0]}",
            r"has input_ids of type float64 of shape \(2,\). Return one row of int",
        ),
        ("{'input_ids': [[1, 2]]}", r"has input_ids of type int64 of shape \(1, 2\)"),
        ("{'input_ids': [[1], [2, 3]]}", "has input_ids that can't be read: "),
        ("{'input_ids': [1] * 33}", "has 33 tokens; max_seq_len is 32. Return 1 to 32."),
        ("{'input_ids': []}", "has 0 tokens; max_seq_len is 32."),
        ("{'input_ids': [1, 384]}", "has the id 384 in input_ids, but the model's are 0 to 383."),
        (
            "{'input_ids': [1, 2], 'labels': [-1, 2]}",
            "has the id -1 in labels, but the model's are 0 to 383.",
        ),
        ("{'input_ids': [1, 2], 'labels': [1]}", "has 1 labels for 2 input_ids. Give one for each token."),
        ("{'input_ids': [1, 2], 'labels': [1, -100]}", "has no token in the loss: that needs a label other"),
        ("{'input_ids': [1, 2], 'attention_mask': [0, 1]}", "has padding before its end in attention_mask."),
        ("{'input_ids': [1, 2], 'sequence_id': [1, 0]}", "has a sequence_id that falls."),
        (
            "{'input_ids': 1 / 0}",
            "fails: ZeroDivisionError: division by zero. MPTFOUNDRY_DEBUG=1 shows where.",
        ),
        ("{'input_ids': np.random.randint(0, 384, 9)}", "is not the same when it is read twice"),
    ],
)
def test_a_wrong_item_is_one_sentence_before_the_first_batch(
    write: Callable[..., Path], returned: str, said: str
) -> None:
    code = CODE.replace(
        '{"input_ids": ids, "labels": np.where(np.arange(tokens) % 3 == 0, -100, ids)}', returned
    )
    with pytest.raises(DataError, match=rf"^train_loader: item 0 of Counting \(mine\.py\) {said}") as caught:
        built(write(code))
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_item_in_a_worker_is_the_same_sentence(write: Callable[..., Path]) -> None:
    code = CODE.replace("ids[0] = number", "ids[0] = number if number != 11 else -3")
    loader = built(write(code, {"shuffle": False}), num_workers=1)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    with pytest.raises(DataError) as caught:
        list(loader)
    text = str(caught.value)
    assert text.startswith("train_loader: item 11 of Counting (mine.py) ") and len(text.splitlines()) == 1
    assert "has the id -3 in input_ids" in text


def test_only_workers_read_items(write: Callable[..., Path]) -> None:
    """What a dataset opens when it is first read is never shared by two processes."""
    reading = "import os; self.reader = getattr(self, 'reader', os.getpid())\n        "
    reading += "assert self.reader == os.getpid() != self.maker\n        ids[0] = number"
    code = CODE.replace("ids[0] = number", reading)
    code = code.replace(
        "self.items, self.first", "import os; self.maker = os.getpid(); self.items, self.first"
    )
    loader = built(write(code, {"num_workers": 2, "drop_last": False}), num_workers=2)
    assert sorted(number for batch in loader for number in batch["sample_id"].tolist()) == list(range(42))


def test_what_is_not_read_of_an_item_is_said_once(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    list(built(write(CODE.replace('{"input_ids"', '{"source": "web", "input_ids"'))))
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == ["train_loader: item 0"]
    assert caplog.messages[0].endswith("these keys are not looked at: source.")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            ("self.items, self.first", "raise OSError('no disk'); self.items, self.first"),
            "fails: OSError: no disk.",
        ),
        (("__len__", "length"), "has no __len__. Give a class whose items are read by their number"),
        (("return self.items", "return 1 / 0"), "fails: ZeroDivisionError"),
        (("return self.items", "return 0"), "can't fill one batch of 4 on each of 1 devices."),
        (("return self.items", "return 3"), "3 items can't fill one batch of 4"),
        (
            ("= Counting\n", "= lambda: StreamingDataset.__new__(StreamingDataset)\n"),
            "is a StreamingDataset, which orders",
        ),
    ],
)
def test_a_wrong_dataset_is_one_sentence(
    write: Callable[..., Path], code: tuple[str, str], said: str
) -> None:
    loader = {"items": None} if "lambda" in code[1] else {}
    text = CODE.replace(*code).replace("import numpy", "from streaming import StreamingDataset\nimport numpy")
    config = write(text, loader)
    if loader:
        config.write_text(config.read_text().replace("  items: null\n", ""))
    with pytest.raises((ConfigError, DataError)) as caught:
        built(config)
    assert str(caught.value).startswith("train_loader: ") and said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_check_knows_the_arguments_and_runs_no_dataset(write: Callable[..., Path]) -> None:
    code = CODE.replace("self.items, self.first", "raise OSError('not here'); self.items, self.first")
    said = check(
        load_train_config(write(code, {"path": "data.bin"}), ["allow_code=true", "max_duration=2ep"])[0]
    )
    assert "train on           all  counting  items 42, path 'data.bin'" in said
    assert "2 epochs; how many batches depends on the size of the data" in said

    def problems(*words: str, **loader: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_train_config(write(loader=loader), ["allow_code=true", *words])
        return [problem.partition(": ")[2] for problem in caught.value.problems]

    assert problems(itms=3, first="one", num_workers=-1) == [
        "train_loader.first: 'one' is not allowed here. Expected a whole number.",
        "train_loader.itms: unknown key. Did you mean items? counting takes name, label, drop_last, "
        "num_workers, pin_memory, prefetch_factor, persistent_workers, timeout, shuffle, items, first, path.",
        "train_loader.num_workers: -1 is negative. Use 0 or more, or auto.",
    ]
    assert problems(name="countin")[0].startswith(
        "train_loader.name: 'countin' is not known. Did you mean counting? Allowed: text, labelled, "
    )
    assert "tokenizer: unknown key." in problems(tokenizer="a")[0]
    config = write(CODE.replace("path:", "timeout:"))
    with pytest.raises(
        ConfigError, match=r"timeout is a key of the loader, and also an argument of your class"
    ):
        load_train_config(config, ["allow_code=true"])
    config = write(CODE.replace('["counting"]', '["text"]'), {"name": "text"})
    with pytest.raises(
        ConfigError, match=r"name: text is a loader of mptfoundry's. Give your dataset another"
    ):
        load_train_config(config, ["allow_code=true"])


def test_preview_shows_items_and_what_of_them_is_in_the_loss(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = '"sequence_id": np.arange(tokens) > 4, "labels": np.where(np.arange(tokens) % 3 == 0, -100, 7)'
    code = CODE.replace('"labels": np.where(np.arange(tokens) % 3 == 0, -100, ids)', changed)
    for text, said in (
        (CODE, "10 tokens, 6 in the loss\n"),
        (code, "10 tokens, 5 in the loss, 2 documents; its"),
    ):
        assert main(["preview", str(write(text)), "allow_code=true", "samples=2"]) == 0
        printed = capsys.readouterr().out
        assert "counting: 42 items" in printed and "item 0 of 42: 2 tokens, 1 in the loss" in printed
        assert f"item 41 of 42: {said}" in printed and "⟦" in printed
    assert main(["preview", str(write())]) == 2
    assert "code_paths: names code, which runs only with allow_code=true" in capsys.readouterr().err


def test_a_config_is_checked_and_read_back_without_its_code(write: Callable[..., Path]) -> None:
    lacking: dict[str, str] = {}
    loaders = [OWN | {"first": 4, "label": "a"}, OWN | {"label": "b"}]
    config, _ = load_train_config(write(eval_loader=loaders), [], lacking)
    assert list(lacking) == ["code_paths"] and "counting  items 42" in check_on(config, None, lacking).text
    Path("run.yaml").write_text(to_yaml(config))
    saved = load_saved_config("run.yaml")
    assert saved.eval_loaders["a"].first == 4 and not plugins.datasets  # type: ignore[union-attr]
    checked, _ = load_train_config("run.yaml", ["allow_code=true"])
    assert [loader.first for loader in checked.eval_loaders.values()] == [4, 2]  # type: ignore[union-attr]
    plugins.datasets.clear()
    with pytest.raises(
        ConfigError, match=r"counting is a dataset of your own, whose code did not run. Say allow_"
    ):
        build_loader(saved.train_loader, context_of())


def test_a_resumed_run_says_what_has_changed(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["allow_code=true", "log_to_console=false", "run_name=a", "save_interval=1ba"]
    train(load_train_config(write(), [*words, "max_duration=2ba"])[0])
    longer = [*words, "max_duration=3ba"]
    with pytest.raises(ConfigError, match=r"train_loader.items: 42 in the run of .*, 43 here\."):
        train(load_train_config(write(loader={"items": 43}), longer)[0])
    with pytest.raises(ConfigError, match="train_loader: its content is not what the run of"):
        train(load_train_config(write(CODE.replace("self.first, number)", "9, number)")), longer)[0])
    allowed = [*longer, "allow_changes=[train_loader]", "run_name=b"]
    shutil.copytree("a", "b", symlinks=True)
    trainer = train(load_train_config(write(loader={"items": 43}), allowed)[0])
    assert trainer.state.timestamp.sample_in_epoch == 24
    capsys.readouterr()
    train(load_train_config(write(f"{CODE}\n# changed", {"num_workers": 1}), longer)[0])
    said = capsys.readouterr().out
    assert "code_hashes.mine.py: " in said and "train_loader.num_workers: 0 -> 1" in said


def test_a_run_is_evaluated_on_its_dataset(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(eval_loader=OWN | {"items": 9, "drop_last": False}, eval_interval="1ba")
    words = ["allow_code=true", "log_to_console=false", "run_name=a"]
    trainer = train(load_train_config(config, [*words, "max_duration=1ba"])[0])
    measured = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute()
    plugins.datasets.clear()
    assert main(["eval", str(tmp_path / "a")]) == 2
    assert "eval_loader eval.name: counting is a dataset of your own, whose code" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "a"), "allow_code=true", "device_eval_batch_size=4"]) == 0
    results = yaml.safe_load((tmp_path / "a/eval.json").read_text())["results"]["eval"]
    assert results["LanguageCrossEntropy"] == pytest.approx(float(measured), rel=1e-5)


def test_llm_foundrys_loaders_name_our_datasets(write: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"llmfoundry.registry.dataloaders has no table here: .* plugins.datasets"
    ):
        load_train_config(write("from llmfoundry.registry import dataloaders"), ["allow_code=true"])


def test_shards_with_columns_of_their_own_are_read_by_number(
    write: Callable[..., Path], shards: Path
) -> None:
    code = (
        "from streaming import LocalDataset\nfrom mptfoundry import plugins\n"
        "class Columns(LocalDataset):\n"
        "    def __getitem__(self, number):\n"
        "        return {'input_ids': super().__getitem__(number)['tokens']}\n"
        "plugins.datasets['columns'] = Columns\n"
    )
    config = write(code, {"name": "columns", "local": str(shards / "a"), "split": "train", "shuffle": False})
    config.write_text(config.read_text().replace("  items: 42\n", ""))
    ids = np.concatenate([batch["input_ids"] for batch in built(config)])
    assert ids.shape[1] == 32 and len(ids) >= 8 and not (ids == ids[0]).all()


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_an_epoch(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, drop_last: bool
) -> None:
    monkeypatch.setattr(own_loader, "world_size", lambda: 3)
    read = []
    for number in range(3):
        monkeypatch.setattr(own_loader, "rank", lambda number=number: number)
        loader = built(write(loader={"items": 40, "drop_last": drop_last}), device_batch_size=2)
        read.append(torch.cat([each["sample_id"] for each in loader]).tolist())
    assert len({len(numbers) for numbers in read}) == 1
    numbers = [number for numbers in read for number in numbers if number >= 0]
    assert len(numbers) == len(set(numbers)) == (36 if drop_last else 40)


@pytest.mark.soak
def test_two_ranks_with_different_items_do_not_start(write: Callable[..., Path], tmp_path: Path) -> None:
    code = CODE.replace("ids[0] = number", "import os; ids[0] = int(os.environ['RANK'])")
    config = write(code, code_paths=[str(tmp_path / "mine.py")]).absolute()
    done = run_on_ranks("scripts/train.py", config, "allow_code=true", "run_name=two")
    assert done.returncode == 1
    text = "error: train_loader: the items of rank 1 are not those of rank 0."
    assert done.stdout.count(text) == done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout


@pytest.mark.soak
def test_two_ranks_read_every_item_once(write: Callable[..., Path], tmp_path: Path) -> None:
    seen = (
        "        ids[0] = number\n        import os\n"
        f"        open(f'{tmp_path}/seen{{os.environ[\"RANK\"]}}', 'a').write(f'{{number}} ')\n"
    )
    code = CODE.replace("        ids[0] = number\n", seen)
    config = write(code, code_paths=[str(tmp_path / "mine.py")]).absolute()
    words = ["allow_code=true", "max_duration=1ep", "log_to_console=false", "model.resid_pdrop=0"]
    done = run_on_ranks("scripts/train.py", config, *words, "run_name=two")
    assert done.returncode == 0, done.stdout
    read = [list(map(int, (tmp_path / f"seen{rank}").read_text().split()))[4:] for rank in (0, 1)]
    assert len(read[0]) == len(read[1]) == 20 and len({*read[0], *read[1]}) == 40
    train(load_train_config(write(), [*words, "run_name=one"])[0])
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
