"""A tokenizer of one's own: trained on a sample, with special tokens and a template, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mptfoundry.cli import main
from mptfoundry.tokenizer import load_tokenizer, train_bpe

SOURCE = Path(__file__).parent.parent / "mptfoundry"
Capture = pytest.CaptureFixture[str]


def test_a_tokenizer_is_trained_with_special_tokens_and_a_template(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "mine"
    words = ["include=*.py", "chat_template=chatml", "special_tokens=['<|tool|>']", "vocab_size=1000"]
    assert main(["tokenizer", "train", str(SOURCE / "config"), f"out={out}", *words]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 1,000 ids, trained on ")
    tokenizer = load_tokenizer(str(out))
    for token in ("<|tool|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1 and token in tokenizer.all_special_tokens
    text = (SOURCE / "errors.py").read_text()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"


def test_the_whole_text_gives_the_tokenizer_of_the_function(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    texts = [f"line {number} of {number % 7} words\n" for number in range(300)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(texts, 300, tmp_path / "function")
    assert main(["tokenizer", "train", str(file), f"out={tmp_path / 'verb'}", "vocab_size=300"]) == 0
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("function", "verb")]
    assert files[0] == files[1]


def test_a_sample_is_random_and_repeatable(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "long.jsonl"
    records = ({"text": f"{number * number} {'word ' * 40}"} for number in range(16_000))
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    printed = []
    for seed in (1, 1, 2):
        words = [f"out={tmp_path / 'out'}", "vocab_size=270", "sample_bytes=1200000", "overwrite=true"]
        assert main(["tokenizer", "train", str(file), *words, f"seed={seed}", "progress=false"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    sampled = float(printed[0].partition("(")[2].split()[0])
    assert 1 < sampled < 3  # MB, of 3.6: pieces of 2 MiB, each taken with the same probability


def test_tokenizers_are_compared_by_kind_of_text(tmp_path: Path, capsys: Capture) -> None:
    train_bpe([path.read_text() for path in (SOURCE / "config").glob("*.py")], 2000, tmp_path / "large")
    train_bpe([(SOURCE / "errors.py").read_text()], 260, tmp_path / "small")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.md").write_text("# Title\n\nSome words of a text.\n")
    (texts / "b.py").write_text("def f(self) -> None:\n    return None\n" * 20)
    command = ["tokenizer", "compare", str(tmp_path / "small"), str(tmp_path / "large"), str(texts)]
    assert main(command) == 0
    rows = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert {".md", ".py", "all", "ids"} <= rows.keys()
    small, large = map(float, rows[".py"][-2:])
    assert 1 <= small < large
    assert rows["documents changed by decoding"][-2:] == ["0", "0"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "tokenizer: say train or compare"),
        (["learn"], 2, "tokenizer: say train or compare"),
        (
            ["train", "TEXT", "out=OUT", "vocab_size=200"],
            2,
            "200 can't hold 256 bytes and the special tokens",
        ),
        (["train", "TEXT", "out=TEXT", "vocab_size=300"], 2, "exists. Name another folder, or add overwrite"),
        (["train", "nowhere", "out=OUT", "vocab_size=300"], 1, "nowhere: there is no such file or folder"),
        (
            ["train", "TEXT", "out=OUT", "vocab_size=300", "chat_template=no.jinja"],
            2,
            "no.jinja can't be read",
        ),
        (["compare", "TEXT", "TEXT", "TEXT"], 2, "tokenizer"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    places = {"TEXT": str(tmp_path / "text.txt"), "OUT": str(tmp_path / "out")}
    given = [word.replace("TEXT", places["TEXT"]).replace("OUT", places["OUT"]) for word in words]
    assert main(["tokenizer", *given]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
