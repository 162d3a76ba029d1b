"""Conversations with tools, in the forms of four families of chat templates, as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.data.examples.chat import turns_of
from mptfoundry.data.examples.turns import ExampleMaker, ExamplePlan, Targets
from mptfoundry.data.records.records import Part, Unit
from mptfoundry.tokenizer import load_tokenizer, train_bpe

# Each marks what the assistant says with transformers' `generation` blocks.
TEMPLATES = {
    # Tools in the system message as JSON, calls in <tool_call> tags, results as messages of their own.
    "hermes": """{%- if tools %}{{ '<|im_start|>system\\nFunctions:\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}
{%- for c in m.tool_calls %}{{ '\\n<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # One call in a message, its arguments as `parameters`; results with the role ipython.
    "llama3": """{%- if tools %}{{ '<|start|>system<|end|>' }}{% for tool in tools %}
{{- tool | tojson }}{% endfor %}{{ '<|eot|>' }}{% endif %}
{%- for m in messages %}{{ '<|start|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end|>' }}
{%- if m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{- '}' }}{% else %}{{ m.content }}{% endif %}
{{- '<|eot|>' }}{% endgeneration %}{% else %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}""",
    # Tools before the user's message, calls with their ids as one list, results with the id of their call.
    "mistral": """{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{{- '[RESULT]' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) + '[/RESULT]' }}
{%- elif m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls %}{{ '[CALLS][' }}{% for c in m.tool_calls %}
{{- {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}
{{- ', ' if not loop.last }}{% endfor %}{{ ']' }}{% else %}{{ m.content }}{% endif %}{{ '</s>' }}
{%- endgeneration %}
{%- else %}{{ '[SYSTEM]' + m.content + '[/SYSTEM]' }}{% endif %}{% endfor %}""",
    # Results of one round in one user message; arguments as objects or as text.
    "qwen3": """{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}
{{- '\\n' + (t | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>' + m.content + '</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls %}
{{- '\\n<tool_call>{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
{{- '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[/RESULT]",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "description": "The temperature in a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


def talk(calls: int, *, as_text: bool) -> dict[str, Any]:
    """A conversation with a round of calls, in OpenAI's form."""
    towns = ["Bern", "Ulm"][:calls]
    arguments = [json.dumps({"town": town}) if as_text else {"town": town} for town in towns]
    return {
        "tools": json.dumps(TOOLS) if as_text else TOOLS,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "How warm"}, {"type": "text", "text": " is it?"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": f"call0000{n}",
                        "type": "function",
                        "function": {"name": "temperature", "arguments": each},
                    }
                    for n, each in enumerate(arguments)
                ],
            },
            *({"role": "tool", "tool_call_id": f"call0000{n}", "content": f"{n}2"} for n in range(calls)),
            {"role": "assistant", "content": "Warm."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome."},
        ],
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tools")
    train_bpe([json.dumps(TOOLS)], 300, folder, special_tokens=MARKS)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("family", "calls"), [(name, n) for name in TEMPLATES for n in (1, 2) if (name, n) != ("llama3", 2)]
)
def test_ids_and_labels_are_those_of_transformers(
    family: str, calls: int, as_text: bool, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = TEMPLATES[family]
    plain = talk(calls, as_text=False)
    messages = [{**m, "content": m["content"] or ""} for m in plain["messages"]]
    messages[0]["content"] = "How warm is it?"
    theirs = tokenizer.apply_chat_template(
        messages, tools=TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(talk(calls, as_text=as_text)) + "\n")
    plan = ExamplePlan(tokenizer, 4096, Targets("none", "all"), None, "uint16")
    size = file.stat().st_size
    result = ExampleMaker(plan)(Unit((Part("lines", str(file), 0, size),), size))
    assert not result.counts.problems and not result.counts.ignored
    ((ids, trained),) = result.examples("uint16")
    eos = [tokenizer.eos_token_id]  # ours ends each example with it
    assert ids.tolist() == [*theirs["input_ids"], *eos]
    assert trained.tolist() == [*map(bool, theirs["assistant_masks"]), True]
    assert 0 < np.sum(trained) < len(trained)


def test_several_results_in_a_row_and_the_calls_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    (asks, calls), (results, answer), _ = turns_of(talk(2, as_text=True), tokenizer).turns
    assert asks.endswith("<|im_start|>user\nHow warm is it?<|im_end|>\n<|im_start|>assistant\n")
    assert calls.count("<tool_call>") == 2 and '"town": "Bern"' in calls
    assert results.count("<tool_response>") == 2 and answer == "Warm.<|im_end|>\n"


def test_a_template_for_tools_is_taken_where_there_are_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "no tools here", "tool_use": TEMPLATES["hermes"]}
    assert "<tool_call>" in turns_of(talk(1, as_text=False), tokenizer).turns[0][1]


def test_the_record_of_the_docs_is_one(tokenizer: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "guide" / "finetuning.md").read_text()
    (block,) = (each for each in page.split("```json\n")[1:] if '"tools"' in each)
    tokenizer.chat_template = TEMPLATES["hermes"]
    turns = turns_of(json.loads(block.partition("```")[0]), tokenizer).turns
    assert [answer.count("<tool_call>") for _, answer in turns] == [1, 0]
