"""Split a record into turns: prompts to the model and its responses.

A record's columns determine its form:

    prompt, response (or completion)     one turn, unchanged
    messages, conversations              [{role, content}, ...] or ShareGPT's [{from, value}, ...], rendered
                                         with the tokenizer's chat template; `system` is optional, and so
                                         are `tools` and an assistant's `tool_calls` in OpenAI's form
    instruction, input, output           one turn in Dolly's prompt format; `input` is optional. Dolly's own
                                         names also work: instruction, context (optional), response

A *turn* is a pair of texts, (prompt, response). The turns of a conversation, joined, are the rendered
conversation. They are split the way llm-foundry does it: a turn ends after each assistant message, and the
text that opens that message belongs to the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mptfoundry.data.records.records import a_type, a_word, counted, names_of, shown, text_of
from mptfoundry.errors import ConfigError, first_line
from mptfoundry.tokenizer import default_template

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
MAY_REPEAT = ("tool",)
CALLS = "tool_calls"
# Keys of a tool's result that templates may write.
RESULT_KEYS = ("tool_call_id", "name")
CALL_FORM = "a call is {type: function, function: {name: NAME, arguments: {...}}}"
ANOTHER_TEMPLATE = "Give the tokenizer a chat template that does, in its folder"
OPENAI, SHAREGPT = ("role", "content"), ("from", "value")
# Columns of conversations, and the usual keys in their messages.
CONVERSATIONS = {"messages": OPENAI, "conversations": SHAREGPT}
# Columns of a single turn: the prompt column and its possible response columns.
PAIRS = {"prompt": ("response", "completion"), "instruction": ("output", "response")}
FORMS = (
    "prompt and response (or completion), messages, conversations, instruction and output (or response), or "
    "input_ids and labels"
)

MESSAGES = "each message has role and content, or each has from and value"

Turn = tuple[str, str]


class RecordError(ValueError):
    """What is wrong with a record, as `field: reason`, without the record's location."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)


class Turns(NamedTuple):
    """The turns of a record.

    Attributes:
        turns: The turns in order, at least one.
        is_chat: Whether a chat template rendered them, including special tokens.
        ignored: Columns and message keys that have values but were ignored.
    """

    turns: Sequence[Turn]
    is_chat: bool
    ignored: frozenset[str]


def turns_of(record: Any, tokenizer: Any, *, needs_all: bool = True) -> Turns:
    """Split a record into turns.

    Args:
        record: An object in one of the forms above; null columns count as missing.
        tokenizer: A transformers tokenizer. Its chat template is used, or ChatML if it has none.
        needs_all: Whether to separate every turn. If False, everything before the last answer may be one
            prompt, which is enough if only the last answer is in the loss.

    Raises:
        RecordError: The record has none of these forms.
        ConfigError: The tokenizer's chat template can't be used.
    """
    if not isinstance(record, Mapping):
        raise RecordError("", f"this is {a_type(record)}, not an object with fields")
    form = next(complete_forms(record), None)
    if form and form[0] in CONVERSATIONS:
        return _conversation(record, form[0], tokenizer, needs_all)
    asks, *answers = form or _nearest_form(record)
    _refuse_two(answers)
    prompt = _text(record, asks, known=record)
    extras: list[str] = []
    if asks == "instruction":
        # Dolly's records call the input `context`. Next to `output`, `context` is something else.
        names = ("input", "context") if answers == ["response"] else ("input",)
        extras = [name for name in names if _has(record, name)]
        _refuse_two(extras)
        prompt = "\n".join([prompt, *(_text(record, name) for name in extras)])
        prompt = INSTRUCTION.format(instruction=prompt)
    turn = prompt, _text(record, answers[0], known=record)
    return Turns([turn], False, unused(record, {asks, *answers, *extras}))


def complete_forms(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the columns of each form the record has; the first form is the one to read."""
    for column in CONVERSATIONS:
        if record.get(column) is not None:
            yield (column,)
    for asks, answers in PAIRS.items():
        given = [name for name in answers if record.get(name) is not None]
        if record.get(asks) is not None and given:
            yield asks, *given


def _nearest_form(record: Mapping[str, Any]) -> tuple[str, str]:
    """Find the form that a record partly has, so that the error can name the missing part."""
    known = [name for name, value in record.items() if value is not None] or list(record)
    for asks, answers in PAIRS.items():
        if {asks, *answers} & set(known):
            return asks, next((name for name in answers if name in known), answers[0])
    raise RecordError("", _say_forms(record))


def _refuse_two(names: Sequence[str]) -> None:
    if len(names) > 1:
        raise RecordError(names[1], f"there is {a_word(names[0])}, too. Keep one of them")


def _conversation(record: Mapping[str, Any], field: str, tokenizer: Any, needs_all: bool) -> Turns:
    given = record[field]
    if not isinstance(given, (list, tuple)):
        raise RecordError(field, f"is {a_type(given)}, not a list of messages")
    keys = _keys_of(given, CONVERSATIONS[field])
    messages = _messages(given, field, *keys)
    tools = _tools(record)
    used = {field} if tools is None else {field, "tools"}
    if _has(record, "system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(record, "system")})
        used.add("system")
    added = len(messages) - len(given)
    turns = _render(messages, tools, field, added, tokenizer, needs_all)
    others: set[str] = set()
    for message, taken in zip(given, messages[added:], strict=True):
        names = {str(key) for key, value in message.items() if value is not None}
        others |= {f"{field}[].{name}" for name in names - {*keys, *taken}}
    return Turns(turns, True, unused(record, used) | others)


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that the record offers to the model, as JSON schemas; None without any."""
    if not _has(record, "tools"):
        return None
    tools = _parsed(record["tools"], "tools")
    if not isinstance(tools, (list, tuple)):
        raise RecordError("tools", f"is {a_type(tools)}, not a list of functions")
    for number, tool in enumerate(tools):
        if _name_of(tool) is None:
            raise RecordError(
                f"tools[{number}]", "has no name; a tool is {type: function, function: {name: ...}}"
            )
    return [dict(tool) for tool in tools] or None


def _name_of(tool: Any) -> str | None:
    """The name of a tool, or of the function that a call calls."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _calls(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message, with their arguments as objects: OpenAI writes them as text."""
    calls = _parsed(message[CALLS], f"{place}.{CALLS}")
    if not isinstance(calls, (list, tuple)):
        raise RecordError(f"{place}.{CALLS}", f"is {a_type(calls)}, not a list of calls; {CALL_FORM}")
    checked = []
    for number, call in enumerate(calls):
        here = f"{place}.{CALLS}[{number}]"
        if _name_of(call) is None or "function" not in call:
            raise RecordError(here, f"has no function with a name; {CALL_FORM}")
        function = dict(call["function"])
        arguments = _parsed(function.get("arguments") or {}, f"{here}.function.arguments")
        if not isinstance(arguments, Mapping):
            raise RecordError(f"{here}.function.arguments", f"is {a_type(arguments)}, not an object")
        checked.append({**call, "function": {**function, "arguments": dict(arguments)}})
    return checked


def _parsed(value: Any, place: str) -> Any:
    """A value that may be written as JSON text."""
    if not isinstance(value, (str, bytes)):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RecordError(place, f"is not JSON: {first_line(error)}") from error


def unused(record: Mapping[str, Any], used: set[str]) -> frozenset[str]:
    """Return the columns that have values but are not used."""
    return frozenset(str(name) for name in record if _has(record, name)) - used


def _has(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return value is not None and not (isinstance(value, str) and not value)


def _keys_of(messages: Sequence[Any], usual: tuple[str, str]) -> tuple[str, str]:
    """Return the role and text keys: the column's usual ones, unless all messages use the other pair."""
    other = SHAREGPT if usual == OPENAI else OPENAI

    def have(key: str) -> list[bool]:
        return [isinstance(message, Mapping) and message.get(key) is not None for message in messages]

    return other if messages and all(have(other[0])) and not any(have(usual[0])) else usual


def _messages(given: Sequence[Any], field: str, role_key: str, text_key: str) -> list[dict[str, Any]]:
    """Check the messages and convert them to `role` and `content`, with tool calls and their results."""
    if len(given) < 2:
        raise RecordError(field, f"has {counted(len(given), 'message')}. A conversation needs two or more")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise RecordError(place, f"is {a_type(message)}, not an object with {role_key} and {text_key}")
        role = _role(message.get(role_key), role_key, f"{place}.{role_key}")
        if message.get("function_call"):
            raise RecordError(f"{place}.function_call", f"is OpenAI's older form. Use {CALLS}; {CALL_FORM}")
        if messages and messages[-1]["role"] == role and role not in MAY_REPEAT:
            raise RecordError(f"{place}.{role_key}", f"is {role!r}, as the one before. Join the two")
        more: dict[str, Any] = {}
        if message.get(CALLS):
            if role != "assistant":
                raise RecordError(f"{place}.{CALLS}", f"is the {role}'s; only the assistant calls tools")
            more = {CALLS: _calls(message, place)}
        elif role == "tool":
            more = {key: message[key] for key in RESULT_KEYS if message.get(key) is not None}
        messages.append({"role": role, "content": _content(message, text_key, place, role, more), **more})
    if messages[0]["role"] == "assistant":
        raise RecordError(f"{field}[0].{role_key}", "is the assistant's: there is nothing that it answers")
    if messages[-1]["role"] != "assistant":
        last = f"{field}[{len(messages) - 1}].{role_key}"
        raise RecordError(last, f"the last message is the {messages[-1]['role']}'s, not the assistant's")
    return messages


def _content(message: Mapping[str, Any], key: str, place: str, role: str, more: Mapping[str, Any]) -> str:
    """A message's text; a list of text parts is joined, and a message that calls tools may have none."""
    value = message.get(key)
    if value is None and CALLS in more:
        return ""
    if value is None:
        raise RecordError(f"{place}.{key}", f"is missing or null; {MESSAGES}")
    if isinstance(value, (list, tuple)):
        parts = [each.get("text") if isinstance(each, Mapping) else None for each in value]
        if bad := [number for number, part in enumerate(parts) if not isinstance(part, str)]:
            raise RecordError(f"{place}.{key}[{bad[0]}]", "is not a part {type: text, text: ...}")
        message = {key: "".join(map(str, parts))}
    return _text(message, key, place=f"{place}.", may_be_empty=role in MAY_BE_EMPTY or CALLS in more)


def _role(given: Any, role_key: str, place: str) -> str:
    known = {name: name for name in ROLES}
    if role_key == "from":
        known = SHAREGPT_ROLES | known
    if given is None:
        raise RecordError(place, f"is missing; {MESSAGES}")
    if not isinstance(given, str) or given not in known:
        raise RecordError(place, f"{shown(given)} is unknown. Use {', '.join(known)}")
    return known[given]


def _render(
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    field: str,
    added: int,
    tokenizer: Any,
    needs_all: bool,
) -> list[Turn]:
    """Render messages into turns. The first `added` messages are not in the record's `field`."""
    turns: list[Turn] = []
    done = whole = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:number], tools, field, opens_answer=True)
        whole = _apply(tokenizer, messages[: number + 1], tools, field, opens_answer=False)
        place = f"{field}[{number - added}].{CALLS}"
        _refuse_unwritten(message.get(CALLS, ()), whole.removeprefix(prompt), place, "call")
        is_told, follows = whole.startswith(prompt), prompt.startswith(done)
        if not is_told and (needs_all or number == len(messages) - 1):
            raise RecordError(
                f"{field}[{number - added}]",
                "the chat template writes earlier messages differently once this message follows, so that "
                "the answer can't be separated from them. Give the tokenizer another chat template",
            )
        if not follows and needs_all:
            raise RecordError(
                f"{field}[{number - added}]",
                "the chat template writes earlier messages differently once others follow, so that the "
                "answers can't be separated. Use target_responses: last and target_prompts: none, or give "
                "the tokenizer another chat template",
            )
        if not (is_told and follows):
            # Everything so far becomes part of the next prompt.
            turns, done = [], ""
        if is_told:
            turns.append((prompt[len(done) :], whole[len(prompt) :]))
            done = whole
    _refuse_unwritten(tools or (), whole, "tools", "tool")
    return turns


def _refuse_unwritten(tools: Sequence[Mapping[str, Any]], text: str, place: str, what: str) -> None:
    """Raise RecordError if the chat template left out a tool or a call."""
    for tool in tools:
        if (name := str(_name_of(tool))) not in text:
            raise RecordError(
                place, f"the chat template does not write the {what} {name}. {ANOTHER_TEMPLATE}"
            )


def _apply(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    field: str,
    *,
    opens_answer: bool,
) -> str:
    templates = tokenizer.chat_template
    if tools and isinstance(templates, Mapping) and "tool_use" in templates:
        template = str(templates["tool_use"])  # as transformers does
    else:
        template = default_template(tokenizer) or CHATML
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=opens_answer,
                chat_template=template,
            )
        )
    except Exception as error:
        if type(error).__name__ == "TemplateSyntaxError":
            raise ConfigError(f"tokenizer: its chat template can't be read: {first_line(error)}.") from error
        raise RecordError(field, f"the chat template refuses them: {first_line(error)}") from error


def _text(
    record: Mapping[str, Any],
    field: str,
    *,
    place: str = "",
    may_be_empty: bool = False,
    known: Mapping[str, Any] | None = None,
) -> str:
    """Return a text field. If `known` is given, the error for a missing column lists the possible forms."""
    value = record.get(field)
    if value is None:
        more = "" if known is None else f"; {_say_forms(known)}"
        raise RecordError(place + field, f"is missing or null{more}")
    try:
        value = text_of(value)
    except ValueError as error:
        raise RecordError(place + field, str(error)) from error
    if not value and not may_be_empty:
        raise RecordError(place + field, "is empty")
    return value


def _say_forms(record: Mapping[str, Any]) -> str:
    return (
        f"the fields are {names_of(record)}. Expected {FORMS}; or name two columns, or give a function, in "
        "preprocessing_fn"
    )
