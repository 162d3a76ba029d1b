"""Block sizes of the Triton kernels: how many queries and keys a program works on at once, and with how much.

The table is made by `scripts/tune_attention.py`, so nothing is tuned when a run starts. It is indexed by the
kernel and the width of a head, padded to a power of two; there is one for each generation of GPUs that
differs, and one for float32, whose numbers take twice the room.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, and how many loads are under way at once."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# Generation -> kernel -> width -> tile. `sm_80` also serves 8.6, 8.9 and 12.x, which have 99 KiB of shared
# memory.
# `backward_key_grouped` is for query heads that share a key head.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_90": {
        "forward": {
            16: Tile(128, 64, 8, 3),
            32: Tile(128, 64, 8, 3),
            64: Tile(128, 64, 8, 3),
            128: Tile(128, 64, 8, 3),
            256: Tile(64, 32, 8, 2),
        },
        "backward_query": {
            16: Tile(64, 64, 4, 3),
            32: Tile(64, 64, 4, 3),
            64: Tile(128, 64, 8, 3),
            128: Tile(128, 64, 8, 2),
            256: Tile(64, 32, 8, 2),
        },
        "backward_key": {
            16: Tile(64, 64, 4, 3),
            32: Tile(64, 64, 4, 3),
            64: Tile(64, 128, 8, 2),
            128: Tile(32, 128, 8, 2),
            256: Tile(16, 64, 8, 2),
        },
        "backward_key_grouped": {
            16: Tile(32, 64, 4, 3),
            32: Tile(32, 64, 4, 3),
            64: Tile(32, 128, 8, 2),
            128: Tile(32, 64, 8, 2),
            256: Tile(16, 64, 8, 2),
        },
    },
    "sm_80": {
        "forward": {
            16: Tile(128, 64, 8, 3),
            32: Tile(128, 64, 8, 3),
            64: Tile(128, 64, 8, 3),
            128: Tile(128, 32, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
        "backward_query": {
            16: Tile(64, 64, 4, 3),
            32: Tile(64, 64, 4, 3),
            64: Tile(64, 32, 4, 3),
            128: Tile(64, 64, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
        "backward_key": {
            16: Tile(64, 64, 4, 3),
            32: Tile(64, 64, 4, 3),
            64: Tile(64, 128, 8, 2),
            128: Tile(32, 64, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
        "backward_key_grouped": {
            16: Tile(32, 64, 4, 3),
            32: Tile(16, 64, 4, 3),
            64: Tile(32, 128, 8, 2),
            128: Tile(32, 32, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
    },
    "float32": {
        "forward": {
            16: Tile(64, 32, 8, 2),
            32: Tile(64, 32, 8, 2),
            64: Tile(32, 16, 8, 2),
            128: Tile(32, 16, 8, 2),
            256: Tile(16, 16, 8, 2),
        },
        "backward_query": {
            16: Tile(32, 32, 4, 2),
            32: Tile(32, 32, 4, 2),
            64: Tile(32, 32, 8, 2),
            128: Tile(32, 16, 8, 2),
            256: Tile(16, 16, 8, 2),
        },
        "backward_key": {
            16: Tile(32, 32, 4, 2),
            32: Tile(32, 32, 4, 2),
            64: Tile(32, 32, 8, 2),
            128: Tile(32, 32, 8, 2),
            256: Tile(16, 16, 8, 2),
        },
        "backward_key_grouped": {
            16: Tile(32, 32, 4, 2),
            32: Tile(32, 32, 4, 2),
            64: Tile(32, 32, 8, 2),
            128: Tile(32, 32, 8, 2),
            256: Tile(16, 16, 8, 2),
        },
    },
}


def keys_of_decoding(head_dim: int, number_bytes: int) -> int:
    """Keys that the decoding kernel visits at once."""
    return 64 if padded(head_dim) < 256 else 32 if number_bytes == 2 else 16


def padded(head_dim: int) -> int:
    """The power of two, 16 at least, that a head's width is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def generation_of(capability: tuple[int, int]) -> str:
    """The table for a GPU of this capability, such as (9, 0), in the numbers of 16 bits."""
    return "sm_90" if capability[0] in (9, 10) else "sm_80"


def tile_of(
    kernel: str, head_dim: int, capability: tuple[int, int], number_bytes: int, *, has_dropout: bool = False
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: `forward`, `backward_query`, `backward_key` or `backward_key_grouped`.
        head_dim: Width of a head.
        capability: Of the GPU, such as (9, 0).
        number_bytes: 2 for bfloat16 and float16, 4 for float32.
        has_dropout: Whether weights are dropped, whose random numbers take the registers of a smaller block.
    """
    name = "float32" if number_bytes == 4 else generation_of(capability)
    tile = TILES[name][kernel][padded(head_dim)]
    if not has_dropout:
        return tile
    if kernel.startswith("backward_key"):
        return tile._replace(block_q=16)
    return tile._replace(block_k=max(16, tile.block_k // 2))
