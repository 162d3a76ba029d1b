"""transformers' class generates as the network alone would: with caches of either name, beams, adapters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, set_seed

from mptfoundry.mpt.hf import MPTFoundryForCausalLM

from .test_hf import EACH, left_padded, pair
from .test_network import tokens

NAMES = ("past_key_values", "cache")
# With a bias for positions that depends on the distance alone, and with rotated positions.
SOME = pytest.mark.parametrize("architecture", ["steep slopes", "rotary, window, grouped"])


def cache_of(output: Any) -> tuple[str, Any]:
    """The field of the installed output class, and its cache."""
    [(name, cache)] = [(name, output[name]) for name in list(output) if name in NAMES]
    return name, cache


@torch.no_grad()
def chosen(model: MPTFoundryForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Ids continued greedily, with a pass over all of them for each token."""
    for _ in range(count):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@EACH
def test_generation_with_a_cache_gives_what_it_gives_without(architecture: str) -> None:
    _, model = pair(architecture)
    ids, mask = left_padded()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8}
    if model.config.attn_config["prefix_lm"]:
        options["prefix_mask"] = mask
    for search in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        cached = model.generate(ids, **options, **search)
        assert torch.equal(cached, model.generate(ids, **options, **search, use_cache=False))
    set_seed(5)
    sampled = model.generate(ids, **options, do_sample=True)
    set_seed(5)
    assert torch.equal(sampled, model.generate(ids, **options, do_sample=True, use_cache=False))


def test_a_prefix_changes_what_is_generated() -> None:
    _, model = pair("prefix")
    ids, mask = left_padded()
    without = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert not torch.equal(
        without, model.generate(ids, attention_mask=mask, prefix_mask=mask, max_new_tokens=8)
    )


@EACH
def test_a_padded_row_continues_as_it_does_alone(architecture: str) -> None:
    _, model = pair(architecture)
    ids, mask = left_padded()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row] == 1], max_new_tokens=8, do_sample=False)
        assert together[row, -8:].tolist() == alone[0, -8:].tolist()


def test_a_cache_goes_on_with_several_tokens_and_follows_its_beams() -> None:
    _, model = pair("rotary")
    ids = tokens(3, 12)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        order = torch.tensor([2, 0, 2])
        first.past_key_values.reorder_cache(order)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values)
        whole = model(torch.cat([ids[order, :5], ids[:, 5:]], 1))
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:])
    assert rest.past_key_values.get_seq_length() == 12


class Roomy(DynamicCache):
    """As static caches do, it returns places that hold no token yet."""

    def update(self, *arguments: Any, **options: Any) -> Any:
        return tuple(nn.functional.pad(x, (0, 0, 0, 1)) for x in super().update(*arguments, **options))


def test_a_cache_with_room_left_is_refused() -> None:
    _, model = pair("mpt")
    with pytest.raises(
        ValueError, match=r"Roomy does not hold all tokens and nothing else. Use a DynamicCache"
    ):
        model(tokens(1, 4), past_key_values=Roomy())
    with pytest.raises(ValueError, match=r"static|StaticCache does not hold all tokens"):
        model.generate(tokens(1, 4), max_new_tokens=3, cache_implementation="static")


@SOME
def test_a_given_cache_is_continued_under_either_name(architecture: str) -> None:
    _, model = pair(architecture)
    ids = tokens(2, 9)
    expected = chosen(model, ids, 3)
    for name in NAMES:
        for held in (0, 5, 8):
            cache = DynamicCache()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                if held:
                    model(ids[:, :held], **{name: cache})
                continued = model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache})
            assert torch.equal(continued, expected)
            assert cache.get_seq_length() == 9 + 3 - 1


@SOME
def test_a_conversation_continues_with_the_cache_that_generation_returned(architecture: str) -> None:
    _, model = pair(architecture)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(tokens(2, 7), return_dict_in_generate=True, **options)
    ids = torch.cat([first.sequences, tokens(2, 3)], 1)
    name, cache = cache_of(first)
    assert torch.equal(model.generate(ids, **{name: cache}, **options), chosen(model, ids, 4))


def test_two_caches_are_refused() -> None:
    _, model = pair("mpt")
    caches = {name: DynamicCache() for name in NAMES}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"past_key_values, cache: two names of one argument"):
            call(tokens(1, 4), **caches)


@pytest.mark.parametrize("architecture", ["steep slopes", "prefix"])
def test_generation_from_embeddings_is_that_from_their_ids(architecture: str) -> None:
    _, model = pair(architecture)
    ids, mask = left_padded()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    if model.config.attn_config["prefix_lm"]:
        options["prefix_mask"] = mask
    embedded = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **options)[:, 12:]
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected)
    assert torch.equal(model.generate(ids, inputs_embeds=embedded, **options)[:, -4:], expected)


@SOME
def test_an_assistant_changes_no_token(architecture: str) -> None:
    _, model = pair(architecture)
    _, assistant = pair(architecture)
    with torch.no_grad():  # another model, whose tokens are refused now and then
        assistant.transformer.blocks[1].ffn.down_proj.weight.mul_(0.5)
    ids = tokens(1, 12).repeat(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 100}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


@SOME
@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
def test_peft_generates_what_its_own_passes_choose(architecture: str, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, model = pair(architecture)
    config = model.config
    if kind == "LoraConfig":
        options = {"r": 2, "target_modules": ["Wqkv"], "init_lora_weights": False}
    else:
        options = {
            "num_virtual_tokens": 4,
            "num_layers": config.n_layers,
            "num_attention_heads": config.num_key_value_heads,
        }
        options["token_dim"] = config.d_model
        if kind == "PrefixTuningConfig":  # keys and values, all heads next to each other
            options["token_dim"] = config.head_dim * config.num_key_value_heads
    set_seed(1)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    ids, mask = left_padded()
    generated = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for _ in range(5):
        with torch.no_grad():
            logits = adapted(input_ids=ids, attention_mask=mask).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(generated, ids)
