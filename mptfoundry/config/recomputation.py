"""Which parts of which blocks are recomputed in backward: `model.activation_checkpointing_target`.

A part is a block, or its attention, its MLP or its two norms; llm-foundry's class names mean the same parts.
Blocks are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mptfoundry.config.schema import show

BlockChoice = int | tuple[int | str, ...] | str
Target = dict[str, BlockChoice] | tuple[str, ...] | str

PARTS: dict[str, tuple[str, ...]] = {
    "block": ("mptblock",),
    "attention": ("multihead_attention", "multiquery_attention", "grouped_query_attention"),
    "mlp": ("mptmlp", "mptglu"),
    "norm": ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm"),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in (part, *names)}
_CHOICES = "first-N, last-N, middle-N, range-N-M (without M), every-K, or numbers of blocks"


def recomputed_parts(target: Target | None, n_layers: int) -> dict[str, frozenset[int]]:
    """The blocks of each part that `target` names: `block`, `attention`, `mlp`, `norm` -> numbers of blocks.

    Args:
        target: None: all blocks; a name or a list of them: in all blocks; else the blocks by name, as one
            text with commas, a list, or a number N for the first N.
        n_layers: Blocks of the model.

    Raises:
        ValueError: A name or a choice of blocks is unknown, a block does not exist, or a part is named for a
            block that is also named as a whole.
    """
    every = frozenset(range(n_layers))
    if not isinstance(target, Mapping):
        names = (target,) if isinstance(target, str) else target or ("block",)
        chosen = dict.fromkeys(names, every)
    else:
        chosen = {name: _blocks(name, choice, n_layers) for name, choice in target.items()}
    parts: dict[str, frozenset[int]] = {}
    for name, blocks in chosen.items():
        part = _PART_OF.get(name.lower())
        if part is None:
            known = "; ".join(f"{part} ({', '.join(names)})" for part, names in PARTS.items())
            raise ValueError(f"activation_checkpointing_target: {show(name)} is not a part. Use {known}.")
        parts[part] = parts.get(part, frozenset()) | blocks
    for part in parts.keys() - {"block"}:
        if twice := parts[part] & parts.get("block", frozenset()):
            raise ValueError(
                f"activation_checkpointing_target: block {min(twice)} is recomputed whole, its {part} with "
                "it. Name one of them."
            )
    return parts


def _blocks(name: str, choice: BlockChoice, n_layers: int) -> frozenset[int]:
    where = f"activation_checkpointing_target.{name}"
    if isinstance(choice, int):
        choice = f"first-{choice}"
    entries: Sequence[int | str] = choice.replace(" ", "").split(",") if isinstance(choice, str) else choice
    found: set[int] = set()
    for entry in entries:
        blocks = range(entry, entry + 1) if isinstance(entry, int) else _range(where, entry, n_layers)
        if not blocks or blocks[0] < 0 or blocks[-1] >= n_layers:
            raise ValueError(f"{where}: {show(entry)} is not within the blocks 0 to {n_layers - 1}.")
        found.update(blocks)
    if not found:
        raise ValueError(f"{where}: names no blocks. Use {_CHOICES}.")
    return frozenset(found)


def _range(where: str, entry: str, n_layers: int) -> range:
    match = re.fullmatch(r"(first|last|middle|every)-(\d+)|range-(\d+)-(\d+)|(\d+)", entry)
    if match is None:
        raise ValueError(f"{where}: {show(entry)} is not a choice of blocks. Use {_CHOICES}.")
    kind, size, start, stop, number = match.groups()
    if number is not None:
        return range(int(number), int(number) + 1)
    if kind is None:
        return range(int(start), int(stop))
    count = int(size)
    if kind == "every":
        return range(0, n_layers, count) if count else range(0)
    # The middle as llm-foundry counts it.
    first = {"first": 0, "last": n_layers - count, "middle": (n_layers - 1) // 2 - count // 2}[kind]
    return range(first, first + count)
