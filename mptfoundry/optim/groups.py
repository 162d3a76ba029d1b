"""Which parameters are learned, and with which options: groups by name pattern.

A pattern is a regular expression that is searched in the parameter's name, such as
`transformer.blocks.0.attn.Wqkv.weight`: `^transformer\\.wte` is the embedding, `norm` every norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mptfoundry.architecture.trainable import pattern_problem
from mptfoundry.errors import ConfigError


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    param_groups: Sequence[Mapping[str, Any]] = (),
    disable_grad: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Freeze what `disable_grad` names, and sort the rest into an optimizer's groups.

    Args:
        named_parameters: Names and parameters, as from `module.named_parameters()`.
        param_groups: One mapping for each group: `param_str_match`, its pattern, and the options of its own
            (`lr`, `weight_decay`, ...). A parameter goes into the first group that matches it.
        disable_grad: One pattern or several; parameters that match get `requires_grad = False` and no group.

    Returns:
        The groups: first the parameters that no pattern matches, if any, with the optimizer's own options,
        then one for each of `param_groups`, in their order.

    Raises:
        ConfigError: A pattern is no regular expression or matches nothing, or nothing is left to learn.
    """
    named = dict(named_parameters)
    patterns = [disable_grad] if isinstance(disable_grad, str) else list(disable_grad)
    asked = [("disable_grad", pattern) for pattern in patterns]
    asked += [
        (f"param_groups[{i}].param_str_match", g["param_str_match"]) for i, g in enumerate(param_groups)
    ]
    names = list(named)
    problems = [(key, text) for key, pattern in asked if (text := pattern_problem(pattern, names))]
    if problems:
        raise ConfigError([f"optimizer.{key}: {text}" for key, text in problems])
    for name, parameter in named.items():
        if any(re.search(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    learned = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not learned:
        raise ConfigError("optimizer.disable_grad: every parameter is frozen. Leave one or more to learn.")
    groups = []
    for i, group in enumerate(param_groups):
        names = [name for name in learned if re.search(group["param_str_match"], name)]
        if not names:
            raise ConfigError(
                f"optimizer.param_groups[{i}].param_str_match: {group['param_str_match']} matches only "
                "parameters that are frozen or in a group above. Move the group up, or take it out."
            )
        options = {key: value for key, value in group.items() if key != "param_str_match"}
        groups.append({"params": [learned.pop(name) for name in names], **options})
    return [{"params": list(learned.values())}, *groups] if learned else groups
