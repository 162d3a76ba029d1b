"""Freeze parameters and group them for the optimizer, by name pattern.

A pattern is a regular expression to search for in a parameter's name, such as
`transformer.blocks.0.attn.Wqkv.weight`: `^transformer\\.wte` is the embedding, `norm` every norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    param_groups: Sequence[Mapping[str, Any]] = (),
    disable_grad: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Freeze the parameters that match a pattern of `disable_grad`, and split the rest into optimizer groups.

    Config checks ensure that each pattern has parameters, and that some parameters stay trainable.

    Returns:
        The groups: first the parameters that no pattern matches, if any, with the optimizer's defaults,
        then one for each of `param_groups`: what its `param_str_match` matches and no group before it, with
        its options (`lr`, `weight_decay`, ...).
    """
    trainable = {}
    for name, parameter in named_parameters:
        if any(re.search(pattern, name) for pattern in disable_grad):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            trainable[name] = parameter
    groups = [_take(trainable, **group) for group in param_groups]
    return [{"params": list(trainable.values())}, *groups] if trainable else groups


def _take(trainable: dict[str, nn.Parameter], param_str_match: str, **options: Any) -> dict[str, Any]:
    """Take the parameters that match out of `trainable`, as a group with these options."""
    names = [name for name in trainable if re.search(param_str_match, name)]
    assert names
    return {"params": [trainable.pop(name) for name in names], **options}
