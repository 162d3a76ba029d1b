"""What records say, in each of their forms, and what is wrong with those that are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mptfoundry.data.examples.chat import CHATML, RecordError, turns_of
from mptfoundry.errors import ConfigError

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
    assert turns_of(record, tiny_tokenizer) == ([(" Q ", "A\n")], False, {"id"})


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


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("answer", ["output", "response"])
@pytest.mark.parametrize("more", ["input", "context"])
def test_the_columns_of_dolly_and_alpaca_may_be_mixed(answer: str, more: str, tiny_tokenizer: Any) -> None:
    record = {"instruction": "Add.", more: "1 2", answer: "3", "prompt": None}
    ((prompt, response),), _, ignored = turns_of(record, tiny_tokenizer)
    is_read = (more, answer) != ("context", "output")
    assert prompt.endswith("### Instruction:\nAdd.\n1 2\n\n### Response:\n") == is_read
    assert (response, ignored) == ("3", set() if is_read else {"context"})


def test_messages_may_have_the_keys_of_the_other_column(tiny_tokenizer: Any) -> None:
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in TALK]
    with_nulls = [{**message, "role": None, "content": None} for message in shared]
    for record in ({"conversations": TALK}, {"messages": shared}, {"messages": with_nulls}):
        assert turns_of(record, tiny_tokenizer) == (RENDERED, True, set())


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_system_column_is_the_first_message(field: str, tiny_tokenizer: Any) -> None:
    record = {field: TALK[1:], "system": TALK[0]["content"]}
    assert turns_of(record, tiny_tokenizer) == (RENDERED, True, set())
    for nothing in (None, ""):
        assert turns_of({field: TALK, "system": nothing}, tiny_tokenizer) == (RENDERED, True, set())
    both = {field: TALK, "system": "Be long."}
    assert turns_of(both, tiny_tokenizer) == (RENDERED, True, {"system"})


# As Qwen3's, which drops an answer's thoughts once others follow, and as OLMo's, which ends the last answer
# with EOS and others with a line break.
THOUGHTFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ '<eos>' if m.role == 'assistant' and loop.last else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer"), [(THOUGHTFUL, "<think></think>6\n"), (ENDING, "6<eos>")], ids=["qwen", "olmo"]
)
def test_a_template_that_rewrites_earlier_answers_does_for_the_last_one(
    template: str, answer: str, tiny_tokenizer: Any
) -> None:
    own = SimpleNamespace(chat_template=template, apply_chat_template=tiny_tokenizer.apply_chat_template)
    before = "<system>Be brief.\n<user>2 + 2?\n<assistant>4\n<user>And 3 + 3?\n<assistant>"
    for record in ({"messages": TALK}, {"messages": TALK[1:], "system": "Be brief."}):
        assert turns_of(record, own, needs_all=False).turns == [(before, answer)]
        with pytest.raises(
            RecordError, match="Use target_responses: last and target_prompts: none"
        ) as caught:
            turns_of(record, own)
        assert str(caught.value).startswith(f"messages[{len(record['messages']) - 1}]: the chat template")


def test_an_answer_before_the_last_needs_no_place_of_its_own(tiny_tokenizer: Any) -> None:
    template = "{% if messages | length == 3 %}other{% endif %}" + ENDING
    own = SimpleNamespace(chat_template=template, apply_chat_template=tiny_tokenizer.apply_chat_template)
    ((prompt, answer),) = turns_of({"messages": TALK}, own, needs_all=False).turns
    assert prompt.startswith("<system>Be brief.") and answer == "6<eos>"


def test_of_templates_by_name_the_default_is_used(tiny_tokenizer: Any) -> None:
    def render(template: Any) -> Any:
        own = SimpleNamespace(chat_template=template, apply_chat_template=tiny_tokenizer.apply_chat_template)
        return turns_of({"messages": TALK}, own).turns

    assert render({"default": CHATML, "tool_use": "no"}) == RENDERED
    with pytest.raises(ConfigError, match=r"tokenizer: it has the chat templates rag, tool_use, and none is"):
        render({"rag": CHATML, "tool_use": "no"})
    with pytest.raises(ConfigError, match="tokenizer: its chat template can't be read: "):
        render("{% for %}")


def test_of_two_complete_forms_the_first_is_read(tiny_tokenizer: Any) -> None:
    record = {"messages": TALK, "prompt": "x", "response": "y", "conversations": None, "instruction": "z"}
    from mptfoundry.data.examples.chat import complete_forms

    assert list(complete_forms(record)) == [
        ("messages",),
        ("prompt", "response"),
        ("instruction", "response"),
    ]
    assert turns_of(record, tiny_tokenizer) == (RENDERED, True, {"prompt", "response", "instruction"})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "this is an array, not an object with fields"),
        (
            {"text": "x", "b": 1},
            "the fields are b, text. Expected prompt and response (or completion), messages",
        ),
        (
            {"prompt": "x"},
            "response: is missing or null; the fields are prompt. Expected prompt and response",
        ),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "response: is missing or null; the fields are chosen, prompt, rejected. Expected prompt and resp",
        ),
        (
            {"instruction": "x", "answer": "y"},
            "output: is missing or null; the fields are answer, instruction. E",
        ),
        ({"instruction": "x", "output": "y", "response": "z"}, "response: there is an output, too. Keep one"),
        (
            {"instruction": "x", "context": "c", "input": "i", "response": "z"},
            "context: there is an input, too. Keep one",
        ),
        ({"messages": [message("system"), message("user")], "system": "x"}, "messages[1].role: the last"),
        ({"messages": TALK[1:], "system": 7}, "system: is a number, not a text"),
        ({"messages": [message("9" * 5000), message("user")]}, "messages[0].role: '9999"),
        ({"response": "x"}, "prompt: is missing or null"),
        ({"prompt": "x", "response": None, "completion": None}, "response: is missing or null"),
        ({"prompt": "", "response": "x"}, "prompt: is empty"),
        ({"prompt": "x", "response": 7}, "response: is a number, not a text"),
        ({"prompt": "x", "response": "\ud800"}, "response: holds half of a surrogate pair"),
        ({"prompt": "x", "response": "y", "completion": "z"}, "completion: there is a response, too"),
        ({"instruction": "x"}, "output: is missing or null"),
        ({"messages": "x"}, "messages: is a string, not a list of messages"),
        ({"messages": [message("user")]}, "messages: has 1 message. A conversation needs two or more"),
        ({"messages": {"role": "user"}}, "messages: is an object, not a list of messages"),
        ({"messages": ["x", "y"]}, "messages[0]: is a string, not an object with role and content"),
        ({"messages": [{"content": "x"}, {}]}, "messages[0].role: is missing; each message has role"),
        (
            {"conversations": [{"from": "human", "text": "x"}, {"from": "gpt", "text": "y"}]},
            "conversations[0].value: is missing or null; each message has role and content, or each has from",
        ),
        (
            {"messages": [{"from": "human", "value": "x"}, message("assistant")]},
            "messages[0].role: is missing; each message has role and content, or each has from and value",
        ),
        (
            {"messages": [message("bot"), message("user")]},
            "messages[0].role: 'bot' is unknown. Use system, user",
        ),
        ({"messages": [message("user", None), message("user")]}, "messages[0].content: is missing or null"),
        ({"messages": [message("user", ""), message("user")]}, "messages[0].content: is empty"),
        ({"messages": [message("user"), message("user")]}, "messages[1].role: is 'user', as the one"),
        (
            {"messages": [message("user"), {**message("assistant", None), "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: has no function with a name; a call is {type: function,",
        ),
        (
            {"messages": [message("user"), {**message("assistant"), "function_call": {"name": "f"}}]},
            "messages[1].function_call: is OpenAI's older form. Use tool_calls",
        ),
        (
            {"messages": [{**message("user"), "tool_calls": [call("f", {})]}, message("assistant")]},
            "messages[0].tool_calls: is the user's; only the assistant calls tools",
        ),
        (
            {"messages": [message("user"), {**message("assistant"), "tool_calls": [call("f", "{")]}]},
            "messages[1].tool_calls[0].function.arguments: is not JSON",
        ),
        (
            {"messages": [message("user"), {**message("assistant"), "tool_calls": [call("f", "[1]")]}]},
            "messages[1].tool_calls[0].function.arguments: is an array, not an object",
        ),
        ({"messages": [message("user"), message("assistant")], "tools": [{}]}, "tools[0]: has no name"),
        ({"messages": [message("user"), message("assistant")], "tools": "{"}, "tools: is not JSON"),
        (
            {"messages": [message("user"), {**message("assistant"), "tool_calls": [call("f", {})]}]},
            "messages[1].tool_calls: the chat template does not write the call f. Give the tokenizer a chat",
        ),
        (
            {"messages": [message("user"), message("assistant")], "tools": [{"name": "look"}]},
            "tools: the chat template does not write the tool look. Give the tokenizer a chat template",
        ),
        (
            {"messages": [message("user", [{"type": "image_url"}]), message("assistant")]},
            "messages[0].content[0]: is not a part {type: text, text: ...}",
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
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('no system here') }}",
            "messages: the chat template refuses them: no sys",
        ),
        (
            "{{ messages | length }}",
            "messages[1]: the chat template writes earlier messages differently once this message",
        ),
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
