from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mptfoundry.errors import ConfigError
from mptfoundry.generation import (
    Sampling,
    TextStream,
    chat,
    choose,
    encode_prompt,
    generate,
    generate_text,
)
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY
from tests.mpt.reference import livelier


@pytest.fixture(scope="module")
def network() -> MPT:
    return livelier(TINY, 0.2)


def step_by_step(network: MPT, row: list[int], new: int) -> list[int]:
    """Greedy continuation without a cache."""
    with torch.no_grad():
        for _ in range(new):
            row = [*row, int(network(torch.tensor([row])).logits[0, -1].argmax())]
    return row


CONFIGS = {
    "alibi": TINY,
    "learned positions": replace(TINY, attn_config=AttnConfig()),
    "rotary": replace(TINY, attn_config=AttnConfig(rope=True)),
    "grouped queries and a window": replace(
        TINY,
        attn_config=AttnConfig(
            alibi=True, attn_type="grouped_query_attention", kv_n_heads=2, sliding_window_size=5
        ),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_padded_batch_with_a_cache_gives_what_each_row_gives_alone(config: MPTConfig) -> None:
    network = livelier(config, 0.2)
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15]]
    padded = torch.tensor([[0] * (7 - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (7 - len(row)) + [True] * len(row) for row in rows])
    out = generate(network, padded, attention_mask=mask, max_new_tokens=12)
    for number, row in enumerate(rows):
        assert out[number, 7 - len(row) :].tolist() == step_by_step(network, row, 12)


def test_a_row_ends_at_eos_and_the_batch_when_all_have(network: MPT) -> None:
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    free = generate(network, prompts, max_new_tokens=10)
    ends = [int(free[0, 5]), int(free[1, 7])]
    out = generate(network, prompts, max_new_tokens=10, eos_token_id=ends)
    for row, whole in zip(out.tolist(), free.tolist(), strict=True):
        first = next(n for n in range(3, 13) if whole[n] in ends)
        assert row[: first + 1] == whole[: first + 1]
        assert set(row[first:]) == {whole[first]}
    assert out.shape[1] <= 8


def test_streamed_ids_are_those_returned(network: MPT) -> None:
    columns: list[torch.Tensor] = []
    ids = torch.tensor([[5], [6]])
    out = generate(network, ids, max_new_tokens=6, sampling=Sampling(1.0), stream=columns.append)
    assert torch.equal(torch.stack(columns, dim=1), out[:, 1:])


def test_the_seed_decides_a_draw(network: MPT) -> None:
    def draw(seed: int) -> list[list[int]]:
        ids = torch.tensor([[5, 6]])
        return generate(network, ids, max_new_tokens=20, sampling=Sampling(2.0, seed=seed)).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    """Frequencies of 40,000 draws against the probabilities worked by hand."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log().expand(40_000, 4)
    squared = probabilities**2 / (probabilities**2).sum()
    for sampling, expected in (
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.5), squared.tolist()),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1.0, top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.45), [0, 4 / 7, 0, 3 / 7]),
    ):
        drawn = choose(logits, sampling, torch.Generator().manual_seed(0))
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        spread = [4 * (p * (1 - p) / len(drawn)) ** 0.5 for p in expected]
        for found, p, margin in zip(share.tolist(), expected, spread, strict=True):
            assert abs(found - p) <= margin


def test_greedy_text_is_that_of_transformers_in_a_batch(network: MPT) -> None:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64)
    theirs = MptForCausalLM(config).eval()
    theirs.load_state_dict(network.state_dict(), strict=False)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 30, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=mask, **options)
    assert generate(network, ids, attention_mask=mask.bool(), max_new_tokens=30).tolist() == expected.tolist()


def test_alibi_goes_past_the_trained_length_with_a_note(
    network: MPT, caplog: pytest.LogCaptureFixture
) -> None:
    out = generate(network, torch.arange(60)[None], max_new_tokens=10)
    assert out[0].tolist() == step_by_step(network, list(range(60)), 10)
    assert "70 tokens are more than the model was made for (max_seq_len: 64)" in caplog.text


def test_learned_positions_end() -> None:
    network = livelier(replace(TINY, attn_config=AttnConfig()), 0.2)
    with pytest.raises(
        ConfigError, match=r"prompt and continuation are 70 tokens, the model has 64 learned pos"
    ):
        generate(network, torch.arange(60)[None], max_new_tokens=10)


class TestText:
    def test_pieces_join_to_the_text_and_never_split_a_character(
        self, network: MPT, tiny_tokenizer: Any
    ) -> None:
        pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
        prompts = ["def f(x):", "naïve 言葉", ""]
        texts = generate_text(
            network,
            tiny_tokenizer,
            prompts,
            max_new_tokens=40,
            sampling=Sampling(1.5),
            stream=lambda row, piece: pieces[row].append(piece),
        )
        assert ["".join(pieces[row]) for row in range(3)] == texts
        assert all(pieces.values())

    def test_characters_of_many_bytes_appear_whole(self, tiny_tokenizer: Any) -> None:
        text = "a 😀b ñ 語 końcówka"
        stream = TextStream(tiny_tokenizer)
        ids = tiny_tokenizer(text)["input_ids"]
        pieces = [stream.add(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == stream.text == text
        assert all("\ufffd" not in piece for piece in pieces)
        assert "" in pieces

    def test_bytes_that_are_no_character_are_not_lost(self, tiny_tokenizer: Any) -> None:
        ids = tiny_tokenizer("😀")["input_ids"][:2]
        stream = TextStream(tiny_tokenizer)
        ids = [*ids, *tiny_tokenizer("x")["input_ids"], *ids]
        pieces = [stream.add(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == tiny_tokenizer.decode(ids)

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            (("END",), "one EN two "),
            (("two", "END"), "one EN "),
            ((), "one EN two END three"),
            (("EN",), "one "),
        ],
    )
    def test_a_stop_text_ends_it_even_across_tokens(
        self, tiny_tokenizer: Any, stop: tuple[str, ...], expected: str
    ) -> None:
        stream = TextStream(tiny_tokenizer, stop)
        pieces = []
        for token in tiny_tokenizer("one EN two END three")["input_ids"]:
            if not stream.ended:
                pieces.append(stream.add(token))
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == expected
        assert stream.ended == (stop != ())

    def test_generation_stops_at_a_stop_text(self, network: MPT, tiny_tokenizer: Any) -> None:
        [whole] = generate_text(network, tiny_tokenizer, ["a b c"], max_new_tokens=40)
        stop = whole[10:12]
        [cut] = generate_text(network, tiny_tokenizer, ["a b c"], max_new_tokens=40, stop=[stop])
        assert cut == whole[: whole.index(stop)]

    def test_another_models_tokenizer_is_refused(self, tiny_tokenizer: Any) -> None:
        small = livelier(replace(TINY, vocab_size=100))
        with pytest.raises(
            ConfigError, match=r"model's vocabulary ends at 99. Use the model's own tokenizer"
        ):
            generate_text(small, tiny_tokenizer, ["naïve 言葉 END"], max_new_tokens=4)


def script(*lines: str) -> Callable[[str], str]:
    said: Iterator[str] = iter(lines)

    def ask(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    return ask


class TestChat:
    def test_without_a_template_lines_are_continued(self, network: MPT, tiny_tokenizer: Any) -> None:
        shown: list[str] = []
        chat(
            network,
            tiny_tokenizer,
            max_new_tokens=8,
            input_fn=script("a b c", "/quit"),
            output_fn=shown.append,
        )
        [expected] = generate_text(network, tiny_tokenizer, ["a b c"], max_new_tokens=8)
        assert shown[0].startswith("The tokenizer has no chat template")
        assert "".join(shown[2:]) == expected + "\n"

    def test_with_a_template_it_is_a_talk_in_turns(
        self, network: MPT, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        shown: list[str] = []
        chat(
            network,
            tiny_tokenizer,
            max_new_tokens=4,
            system="s",
            input_fn=script("a", "b"),
            output_fn=shown.append,
        )
        first = generate_text(network, tiny_tokenizer, ["<system>s<user>a<assistant>"], max_new_tokens=4)[0]
        prompt = f"<system>s<user>a<assistant>{first}<user>b<assistant>"
        second = generate_text(network, tiny_tokenizer, [prompt], max_new_tokens=4)[0]
        assert "".join(shown[1:]) == f"{first}\n{second}\n\n"

    def test_of_templates_by_name_the_default_is_used(
        self, network: MPT, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        shown: list[str] = []
        how: dict[str, Any] = {"max_new_tokens": 4, "output_fn": shown.append}
        monkeypatch.setattr(tiny_tokenizer, "chat_template", {"default": template, "tool_use": "no"})
        chat(network, tiny_tokenizer, input_fn=script("a", "/quit"), **how)
        assert "".join(shown[1:]) == generate_text(network, tiny_tokenizer, ["a"], max_new_tokens=4)[0] + "\n"
        monkeypatch.setattr(tiny_tokenizer, "chat_template", {"tool_use": "no"})
        with pytest.raises(
            ConfigError, match="it has the chat templates tool_use, and none is called default"
        ):
            chat(network, tiny_tokenizer, input_fn=script("a"), **how)

    def test_what_no_longer_fits_is_left_out_with_a_note(self, network: MPT, tiny_tokenizer: Any) -> None:
        shown: list[str] = []
        line = "w x y z " * 5
        chat(
            network,
            tiny_tokenizer,
            max_new_tokens=20,
            input_fn=script(line, line, "/new", "a"),
            output_fn=shown.append,
        )
        notes = [piece for piece in shown if "no longer fit" in piece]
        assert len(notes) == 1
        assert notes[0].startswith("(")

    def test_ctrl_c_leaves_cleanly(self, network: MPT, tiny_tokenizer: Any) -> None:
        def interrupted(_: str) -> str:
            raise KeyboardInterrupt

        shown: list[str] = []
        chat(network, tiny_tokenizer, max_new_tokens=4, input_fn=interrupted, output_fn=shown.append)
        assert shown[-1] == "\n"


def test_a_prompt_begins_as_documents_do_and_does_not_end(adding_tokenizers: dict[str, str]) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    for adds, before in {"nothing": [], "bos": [1], "eos": [], "both": [1], "pairs": [1, 0]}.items():
        tokenizer: Any = load_tokenizer(adding_tokenizers[adds])
        text = tokenizer("one two", add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, "one two", replace(TINY, vocab_size=400)) == [*before, *text]
