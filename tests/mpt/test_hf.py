from __future__ import annotations

import ast
import functools
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import set_seed

from mptfoundry.mpt import hf
from mptfoundry.mpt.config import InitConfig, MPTConfig
from mptfoundry.mpt.hf import MPTFoundryConfig, MPTFoundryForCausalLM
from mptfoundry.mpt.network import MPT
from mptfoundry.mpt.position import AttentionContext

from . import test_network
from .reference import assert_as_exact, in_float64, livelier, rms
from .test_network import config, native_pair, tokens

ARCHITECTURES = {
    **test_network.ARCHITECTURES,
    "steep slopes": config({"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6}, no_bias=True),
    "prefix": config({"alibi": True, "prefix_lm": True}, embedding_fraction=0.5),
    "rotary, window, grouped": config(
        {"rope": True, "sliding_window_size": 4, "attn_type": "grouped_query_attention", "kv_n_heads": 2}
    ),
}
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)
SOME = pytest.mark.parametrize(
    "architecture", ["steep slopes", "gated, rms, softcaps, untied", "learned positions"]
)


def wrapped(made: MPT) -> MPTFoundryForCausalLM:
    """transformers' class with a network's weights."""
    model = MPTFoundryForCausalLM(MPTFoundryConfig(**made.config.to_dict(), pad_token_id=0))
    missing, unexpected = model.load_state_dict(made.state_dict(), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    return model.eval()


def pair(name: str) -> tuple[MPT, MPTFoundryForCausalLM]:
    made = livelier(ARCHITECTURES[name])
    return made, wrapped(made)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three rows, of 12, 9 and 5 tokens."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :3] = mask[2, :7] = 0
    return tokens(3, 12), mask


@EACH
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_loss_are_the_networks(architecture: str, padding: str) -> None:
    ours, model = pair(architecture)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 9) if padding == "left" else slice(21, 30)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    options: dict[str, Any] = {"attention_mask": mask.bool() if padding != "none" else None}
    if ours.config.attn_config.prefix_lm:
        options["prefix_mask"] = (torch.arange(30) < 14).expand(2, 30)
    with torch.no_grad():
        logits = ours(ids, **options).logits
        loss = ours(ids, labels=labels, **options).loss
        given = model(ids, labels=labels, **{**options, "attention_mask": mask})
    assert torch.equal(given.logits, logits)
    assert torch.equal(given.loss, loss)


@pytest.mark.parametrize("attention", [{}, {"n_heads": 12, "clip_qkv": 0.2}], ids=str)
def test_logits_are_those_of_transformers_own_mpt(attention: dict[str, Any]) -> None:
    ours, theirs = native_pair(**attention)
    ids, mask = left_padded()
    with torch.no_grad():
        truth = in_float64(ours)(ids, attention_mask=mask.bool()).logits[mask.bool()]
        native = theirs(ids, attention_mask=mask).logits[mask.bool()]
        custom = wrapped(ours)(ids, attention_mask=mask).logits[mask.bool()]
    assert_as_exact([custom], [native], [truth])


def test_logits_of_the_last_tokens_alone() -> None:
    _, model = pair("gated, rms, softcaps, untied")
    ids = tokens(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


@EACH
def test_attention_weights_are_those_that_the_network_uses(architecture: str) -> None:
    """Weights in place of a backend give the backend's logits, and hide what is not to be seen."""
    ours, model = pair(architecture)
    exact = wrapped(in_float64(ours)).double()
    ids, mask = left_padded()
    with torch.no_grad():
        truth = exact(ids, attention_mask=mask).logits[mask == 1]
        plain = model(ids, attention_mask=mask).logits[mask == 1]
        output = model(ids, attention_mask=mask, output_attentions=True)
    assert rms(output.logits[mask == 1] - truth) <= 2 * rms(plain - truth)
    assert len(output.attentions) == 2
    window = ours.config.attn_config.sliding_window_size
    distance = torch.arange(12)[:, None] - torch.arange(12)
    hidden = (distance < 0) | ((distance > window) & (window >= 0))
    for weights in output.attentions:
        assert weights.shape == (3, 4, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 12))
        assert weights.masked_select(hidden).eq(0).all()
        real = (mask == 1)[:, None, :, None] & (mask == 0)[:, None, None]
        assert weights.masked_select(real).eq(0).all()


def test_attention_weights_worked_by_hand() -> None:
    """Without queries, two heads of slopes 1/4 and 1/16 weigh keys by ``exp(-slope * distance)`` alone."""
    made = MPT(config({"alibi": True, "alibi_bias_max": 4}, n_heads=2, no_bias=True), seed=1)
    for block in made.transformer.blocks:
        nn.init.zeros_(block.attn.Wqkv.weight)
    weights = wrapped(made)(tokens(1, 3), output_attentions=True).attentions[0][0, :, 2]
    raised = torch.exp(torch.tensor([[-2 / 4, -1 / 4, 0], [-2 / 16, -1 / 16, 0]]))
    torch.testing.assert_close(weights, raised / raised.sum(-1, keepdim=True))


def test_hidden_states_begin_with_the_embedding_and_end_with_the_norm() -> None:
    ours, model = pair("mpt")
    ids = tokens(2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], ours.transformer.wte(ids))
    assert torch.equal(model.lm_head(output.hidden_states[2]), output.logits)
    assert model(ids).hidden_states is None
    first = model(inputs_embeds=output.hidden_states[0], return_dict=False)
    assert torch.equal(first[0], output.logits)


@SOME
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(architecture: str, reentrant: bool) -> None:
    ids = tokens(2, 20)
    made = MPT(replace(ARCHITECTURES[architecture], resid_pdrop=0.1), seed=1)
    gradients = []
    for checkpoints in (False, True):
        model = wrapped(made).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        set_seed(3)
        output = model(ids, labels=ids, output_hidden_states=True)
        assert output.logits is None and len(output.hidden_states) == 3
        output.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(some, other) for some, other in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match=r"computes the blocks twice.*Use use_cache=False"):
        model(ids, use_cache=True)
    model.gradient_checkpointing_disable()
    assert model(ids, use_cache=True).past_key_values is not None


@SOME
def test_training_gives_the_networks_gradients(architecture: str) -> None:
    ours, model = pair(architecture)
    ids = tokens(2, 20)
    for some in (ours.train(), model.train()):
        some(ids, labels=ids).loss.backward()
    theirs = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad)


def test_transformers_trainer_trains_and_evaluates_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from transformers import Trainer, TrainingArguments

    _, model = pair("steep slopes")
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 12)]
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=3, gradient_checkpointing=True, **options)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_transformers_trainer_continues_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 12)]
    options = {"use_cpu": True, "report_to": [], "save_steps": 1, "save_only_model": False}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, **options)
    made = Trainer(pair("steep slopes")[1], arguments, train_dataset=rows)
    made.train()
    again = Trainer(pair("steep slopes")[1], arguments, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    theirs = dict(again.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, theirs[name])


def test_a_loss_is_divided_by_the_items_that_are_told() -> None:
    """So the losses of a batch's parts add up to that of the batch, however many labels each has."""
    _, model = pair("gated, rms, softcaps, untied")
    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.tensor([[0] * 9, [0] * 2 + [1] * 7]) == 1, -100)
    items = (labels[:, 1:] != -100).sum()
    for kind in (nn.Linear, Doubled):
        model.lm_head.__class__ = kind
        whole = model(ids, labels=labels).loss
        for told in (items, int(items)):
            rows = [
                model(i[None], labels=own[None], num_items_in_batch=told)
                for i, own in zip(ids, labels, strict=True)
            ]
            torch.testing.assert_close(rows[0].loss + rows[1].loss, whole)


def test_accumulated_gradients_are_those_of_stock_models(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from transformers import Trainer, TrainingArguments

    ours, theirs = native_pair()
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(2, 12)]
    rows[1]["labels"][3:] = -100
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "optim": "sgd", "learning_rate": 1.0}
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    arguments = TrainingArguments(str(tmp_path), max_grad_norm=0.0, **batches, **options)
    model = wrapped(ours)
    for each in (model, theirs):
        Trainer(each, arguments, train_dataset=rows).train()
    expected = theirs.state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-5)


@SOME
def test_a_traced_model_computes_the_same_for_other_lengths(architecture: str) -> None:
    _, model = pair(architecture)
    model.config.use_cache = model.config.return_dict = False
    _, mask = left_padded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (tokens(3, 9), torch.ones(3, 9, dtype=torch.long)))
    for length, attended in ((9, mask[:, 3:]), (12, mask), (5, torch.ones_like(mask[:, :5]))):
        ids = tokens(3, length)
        found, expected = (each(ids, attended)[0][attended == 1] for each in (traced, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    """As an adapter is: its weight alone is not what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_loss_goes_through_what_stands_in_the_heads_place() -> None:
    _, model = pair("gated, rms, softcaps, untied")
    model.lm_head.__class__ = Doubled
    ids = tokens(2, 9)
    output = model(ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


@SOME
def test_embeddings_can_be_resized(architecture: str) -> None:
    _, model = pair(architecture)
    is_tied = model.config.tie_word_embeddings
    ids = tokens(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(128, mean_resizing=False)
    assert torch.equal(model(ids).logits[..., :101], before)
    assert model.config.vocab_size == 128
    assert (model.lm_head.weight is model.transformer.wte.weight) == is_tied
    assert model.lm_head.weight.shape == (128, 48)
    model.resize_token_embeddings(50)
    assert model(ids % 50).logits.shape == (1, 9, 50)


@SOME
def test_a_saved_model_loads_again(architecture: str, tmp_path: Path) -> None:
    ours, model = pair(architecture)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(ours.state_dict())
    again, found = MPTFoundryForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.network_config() == ours.config
    ids = tokens(1, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = MPTFoundryForCausalLM.from_pretrained(tmp_path, torch_dtype="bfloat16")
    assert half(ids).logits.dtype == torch.bfloat16


def test_the_attention_backend_is_chosen_at_load(tmp_path: Path) -> None:
    pair("mpt")[1].save_pretrained(tmp_path)
    load = MPTFoundryForCausalLM.from_pretrained
    for options in ({"attn_impl": "torch"}, {"attn_config": {"attn_impl": "torch"}}):
        model = load(tmp_path, **options)
        expected = replace(ARCHITECTURES["mpt"].attn_config, attn_impl="torch")
        assert model.transformer.blocks[0].attn.config.attn_config == expected
    with pytest.raises(
        ValueError, match=r"attn_config.attn_impl: flash can't be used: it needs a GPU. Use auto"
    ):
        load(tmp_path, attn_impl="flash")(tokens(1, 3))
    with pytest.raises(
        ValueError, match=r"attn_config.attn_impl: 'sdpa'. Allowed: auto, torch, flash, triton"
    ):
        load(tmp_path, attn_impl="sdpa")


def test_the_heads_are_told_to_whoever_asks(tmp_path: Path) -> None:
    """As numbers, also those that follow from others; a saved config says them, too."""
    for architecture, numbers in {"mpt": (12, 4), "rotary, window, grouped": (12, 2)}.items():
        made = MPTFoundryConfig(**ARCHITECTURES[architecture].to_dict())
        assert (made.head_dim, made.num_key_value_heads) == numbers
        made.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert (saved["head_dim"], saved["attn_config"]["kv_n_heads"]) == numbers
        assert MPTFoundryConfig.from_pretrained(tmp_path).network_config() == ARCHITECTURES[architecture]


def test_a_problem_type_that_was_given_stays(tmp_path: Path) -> None:
    MPTFoundryConfig(problem_type="regression").save_pretrained(tmp_path)
    assert MPTFoundryConfig.from_pretrained(tmp_path).problem_type == "regression"
    assert MPTFoundryConfig().problem_type is None


def test_a_switch_that_no_mpt_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn_config.alibi_max: 3. MPT has no such option here"):
        MPTFoundryConfig(attn_config={"alibi_max": 3})
    sections = {"attn_config": {"alibi": True}, "ffn_config": {"ffn_act_fn": {"approximate": "tanh"}}}
    made = MPTFoundryConfig(**sections, learned_pos_emb=False)
    made.ffn_config = {"ffn_act_fn": {"name": "gelu"}}
    assert made.network_config().ffn_config.ffn_act_fn.approximate == "tanh"
    assert MPTFoundryConfig().network_config() == MPTConfig()


def test_more_tokens_than_in_training_where_positions_allow_it(tmp_path: Path) -> None:
    _, model = pair("steep slopes")
    assert model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False).shape[1] == 70
    model.save_pretrained(tmp_path)
    longer = MPTFoundryForCausalLM.from_pretrained(tmp_path, max_seq_len=80)
    assert longer.config.max_seq_len == 80
    ids = tokens(1, 60)
    assert torch.equal(longer(ids).logits, model(ids).logits)


def test_learned_positions_end_where_they_end(tmp_path: Path) -> None:
    _, model = pair("learned positions")
    with pytest.raises(ValueError, match=r"input_ids: 65 tokens, but the model has 64 learned positions"):
        model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size"):
        MPTFoundryForCausalLM.from_pretrained(tmp_path, max_seq_len=80)


def test_a_new_model_is_drawn_by_its_scheme_and_torchs_seed() -> None:
    scheme = {"init_config": InitConfig("baseline_", init_std=0.5, init_div_is_residual=False).__dict__}
    made = MPTFoundryConfig(**{**ARCHITECTURES["wide heads, plain positions"].to_dict(), **scheme})

    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return MPTFoundryForCausalLM(made).state_dict()

    first, same, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "transformer.blocks.0.attn.Wqkv.weight"
    assert not torch.equal(first[name], other[name])
    assert abs(first[name].std() - 0.5) < 0.02
    assert first["transformer.norm_f.weight"].eq(1).all()
    empty = MPTFoundryForCausalLM(MPTFoundryConfig(**made.network_config().to_dict(), init_device="meta"))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_only_what_a_folder_lacks_is_drawn(tmp_path: Path) -> None:
    _, model = pair("mpt")
    model.save_pretrained(tmp_path)
    untied, found = MPTFoundryForCausalLM.from_pretrained(
        tmp_path, tie_word_embeddings=False, output_loading_info=True
    )
    assert list(found["missing_keys"]) == ["lm_head.weight"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(untied.state_dict()[name], tensor) == (name != "lm_head.weight")
    assert 0 < untied.lm_head.weight.std() < 1


def test_init_device_is_where_a_loaded_model_lies(tmp_path: Path) -> None:
    pair("mpt")[1].save_pretrained(tmp_path)
    for device in ("meta", "cpu:0"):
        model = MPTFoundryForCausalLM.from_pretrained(tmp_path, init_device=device)
        assert model.device.type == "cpu"
    with pytest.raises(RuntimeError, match=r"nowhere"):
        MPTFoundryForCausalLM.from_pretrained(tmp_path, init_device="nowhere")


class KeepsContext(nn.Module):
    """Stands for an attention; keeps the contexts that it is called with."""

    def __init__(self, contexts: list[AttentionContext]) -> None:
        super().__init__()
        self.contexts = contexts

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        self.contexts.append(context)
        return x


def test_a_context_moves_with_its_blocks() -> None:
    ones = torch.ones(2, 3)
    context = AttentionContext(scale=1, slopes=ones, documents=ones, prefix=ones, rotary=(ones, ones))
    context.once("backend", lambda: "chosen")
    context.once("segments", lambda: ones)
    context.once("device", lambda: torch.device("cpu"))
    block = pair("mpt")[1].transformer.blocks[0]
    contexts: list[AttentionContext] = []
    block.attn, block.norm_1, block.norm_2, block.ffn = KeepsContext(contexts), *(nn.Identity(),) * 3
    for _ in range(2):
        block(torch.ones(2, 3, 8, device="meta"), context)
    moved, again = contexts
    assert again is moved
    tensors = [moved.slopes, moved.documents, moved.prefix, *moved.rotary]
    assert all(tensor.is_meta for tensor in tensors) and len(tensors) == 5
    assert moved.once("backend", lambda: "another") == "chosen"
    assert moved.once("segments", lambda: "made again") == "made again"
    assert not context.slopes.is_meta
    kinds = AttentionContext.__annotations__
    holding_tensors = {name for name, kind in kinds.items() if "Tensor" in kind}
    assert holding_tensors == {"slopes", "documents", "prefix", "rotary"}, "another has to move, too"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "input_ids, inputs_embeds: exactly one of them is needed"),
    "short mask": (
        {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 3)},
        r"attention_mask: its shape is \(1, 3\), it must be \(batch, 4\)",
    ),
    "prefix": ({"input_ids": tokens(1, 4), "prefix_mask": torch.ones(1, 4)}, "this model is not a prefix-LM"),
    "documents": (
        {"input_ids": tokens(1, 4), "sequence_id": torch.zeros(1, 4), "use_cache": True},
        "sequence_id: rows of several documents can't be kept in a cache",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit_are_refused(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pair("mpt")[1](**arguments)


def test_packed_documents_do_not_see_each_other() -> None:
    ours, model = pair("mpt")
    ids, documents = tokens(1, 12), torch.tensor([[0] * 5 + [1] * 7])
    logits = model(ids, sequence_id=documents).logits
    assert torch.equal(logits, ours(ids, sequence_id=documents).logits)
    torch.testing.assert_close(logits[:, 5:], model(ids[:, 5:]).logits)


ROOM = Path(hf.__file__).parent


@functools.cache
def imports_of(name: str) -> set[str]:
    """Siblings that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOM / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_every_file_that_the_network_needs_is_named_in_the_entry_file() -> None:
    """transformers copies what the entry file itself imports, found by this expression."""
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", (ROOM / "hf.py").read_text(), re.MULTILINE))
    needed, new = set(), {"hf"}
    while new:
        needed |= new
        new = {found for name in new for found in imports_of(name)} - needed
    assert named == needed - {"hf"}


def test_no_files_import_each_other() -> None:
    """transformers 4.51 follows imports without noting where it has been."""

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"{' -> '.join(trail)} -> {name}"
        for found in imports_of(name):
            follow(found, (*trail, name))

    follow("hf", ())
