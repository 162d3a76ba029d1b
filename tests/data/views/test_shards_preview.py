from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mptfoundry.data.views.shards_preview import BORDER, MOST_CHARACTERS, preview, preview_batch, show
from mptfoundry.errors import DataError


def test_samples_are_decoded_with_special_tokens_and_borders_visible(prepared: Path) -> None:
    text = preview(prepared / "train", samples=1000)
    assert re.match(r".*/train: \d+ samples of 64 tokens in \d+ shards\n\d+ documents, ", text)
    assert "tokens/document\ntokenizer " in text and "(320 ids, fingerprint " in text
    assert f"<|endoftext|>\n{BORDER}\n" in text
    assert "def insort_right(a, x, lo=0, hi=None, *" in text
    assert text.count("\nsample ") == int(text.split(": ")[1].split(" samples")[0])


def test_few_samples_are_spread_over_the_whole(prepared: Path) -> None:
    numbers = [int(number) for number in re.findall(r"^sample (\d+) of", preview(prepared / "train"), re.M)]
    last = int(re.findall(r"^sample \d+ of (\d+)", preview(prepared / "train"), re.M)[0]) - 1
    assert numbers == [0, round(last / 2), last]


def test_lengths_of_documents_are_counted(tiny_tokenizer: Any) -> None:
    assert show([5, 6, 0, 7, 0, 8, 9], tiny_tokenizer).startswith("7 tokens, 3 documents: 3 + 2 + 2\n")
    assert show([5, 6], tiny_tokenizer).startswith("2 tokens, 1 document\n")


def test_special_tokens_can_be_coloured(tiny_tokenizer: Any) -> None:
    assert "\x1b[7m<|padding|>\x1b[0m" in show([1], tiny_tokenizer, color=True)


def test_a_long_sample_is_cut_in_the_middle(tiny_tokenizer: Any) -> None:
    text = show(tiny_tokenizer("begin" + "x" * 5000 + "end", truncation=False)["input_ids"], tiny_tokenizer)
    assert len(text) < MOST_CHARACTERS + 100 and "begin" in text and text.endswith("end")
    assert "[... 3,808 characters ...]" in text


def test_shards_of_others_need_a_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, tiny_tokenizer: Any
) -> None:
    from streaming import MDSWriter

    ids = tiny_tokenizer("from elsewhere")["input_ids"]
    with MDSWriter(columns={"tokens": "bytes"}, out=str(tmp_path / "b")) as writer:
        writer.write({"tokens": np.array(ids, np.int32).tobytes()})
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "t")) as writer:
        writer.write({"text": "from elsewhere"})
    with pytest.raises(DataError, match=r"don't say with which tokenizer they were made. Give tokenizer."):
        preview(tmp_path / "b")
    for folder in ("b", "t"):
        text = preview(tmp_path / folder, tokenizer=str(tokenizer_folder), token_encoding_type="int32")
        assert "1 sample in 1 shard, made by another tool" in text and text.endswith("from elsewhere")


@pytest.mark.parametrize(
    ("column", "row", "options", "message"),
    [
        ("tokens:bytes", np.arange(31, dtype=np.int32), {}, "has 124 bytes, which are not a whole number"),
        (
            "tokens:bytes",
            np.arange(32, dtype=np.int32),
            {},
            r"has the id \d+, but the tokenizer's are 0 to 319",
        ),
        (
            "tokens:bytes",
            np.arange(32),
            {"token_encoding_type": "int32"},
            "holds int64 ids, read as int32",
        ),
        (
            "tokens:ndarray:uint16",
            np.full(9, 999, np.uint16),
            {},
            "has the id 999, but the tokenizer's are 0",
        ),
        ("prompt:str", "What?", {}, "has the columns prompt. Give shards with a column `tokens` or `text`"),
    ],
)
def test_what_training_refuses_of_others_shards_is_refused_with_its_words(
    tmp_path: Path, tokenizer_folder: Path, column: str, row: Any, options: dict[str, Any], message: str
) -> None:
    from streaming import MDSWriter

    name, _, encoding = column.partition(":")
    with MDSWriter(columns={name: encoding}, out=str(tmp_path)) as writer:
        writer.write({name: row.tobytes() if encoding == "bytes" else row})
    with pytest.raises(DataError, match=f"sample 0 {message}"):
        preview(tmp_path, tokenizer=str(tokenizer_folder), **options)


def test_ids_past_a_gap_in_the_tokenizers_numbers_are_shown(tmp_path: Path, tokenizer_folder: Path) -> None:
    import json
    import shutil

    from streaming import MDSWriter
    from tokenizers import Tokenizer

    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    parts = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    vocab = parts["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] = 400
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(parts))
    with MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(tmp_path / "mds")) as writer:
        writer.write({"tokens": np.array([400, 400], np.int32)})
    text = preview(tmp_path / "mds", tokenizer=str(tmp_path / "tokenizer"))
    shown = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).decode([400, 400])
    assert shown and text.endswith(shown)


def test_another_tokenizer_than_the_shards_own_is_noted(prepared: Path, tmp_path: Path) -> None:
    from mptfoundry.tokenizer import train_bpe

    assert "note: " not in preview(prepared / "train", samples=1)
    train_bpe(["another text entirely"] * 9, 300, tmp_path / "other")
    with pytest.raises(DataError, match="the tokenizer's are 0 to"):
        preview(prepared / "train", tokenizer=str(tmp_path / "other"), samples=5)
    assert "is not the tokenizer that these shards were made with" in preview(
        prepared / "train", tokenizer=str(tmp_path / "other"), samples=0
    )


def test_a_batch_is_shown_without_its_padding(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("words")["input_ids"]
    rows = torch.tensor([[*ids, 1, 1], [*ids, 0, 1]])
    mask = torch.tensor([[True] * len(ids) + [False] * 2, [True] * (len(ids) + 1) + [False]])
    text = preview_batch({"input_ids": rows, "attention_mask": mask}, tiny_tokenizer)
    assert "<|padding|>" not in text and text.startswith(f"row 0 of 2: {len(ids)} tokens, 1 document\nwords")
    assert text.count("<|endoftext|>") == 1


def test_a_preview_says_what_stands_around_each_document(
    corpus: Path, tmp_path: Path, adding_tokenizers: dict[str, str]
) -> None:
    from mptfoundry.data.prepare.prepare import prepare

    adds = "the tokenizer adds <s> before each text by itself"
    expected = {
        "auto": f"each document begins with <s> and ends with </s>; {adds}",
        False: f"each document ends with </s>; {adds}, but these documents are without <s>",
    }
    for add_bos, line in expected.items():
        out, options = tmp_path / str(add_bos), {"max_seq_len": 16, "workers": 1, "progress": False}
        prepare([str(corpus)], out, tokenizer=adding_tokenizers["bos"], add_bos=add_bos, **options)  # type: ignore[arg-type]
        assert line in preview(out / "train").splitlines()
