"""Activations that are recomputed, or kept by the CPU: the same numbers in less memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from mptfoundry.models.activation_checkpointing import checkpoint_activations
from mptfoundry.mpt.config import ActivationConfig, AttnConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.network import MPT

WAYS: dict[str, dict[str, bool]] = {
    "recomputed": {},
    "recomputed, inputs offloaded": {"offload": True},
    "offloaded": {"recompute": False, "offload": True},
}
PARTS: dict[str, dict[str, Iterable[int]]] = {
    "all blocks": {"block": range(4)},
    "every second block": {"block": (0, 2)},
    "attention": {"attention": range(4)},
    "mlp": {"mlp": range(4)},
    "norms": {"norm": range(4)},
    "some of each": {"attention": (0,), "mlp": (1,), "block": (3,)},
}
OUTPUTS: dict[str, dict[str, Iterable[int]]] = {
    "activation functions": {"act_fn": range(4)},
    "norms and activation functions": {"norm": range(4), "act_fn": range(4)},
    "activation functions beside other parts": {
        "act_fn": (0, 3),
        "attention": (0,),
        "mlp": (1,),
        "block": (2,),
    },
}
D_FFN = 4 * 32


def network(ffn: FFNConfig | None = None, **attention: bool) -> MPT:
    config = MPTConfig(
        ffn_config=ffn or FFNConfig(),
        d_model=32,
        n_heads=4,
        n_layers=4,
        vocab_size=64,
        max_seq_len=64,
        resid_pdrop=0.1,
        attn_config=AttnConfig(attn_pdrop=0.1, **attention),
    )
    return MPT(config, seed=0).train()


def step(model: MPT) -> tuple[float, dict[str, torch.Tensor], int]:
    """The loss and gradients of a batch of packed documents, and the bytes that forward keeps."""
    ids = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids, sequence_id=(torch.arange(64) // 20).expand(2, 64)).loss
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    bytes_kept = sum(kept.values()) - weights
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, bytes_kept


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("parts", PARTS)
def test_loss_and_gradients_with_dropout_are_bitwise_the_same(parts: str, how: str) -> None:
    model = network(alibi=True)
    loss, gradients, _ = step(model)
    model.zero_grad()
    checkpoint_activations(model, PARTS[parts], **WAYS[how])
    again, found, _ = step(model)
    assert again == loss and found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("attention", [{"rope": True}, {"alibi": True, "qk_ln": True}], ids=str)
def test_positions_and_norms_of_queries_and_keys_are_recomputed_too(attention: dict[str, bool]) -> None:
    _, gradients, _ = step(network(**attention))
    model = network(**attention)
    checkpoint_activations(model, {"block": range(4)})
    _, found, _ = step(model)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_less_is_kept_the_more_is_recomputed_or_offloaded() -> None:
    def kept(parts: str, how: str) -> int:
        model = network(alibi=True)
        checkpoint_activations(model, PARTS[parts], **WAYS[how])
        return step(model)[2]

    everything = step(network(alibi=True))[2]
    inputs = 4 * 2 * 64 * 32 * 4  # blocks, batch, seq, d_model, bytes
    assert everything > kept("every second block", "recomputed") > kept("all blocks", "recomputed")
    assert everything > kept("attention", "recomputed") > kept("all blocks", "recomputed")
    assert everything > kept("mlp", "recomputed") > kept("all blocks", "recomputed")
    assert (
        kept("all blocks", "recomputed") - kept("all blocks", "recomputed, inputs offloaded")
        >= inputs * 3 // 4
    )
    assert kept("all blocks", "offloaded") == kept("all blocks", "recomputed, inputs offloaded")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", OUTPUTS)
def test_recomputed_outputs_give_bitwise_the_same_loss_and_gradients(parts: str, autocast: bool) -> None:
    model = network(alibi=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, gradients, _ = step(model)
        model.zero_grad()
        checkpoint_activations(model, OUTPUTS[parts])
        again, found, _ = step(model)
    assert again == loss and found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


# How many tensors as wide as the feed-forward network a block keeps, and how many of them are recomputed.
FUNCTIONS = {
    ("gelu", "mptmlp"): (2, 1),
    ("gelu", "mptglu"): (4, 2),
    ("silu", "mptglu"): (4, 2),
    ("quick_gelu", "mptmlp"): (3, 1),
    ("relu", "mptmlp"): (1, 0),
    ("relu", "mptglu"): (3, 1),
}


@pytest.mark.parametrize(("function", "form"), FUNCTIONS, ids=str)
def test_outputs_of_activation_functions_are_not_kept(function: str, form: str) -> None:
    ffn = FFNConfig(ffn_type=form, ffn_act_fn=ActivationConfig(name=function))
    model = network(ffn, alibi=True)
    _, gradients, _ = step(model)
    model.zero_grad()
    wide_before = wide_after_forward(model)
    checkpoint_activations(model, {"act_fn": range(4)})
    wide = wide_after_forward(model)
    _, found, _ = step(model)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    kept, recomputed = FUNCTIONS[function, form]
    assert (wide_before, wide_before - wide) == (4 * kept, 4 * recomputed)


def wide_after_forward(model: MPT) -> int:
    """The tensors with `d_ffn` features per token that are alive between forward and backward."""

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() == 2 * 64 * D_FFN * 4:
                made[out.untyped_storage()] = True
            return out

    made = WeakIdKeyDictionary()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with Made():
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    return len(made)


def test_names_of_weights_stay_and_a_copy_has_weights_of_its_own() -> None:
    model = network(alibi=True)
    names = list(model.state_dict())
    checkpoint_activations(model, {"block": (0,), "mlp": (1,)})
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.transformer.blocks[0].parameters():
            parameter.zero_()
    assert step(twin)[0] != step(model)[0]


def test_nothing_is_computed_twice_without_gradients() -> None:
    model = network(alibi=True)
    checkpoint_activations(model, {"block": range(4)})
    calls: list[int] = []
    for block in model.transformer.blocks:
        block.norm_1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        step_ids = torch.zeros(1, 8, dtype=torch.int64)
        model(step_ids, labels=step_ids)
    assert len(calls) == 4
