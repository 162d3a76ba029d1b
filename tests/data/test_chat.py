"""What records say, in each of their forms, and what is wrong with those that are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mptfoundry.data.chat import CHATML, RecordError, turns_of

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]
RENDERED = [
    (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        "4<|im_end|>\n",
    ),
    ("<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n", "6<|im_end|>\n"),
]


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_a_prompt_and_its_response_are_taken_as_they_are(answer: str, tiny_tokenizer: Any) -> None:
    record = {"prompt": " Q ", answer: "A\n", "id": 7, "source": None}
    assert turns_of(record, tiny_tokenizer) == ([(" Q ", "A\n")], False, {"id", "source"})


def test_a_conversation_is_rendered_in_chatml_where_the_tokenizer_has_no_template(
    tiny_tokenizer: Any,
) -> None:
    assert turns_of({"messages": TALK}, tiny_tokenizer) == (RENDERED, True, set())
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names.get(m["role"], m["role"]), "value": m["content"], "id": 1} for m in TALK]
    ignored = {"prompt", "conversations[].id"}
    assert turns_of({"conversations": shared, "prompt": "x"}, tiny_tokenizer) == (RENDERED, True, ignored)


def test_an_instruction_becomes_dollys_prompt(tiny_tokenizer: Any) -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "category": "math"}
    ((prompt, response),), is_chat, ignored = turns_of(record, tiny_tokenizer)
    assert prompt.endswith("completes the request.\n\n### Instruction:\nAdd.\n1 2\n\n### Response:\n")
    assert (response, is_chat, ignored) == ("3", False, {"category"})
    for nothing in ({}, {"input": ""}, {"input": None}):
        ((prompt, _),), _, _ = turns_of({"instruction": "Add.", "output": "3", **nothing}, tiny_tokenizer)
        assert prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n")


def test_the_tokenizers_own_template_goes_before_chatml(tiny_tokenizer: Any) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    own = SimpleNamespace(
        chat_template=template,
        apply_chat_template=tiny_tokenizer.apply_chat_template,
    )
    turns = turns_of({"messages": TALK[1:3]}, own).turns
    assert turns == [("[user] 2 + 2?[assistant] ", "4")]


def message(role: Any, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "this is an array, not an object with fields"),
        (
            {"text": "x", "b": 1},
            "the fields are b, text. Expected prompt and response (or completion), messages",
        ),
        ({"prompt": "x"}, "response: is missing or null"),
        ({"response": "x"}, "prompt: is missing or null"),
        ({"prompt": "x", "response": None, "completion": None}, "response: is missing or null"),
        ({"prompt": "", "response": "x"}, "prompt: is empty"),
        ({"prompt": "x", "response": 7}, "response: is a number, not a text"),
        ({"prompt": "x", "response": "\ud800"}, "response: holds half of a surrogate pair"),
        ({"prompt": "x", "response": "y", "completion": "z"}, "completion: there is a response, too"),
        ({"instruction": "x"}, "output: is missing or null"),
        ({"messages": "x"}, "messages: is a string, not a list of messages"),
        ({"messages": [message("user")]}, "messages: has 1 messages. A conversation needs two or more"),
        ({"messages": ["x", "y"]}, "messages[0]: is a string, not an object with role and content"),
        ({"messages": [{"content": "x"}, {}]}, "messages[0].role: is missing"),
        (
            {"messages": [message("bot"), message("user")]},
            "messages[0].role: 'bot' is unknown. Use system, user",
        ),
        ({"messages": [message("user", None), message("user")]}, "messages[0].content: is missing or null"),
        ({"messages": [message("user", ""), message("user")]}, "messages[0].content: is empty"),
        ({"messages": [message("user"), message("user")]}, "messages[1].role: is 'user', as the one"),
        (
            {"messages": [message("user"), {**message("assistant", None), "tool_calls": [{}]}]},
            "messages[1].tool_calls: a call is not rendered. Write it into content",
        ),
        (
            {"messages": [message("user"), message("tool")]},
            "messages[1].role: the last message is the tool's",
        ),
        ({"messages": [message("assistant"), message("user")]}, "messages[0].role: is the assistant's"),
        (
            {"conversations": [{"from": "alien", "value": "x"}, {}]},
            "conversations[0].from: 'alien' is unknown",
        ),
    ],
)
def test_a_record_that_is_none_says_the_field_and_the_reason(
    record: Any, said: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(RecordError) as caught:
        turns_of(record, tiny_tokenizer)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('no system here') }}",
            "messages: the chat template refuses them: no sys",
        ),
        ("{{ messages | length }}", "messages[1]: the chat template writes what came"),
    ],
)
def test_a_template_that_refuses_or_rewrites_a_conversation_is_said(
    template: str, said: str, tiny_tokenizer: Any
) -> None:
    own = SimpleNamespace(chat_template=template, apply_chat_template=tiny_tokenizer.apply_chat_template)
    with pytest.raises(RecordError) as caught:
        turns_of({"messages": TALK[1:3]}, own)
    assert str(caught.value).startswith(said)


def test_chatml_opens_the_answer_only_when_asked(tiny_tokenizer: Any) -> None:
    def render(**options: Any) -> str:
        return str(
            tiny_tokenizer.apply_chat_template(TALK[1:2], tokenize=False, chat_template=CHATML, **options)
        )

    assert render(add_generation_prompt=True) == render() + "<|im_start|>assistant\n"
