"""From a record to its turns: what is said to the model, and what it is to answer.

A record's columns tell its form:

    prompt, response (or completion)     one turn, as it is
    messages                             [{role, content}, ...], rendered by the tokenizer's chat template
    conversations                        ShareGPT's [{from, value}, ...], the same
    instruction, input (or not), output  one turn in the words of Dolly's prompts

A *turn* is (prompt, response), two texts; those of a conversation, joined, are the rendered conversation.
They are cut as llm-foundry cuts them: a turn ends with each message of the assistant's, and the words that
open that message belong to the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mptfoundry.data.records import json_type

# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt of https://huggingface.co/datasets/mosaicml/dolly_hhrlhf, on which MPT-7B-Instruct was trained.
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
MAY_BE_EMPTY = ("system", "tool")
TOOL_CALLS = ("tool_calls", "function_call")
FORMS = "prompt and response (or completion), messages, conversations, or instruction and output"
MOST_FIELDS_NAMED = 8

Turn = tuple[str, str]


class RecordError(ValueError):
    """What is wrong with a record: `field: reason`, without the record's place."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)


class Turns(NamedTuple):
    """What a record says.

    Attributes:
        turns: In order, at least one.
        is_chat: They are rendered by a chat template, which writes special tokens itself.
        ignored: Columns, and keys of messages, that were not looked at.
    """

    turns: Sequence[Turn]
    is_chat: bool
    ignored: frozenset[str]


def turns_of(record: Any, tokenizer: Any) -> Turns:
    """A record's turns.

    Args:
        record: An object with one of the forms above; a column that is null counts as missing.
        tokenizer: transformers' tokenizer, for its chat template; ChatML if it has none.

    Raises:
        RecordError: The record is not of that form.
    """
    if not isinstance(record, Mapping):
        raise RecordError("", f"this is {_a(record)}, not an object with fields")
    if record.get("messages") is not None:
        return _conversation(record, "messages", "role", "content", tokenizer)
    if record.get("conversations") is not None:
        return _conversation(record, "conversations", "from", "value", tokenizer)
    if "prompt" in record or "response" in record or "completion" in record:
        answers = [name for name in ("response", "completion") if record.get(name) is not None]
        if len(answers) > 1:
            raise RecordError("completion", "there is a response, too. Keep one of them")
        used = {"prompt", *(answers or ["response"])}
        turn = _text(record, "prompt"), _text(record, *(answers or ["response"]))
        return Turns([turn], False, frozenset(map(str, record)) - used)
    if "instruction" in record or "output" in record:
        used = {"instruction", "input", "output"}
        instruction = _text(record, "instruction")
        if record.get("input") not in (None, ""):
            instruction += "\n" + _text(record, "input")
        turn = INSTRUCTION.format(instruction=instruction), _text(record, "output")
        return Turns([turn], False, frozenset(map(str, record)) - used)
    there = ", ".join(sorted(map(str, record))[:MOST_FIELDS_NAMED]) or "none"
    raise RecordError("", f"the fields are {there}. Expected {FORMS}; or give a preprocessing_fn")


def _conversation(
    record: Mapping[str, Any], field: str, role_key: str, text_key: str, tokenizer: Any
) -> Turns:
    turns = _render(_messages(record, field, role_key, text_key), tokenizer)
    keys = {str(key) for message in record[field] for key, value in message.items() if value is not None}
    unused = {f"{field}[].{key}" for key in keys - {role_key, text_key}}
    return Turns(turns, True, frozenset(map(str, record)) - {field} | unused)


def _messages(record: Mapping[str, Any], field: str, role_key: str, text_key: str) -> list[dict[str, str]]:
    """The messages by `role` and `content`, checked."""
    given = record[field]
    if not isinstance(given, (list, tuple)):
        raise RecordError(field, f"is {_a(given)}, not a list of messages")
    if len(given) < 2:
        raise RecordError(field, f"has {len(given)} messages. A conversation needs two or more")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(given):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise RecordError(place, f"is {_a(message)}, not an object with {role_key} and {text_key}")
        role = message.get(role_key)
        role = SHAREGPT_ROLES.get(role, role) if role_key == "from" and isinstance(role, str) else role
        if role is None:
            raise RecordError(f"{place}.{role_key}", "is missing")
        if role not in ROLES:
            known = [*(SHAREGPT_ROLES if role_key == "from" else ()), *ROLES]
            raise RecordError(f"{place}.{role_key}", f"{role!r} is unknown. Use {', '.join(known)}")
        for key in TOOL_CALLS:
            if message.get(key):
                raise RecordError(
                    f"{place}.{key}", f"a call is not rendered. Write it into {text_key}, as the model is to"
                )
        if messages and messages[-1]["role"] == role:
            raise RecordError(f"{place}.{role_key}", f"is {role!r}, as the one before. Join the two")
        text = _text(message, text_key, place=f"{place}.", may_be_empty=role in MAY_BE_EMPTY)
        messages.append({"role": role, "content": text})
    if messages[0]["role"] == "assistant":
        raise RecordError(f"{field}[0].{role_key}", "is the assistant's: there is nothing that it answers")
    if messages[-1]["role"] != "assistant":
        last = f"{field}[{len(messages) - 1}].{role_key}"
        raise RecordError(last, f"the last message is the {messages[-1]['role']}'s, not the assistant's")
    return messages


def _render(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[Turn]:
    turns: list[Turn] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:number], opens_answer=True)
        whole = _apply(tokenizer, messages[: number + 1], opens_answer=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise RecordError(
                f"messages[{number}]",
                "the chat template writes what came before differently once this message is there, so that "
                "it can't be told what is the answer",
            )
        turns.append((prompt[len(done) :], whole[len(prompt) :]))
        done = whole
    return turns


def _apply(tokenizer: Any, messages: Sequence[dict[str, str]], *, opens_answer: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=opens_answer,
                chat_template=tokenizer.chat_template or CHATML,
            )
        )
    except Exception as error:
        raise RecordError("messages", f"the chat template refuses them: {error}") from error


def _text(record: Mapping[str, Any], field: str, *, place: str = "", may_be_empty: bool = False) -> str:
    value = record.get(field)
    if value is None:
        raise RecordError(place + field, "is missing or null")
    if not isinstance(value, str):
        raise RecordError(place + field, f"is {_a(value)}, not a text")
    if not value and not may_be_empty:
        raise RecordError(place + field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(place + field, "holds half of a surrogate pair, which is no text") from error
    return value


def _a(value: Any) -> str:
    name = json_type(value)
    return name if name == "null" else f"{'an' if name[0] in 'aeio' else 'a'} {name}"
