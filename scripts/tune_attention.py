"""Time tiles of the attention kernels on this GPU and write the fastest to attention_tiles.py.

    python scripts/tune_attention.py [width=64,128] [kernel=forward,backward_query] [tokens=32768]
        [seq=8192] [write=no]

For each kernel and head width, in bf16 with ALiBi and documents, candidates are compiled in parallel.
Candidates that break a rule of compile_kernels.py are dropped; the others are timed, forward alone and the
rest within the whole backward. A tile replaces an entry if it is more than 1% faster. Only the table of this
GPU's generation changes.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from compile_kernels import Case, compile_all

from mptfoundry.mpt import attention_tiles
from mptfoundry.mpt.attention_tiles import TILES, Tile, generation_of
from mptfoundry.mpt.attention_triton import attend
from mptfoundry.mpt.position import AttentionContext, alibi_slopes

KERNELS = ("forward", "backward_query", "backward_key", "backward_key_grouped")
REPEATS = 15
WIDTH_OF_MODEL = 2048


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    if not torch.cuda.is_available():
        print("error: no GPU found here. Run this on a machine with one.", file=sys.stderr)
        return 1
    generation = generation_of(torch.cuda.get_device_capability())
    arch = int(generation.removeprefix("sm_"))
    seq = int(options.get("seq", "8192"))
    batch = max(1, int(options.get("tokens", "32768")) // seq)
    table = TILES[generation]
    print(f"{torch.cuda.get_device_name()}, {batch} rows of {seq} tokens, the table of {generation}")
    for width in map(int, options.get("width", "32,64,128,256").split(",")):
        # Forward first: the others follow the blocks in which it notes where it stopped.
        for kernel in options.get("kernel", ",".join(KERNELS)).split(","):
            old = table[kernel][width]
            times = {}
            for tile in dict.fromkeys([old, *able(arch, kernel, width)]):
                table[kernel][width] = tile
                times[tile] = milliseconds(kernel, batch, seq, width)
            best = min(times, key=times.__getitem__)
            table[kernel][width] = best = best if times[best] < 0.99 * times[old] else old
            if kernel == "forward":
                fit_backward(table, width)
            print(
                f"  {kernel:15} {width:>4}  {tuple(old)!s:18} {times[old]:8.3f} ms -> "
                f"{tuple(best)!s:18} {times[best]:8.3f} ms, of {len(times)}",
                flush=True,
            )
    if options.get("write") != "no":
        path = Path(attention_tiles.__file__)
        path.write_text(rewritten(path.read_text(), generation))
    return 0


def fit_backward(table: dict[str, dict[int, Tile]], width: int) -> None:
    """What forward notes must hold for all queries of a block of backward's, so that is not larger."""
    forward, backward = table["forward"][width], table["backward_query"]
    if forward.block_q % backward[width].block_q:
        backward[width] = backward[width]._replace(block_q=forward.block_q)


def able(arch: int, kernel: str, width: int) -> list[Tile]:
    """The candidates that compile without breaking a rule."""
    group = group_of(kernel)
    function = f"{kernel.removesuffix('_grouped')}_kernel"
    forward = ("forward", TILES[f"sm_{arch}"]["forward"][width])
    rows = compile_all(
        (
            Case(arch, width, "alibi+documents", group, kernels=(function,), tiles=(forward, (kernel, tile)))
            for tile in candidates(arch, kernel, width)
        ),
        os.cpu_count() or 1,
    )
    return [Tile(*row["tile"]) for row in rows if row["refused"] is None]


def group_of(kernel: str) -> int:
    return 4 if kernel.endswith("_grouped") else 1


def candidates(arch: int, kernel: str, width: int) -> Iterator[Tile]:
    """Blocks of 16 to 128 whose numbers a program's registers can hold at all."""
    blocks = (16, 32, 64, 128)
    for block_q, block_k, warps, stages in itertools.product(blocks, blocks, (4, 8), (1, 2, 3, 4)):
        of_keys = kernel.startswith("backward_key")
        own, sums = (block_k, 2) if of_keys else (block_q, 1)
        too_many = sums * own * width + 2 * block_q * block_k > warps * 32 * 224
        splits = kernel == "backward_query" and TILES[f"sm_{arch}"]["forward"][width].block_q % block_q
        if not too_many and not splits and own >= 32:
            yield Tile(block_q, block_k, warps, stages)


def milliseconds(kernel: str, batch: int, seq: int, width: int) -> float:
    """The median of forward, or of the whole backward."""
    heads = WIDTH_OF_MODEL // width
    parts = [heads, heads // group_of(kernel), heads // group_of(kernel)]
    fused = torch.randn(batch, seq, sum(parts), width, device="cuda", dtype=torch.bfloat16)
    query, key, value = (part.requires_grad_() for part in fused.split(parts, 2))
    documents = torch.zeros(batch, seq, dtype=torch.int64, device="cuda")
    slopes = alibi_slopes(heads, 8, "cuda")
    context = AttentionContext(width**-0.5, slopes, documents, max_documents=1, skips=False)
    out = attend(query, key, value, context)
    grad = torch.randn_like(out)
    events = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # in which Python gets ahead
        start.record()
        if kernel == "forward":
            attend(query, key, value, context)
        else:
            torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[3:])


def rewritten(text: str, name: str) -> str:
    """The module's text with the entries of one table as they are now."""
    lines, section, kernel = text.splitlines(keepends=True), "", ""
    for place, line in enumerate(lines):
        if found := re.match(r' {4}"(\w+)": {$', line):
            section = found[1]
        elif found := re.match(r' {8}"(\w+)": {$', line):
            kernel = found[1]
        elif section == name and (found := re.match(r" {12}(\d+): Tile\(", line)):
            tile = TILES[name][kernel][int(found[1])]
            lines[place] = f"            {found[1]}: Tile({', '.join(map(str, tile))}),\n"
    return "".join(lines)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
