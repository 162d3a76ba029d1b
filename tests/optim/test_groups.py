"""Groups by name pattern, and freezing."""

from __future__ import annotations

import torch
from torch import nn

from mptfoundry.optim.groups import parameter_groups


def network() -> nn.Module:
    return nn.ModuleDict({"wte": nn.Embedding(4, 3), "up_proj": nn.Linear(3, 5), "norm_f": nn.LayerNorm(3)})


def test_without_patterns_there_is_one_group_of_all() -> None:
    module = network()
    (group,) = parameter_groups(module.named_parameters())
    assert len(group["params"]) == len(list(module.parameters()))


def test_a_parameter_goes_into_the_first_group_that_matches() -> None:
    module = network()
    rest, biases, norm = parameter_groups(
        module.named_parameters(),
        param_groups=[
            {"param_str_match": "bias$", "weight_decay": 0.0},
            {"param_str_match": "norm", "lr": 0.5},
        ],
    )
    assert {id(p) for p in rest["params"]} == {id(module["wte"].weight), id(module["up_proj"].weight)}
    assert {id(p) for p in biases["params"]} == {id(module["up_proj"].bias), id(module["norm_f"].bias)}
    assert biases["weight_decay"] == 0.0
    assert [id(p) for p in norm["params"]] == [id(module["norm_f"].weight)]
    assert norm["lr"] == 0.5
    torch.optim.SGD([rest, biases, norm], lr=0.1)


def test_frozen_parameters_have_no_gradient_and_no_group() -> None:
    module = network()
    (group,) = parameter_groups(module.named_parameters(), disable_grad=["^wte|norm"])
    assert not module["wte"].weight.requires_grad
    assert not module["norm_f"].bias.requires_grad
    assert {id(p) for p in group["params"]} == {id(p) for p in module["up_proj"].parameters()}
