from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.models.lora import add_adapters, is_adapter
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT

pytest.importorskip("peft", reason="peft is not installed: pip install 'mptfoundry[peft]'")

TINY = MPTConfig(
    d_model=16, n_heads=2, n_layers=2, vocab_size=32, max_seq_len=16, attn_config=AttnConfig(alibi=True)
)
IDS = torch.arange(24).view(2, 12)


def adapted(device: str = "cpu", **options: Any) -> MPT:
    network = MPT(TINY, device=device, seed=None if device == "meta" else 5)
    fingerprint = torch.arange(32, dtype=torch.uint8)
    targets = ("Wqkv", "out_proj", "up_proj", "down_proj")
    add_adapters(network, {"r": 2, **options}, targets=targets, fingerprint=fingerprint, seed=5)
    return network


def test_adapters_begin_as_in_peft_and_change_nothing() -> None:
    network = adapted()
    with torch.no_grad():
        assert torch.equal(network(IDS).logits, MPT(TINY, seed=5)(IDS).logits)
    for name, parameter in network.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.3 * bound < parameter.std() and parameter.abs().max() <= bound
        elif is_adapter(name):
            assert not parameter.any()


def test_adapters_add_their_scaled_product() -> None:
    network = adapted(lora_alpha=6)
    layer: Any = network.transformer.blocks[1].ffn.up_proj
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 16)
    added = 3 * (x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)


def test_adapters_alone_have_gradients() -> None:
    network = adapted()
    loss = network(IDS, labels=IDS).loss
    assert loss is not None
    loss.backward()
    assert all((p.grad is not None) == is_adapter(name) for name, p in network.named_parameters())


def test_a_network_on_meta_gets_the_same_weights_once_it_is_placed() -> None:
    model = ComposerMPT(adapted("meta"), seed=5)
    for module in model.model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model.model.param_init_fn(module)  # type: ignore[operator]
    expected = dict(adapted().named_parameters())
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_state_dict_has_adapters_alone_and_loads_without_the_base() -> None:
    model = ComposerMPT(adapted(), seed=5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(is_adapter(name) for name in set(state) ^ {"model.base_fingerprint"})
    other = ComposerMPT(adapted(), seed=5)
    first = "model.transformer.blocks.0.attn.Wqkv.lora_B.default.weight"
    state[first].fill_(7)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()[first], state[first])
    del state[first]
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: \"model.transformer.blocks.0.attn"
    ):
        other.load_state_dict(state)
