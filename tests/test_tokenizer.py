from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from mptfoundry.errors import ConfigError
from mptfoundry.tokenizer import (
    borders_of_folder,
    check_tokenizer,
    count_ids,
    fingerprint,
    load_tokenizer,
    own_borders,
    spelled,
    token_byte_lengths,
    train_bpe,
    vocabulary_problem,
)


def test_a_trained_tokenizer_gives_every_text_back(tiny_tokenizer: Any) -> None:
    text = "def f(x):\n\treturn x  # naïve 言葉 \U0001f600\x00\r\n"
    ids = tiny_tokenizer(text)["input_ids"]
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.eos_token_id == tiny_tokenizer.bos_token_id == 0
    assert tiny_tokenizer.pad_token_id == 1


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe([Path(__file__).read_text()], 300, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_its_files_are_written_as_every_version_of_transformers_reads_them(tmp_path: Path) -> None:
    tokenizer = train_bpe(
        ["some text"], 270, tmp_path / "own", special_tokens=["<|start|>"], chat_template="{{ 1 }}"
    )
    config = json.loads((tmp_path / "own/tokenizer_config.json").read_text())
    # Version 4 knows neither version 5's class nor a list of extra_special_tokens.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|start|>"] and "extra_special_tokens" not in config
    assert "<|start|>" in tokenizer.all_special_tokens and tokenizer.chat_template == "{{ 1 }}"


def test_training_too_few_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size: 100 can't hold 256 bytes and 2 special tokens"):
        train_bpe(["text"], 100, tmp_path / "x")


def test_the_length_limit_is_max_seq_len(tokenizer_folder: Path) -> None:
    assert load_tokenizer(str(tokenizer_folder), max_seq_len=64).model_max_length == 64
    assert (
        load_tokenizer(str(tokenizer_folder), {"model_max_length": 9}, max_seq_len=64).model_max_length == 9
    )


def test_the_fingerprint_outlives_copies_but_not_changes(tmp_path: Path, tokenizer_folder: Path) -> None:
    original: Any = load_tokenizer(str(tokenizer_folder))
    original(["a", "b c"], padding=True, truncation=True, max_length=4)
    original.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"), {"pad_token": "<|endoftext|>"}, max_seq_len=5)
    assert fingerprint(copy) == fingerprint(original)
    assert fingerprint(Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))) == fingerprint(original)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    for change in (
        {"normalizer": None},
        {"pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}},
        {"model": {**content["model"], "merges": content["model"]["merges"][:-1]}},
        {"added_tokens": content["added_tokens"][:1]},
    ):
        assert fingerprint(Tokenizer.from_str(json.dumps({**content, **change}))) != fingerprint(original)


def test_merges_written_in_the_older_form_have_the_same_fingerprint(tokenizer_folder: Path) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    older = {**content, "model": dict(content["model"])}
    older["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del older["model"]["ignore_merges"], older["pre_tokenizer"]["trim_offsets"]
    older["pre_tokenizer"]["trim_offsets"] = False
    assert fingerprint(Tokenizer.from_str(json.dumps(older))) == fingerprint(
        Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    )


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_tokenizer: Any) -> None:
    check_tokenizer(tiny_tokenizer, 320)
    with pytest.raises(ConfigError, match=r"320 ids, and the model has rows for 319\. Name the tokenizer"):
        check_tokenizer(tiny_tokenizer, 319)
    assert "Use 320 or more; 384 is" in (vocabulary_problem(320, 319) or "")


def test_gaps_in_the_numbering_count(tokenizer_folder: Path) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 400
    assert count_ids(Tokenizer.from_str(json.dumps(content))) == 401


def test_byte_lengths_add_up_to_the_text(tiny_tokenizer: Any) -> None:
    text = "naïve café 言葉\n  x = 'y'\t😀"
    lengths = token_byte_lengths(tiny_tokenizer, 384)
    assert lengths.shape == (384,) and lengths.dtype == np.int64
    assert lengths[tiny_tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert not lengths[[0, 1]].any() and not lengths[320:].any()


def test_byte_lengths_know_added_text_and_byte_fallback(tokenizer_folder: Path) -> None:
    byte_level = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    byte_level.add_tokens(["  é"])
    assert token_byte_lengths(byte_level, 400)[byte_level.token_to_id("  é")] == 4
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "é": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    special = {"id": 0, "content": "<unk>", "special": True, "normalized": False}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    fallback = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [special], "model": model}))
    assert token_byte_lengths(fallback, 4).tolist() == [0, 1, 4, 2]


def test_a_class_that_this_transformers_does_not_know_is_no_obstacle(
    tmp_path: Path, tokenizer_folder: Path, tiny_tokenizer: Any
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tokenizer_folder / file).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "FutureTokenizer"})
    )
    assert load_tokenizer(str(tmp_path))("some text") == tiny_tokenizer("some text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "./nowhere",
            r"tokenizer.name: \./nowhere is not a folder\. Give a folder that holds tokenizer.json\.",
        ),
        ("some-org/some-tokenizer", r"neither a folder nor in the Hugging Face cache.*HF_HUB_OFFLINE is set"),
    ],
)
def test_a_missing_tokenizer_is_one_clear_error(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(name)


def test_an_empty_or_damaged_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither tokenizer.json nor tokenizer_config.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer.name: .* can't be read"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_tokenizer_is_never_run(tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer's code is run"):
        load_tokenizer(str(tokenizer_folder), {"trust_remote_code": True})


def test_what_a_tokenizer_adds_by_itself_is_told_with_and_without_transformers(
    adding_tokenizers: dict[str, str], tokenizer_folder: Path
) -> None:
    ids = {
        "nothing": ((), ()),
        "bos": ((1,), ()),
        "eos": ((), (2,)),
        "both": ((1,), (2,)),
        "pairs": ((1, 0), (0, 2)),
    }
    for name, folder in adding_tokenizers.items():
        tokenizer: Any = load_tokenizer(folder, max_seq_len=4)
        tokenizer("a long text that is cut", truncation=True, padding=False, max_length=3)
        borders = own_borders(tokenizer)
        assert borders == ids[name]
        assert borders_of_folder(folder) == spelled(borders, tokenizer)
    assert borders_of_folder(tokenizer_folder) == ((), ())
    assert borders_of_folder(tokenizer_folder / "nothing") is None


def test_switches_of_llamas_class_go_before_its_file(
    adding_tokenizers: dict[str, str], tmp_path: Path
) -> None:
    """As transformers 4 has it, where the class writes the template again.

    In transformers 5 the file wins, and what arguments change can't be told without loading it."""
    for name, words in (("bos", {}), ("bos", {"add_bos_token": False}), ("nothing", {"add_eos_token": True})):
        folder = tmp_path / f"{name}{len(words)}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(adding_tokenizers[name], folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": name == "bos", **words}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(folder))
        assert borders_of_folder(folder) == spelled(own_borders(tokenizer), tokenizer)
        changed = {"add_bos_token": True, "add_eos_token": True}
        tokenizer = load_tokenizer(str(folder), changed)
        told = borders_of_folder(folder, changed)
        assert told in (spelled(own_borders(tokenizer), tokenizer), None)
        assert told is not None or not metadata.version("transformers").startswith("4.")
