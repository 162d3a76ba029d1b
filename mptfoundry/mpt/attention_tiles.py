"""Tiles of the Triton kernels: block sizes, warps and pipeline stages.

`scripts/tune_attention.py` writes the table, so nothing is tuned when a run starts. It is indexed by kernel
and head width, padded to a power of two. There is one table per GPU generation that differs, and one for
float32, whose numbers need twice the memory.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys per block, warps per program, and pipeline stages."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# Generation -> kernel -> width -> tile. `sm_90` also serves 10.x, which has 227 KiB of shared memory for a
# program, too; `sm_80` serves 8.6, 8.9 and 12.x, which have 99 KiB. Triton has no code for older ones.
# `backward_key_grouped` is for grouped heads, where query heads share a key head.
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
    """Keys per block in the decoding kernel."""
    return 64 if padded(head_dim) < 256 else 32 if number_bytes == 2 else 16


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head's width is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def generation_of(capability: tuple[int, int]) -> str:
    """The table for a GPU with this compute capability, such as (9, 0), for 16-bit dtypes."""
    return "sm_90" if capability[0] in (9, 10) else "sm_80"


def tile_of(
    kernel: str, head_dim: int, capability: tuple[int, int], number_bytes: int, *, has_dropout: bool = False
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: `forward`, `backward_query`, `backward_key` or `backward_key_grouped`.
        head_dim: Width of a head.
        capability: The GPU's compute capability, such as (9, 0).
        number_bytes: 2 for bfloat16 and float16, 4 for float32.
        has_dropout: Whether there is dropout; its random numbers need registers, so blocks are smaller.
    """
    name = "float32" if number_bytes == 4 else generation_of(capability)
    tile = TILES[name][kernel][padded(head_dim)]
    if not has_dropout:
        return tile
    if kernel.startswith("backward_key"):
        return tile._replace(block_q=16)
    return tile._replace(block_k=max(16, tile.block_k // 2))
