"""Compile the Triton kernels for any GPU architecture, without a GPU, and print the results.

    python scripts/compile_kernels.py [arch=90,80] [head_dim=64,128] [features=alibi,alibi+documents]
        [group=1,4] [dtype=bfloat16,float32] [kernel=forward_kernel] [and ...] [processes=2] [out=FILE.json]
        [lines=true] [record=true]

Without words it compiles every variant that ships, with words all combinations of their values; `and` starts
another set; `features=lion`, and those in OTHERS, are kernels of optimizer, loss and norms. Attention, or a
step, is called on the CPU with small tensors that have a model's strides. Where Triton would launch a kernel,
the kernel is only compiled, as Triton's launcher does for that architecture, with Triton's own ptxas.
Triton's cache (TRITON_CACHE_DIR) is used, so recently compiled kernels take no time.

* *spilled*: bytes of spill stores and loads in the machine code, from `ptxas -v`. It runs only if cuobjdump
  finds a stack; without a stack there are no spills.
* *serial*: the assembler's warnings (C75xx) that it waits for each `wgmma` before the next, which is slower.
* *loop*: machine instructions of the inner loop without a mask.
* *shared*: bytes of shared memory per program.
* *dots*: matrix products in Triton's code; *cores*: how many of them use tensor cores, with the number of
  `wgmma` (sm_90, at least 64 rows) or `mma` instructions. float32 does not use them.

If a variant breaks a rule in `why_refused`, it is listed at the end, and the exit code is 1. What a variant
spills, and the instructions of its loop, may not grow: compiled_kernels.csv has them for versions of Triton,
and `record=true` writes those of the installed one there. Serial products don't count as errors with Triton
3.3, whose assembler makes them in every kernel.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mptfoundry.mpt import attention_triton
from mptfoundry.mpt.attention_tiles import Tile, tile_of
from mptfoundry.mpt.loss_kernel import cross_entropy
from mptfoundry.mpt.norm_kernel import add_norm
from mptfoundry.mpt.position import AttentionContext, alibi_slopes
from mptfoundry.optim import lion_fused
from mptfoundry.optim.bf16_weights import Copy
from mptfoundry.optim.lion_fused import DecoupledLionW

# Triton 3.3 has no code for sm_120, and torch 2.7, which comes with it, none for sm_100.
ARCHITECTURES = (90, 80) if triton.__version__.startswith("3.3.") else (90, 80, 100, 120)
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)
EVERYTHING = "alibi+documents+window+prefix+softcap+dropout"
# "gaps" are documents between whose tokens padding may stand.
FEATURES = (
    "causal", "alibi", "alibi+unskipped", "alibi+documents", "alibi+gaps", "window", "prefix+documents",
    "softcap", "dropout", "everything",
)  # fmt: skip

# Of the loss, and of norms with the sum before them.
OTHERS = ("loss", "loss+softcap", "norm", "norm+wide+bias", "norm+rms")

# Bytes of shared memory that a program may use: "Technical Specifications per Compute Capability" in NVIDIA's
# CUDA C++ Programming Guide. 8.6 and 8.9, which run what is made for sm_80, have less than 8.0.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Columns of sm_100's tensor memory: "Tensor Memory" in NVIDIA's PTX ISA.
TENSOR_MEMORY_LIMIT = 512
# The table of blocks was made with this Triton, under which no other spill is allowed.
TRITON = "3.3."
# What was compiled with a version, by what a row of it is known by.
RECORD = Path(__file__).with_name("compiled_kernels.csv")
VERSION = ".".join(triton.__version__.split(".")[:2])
KEY = ("arch", "kernel", "head_dim", "features", "group", "dtype")
HEADS = ("triton", *KEY, "spilled", "loop")
# Instructions of a loop that may be more than they were: a share of them.
MORE = 0.02
# Bytes; of heads 256 wide in the second place.
SPILL_LIMIT = {"backward_query_kernel": (64, 64), "backward_key_kernel": (64, 256), "decode_kernel": (64, 64)}
# Matrix products of a kernel: so many in each of its loops, of which there are two but in decoding.
DOTS = {"forward_kernel": 4, "backward_query_kernel": 6, "backward_key_kernel": 8, "decode_kernel": 2}

# What Triton tells its assembler about registers, if it does.
REGISTERS = re.findall(r"--regAllocOptLevel=\d", inspect.getsource(nvidia))[:1]
# The assembler may wait for each wgmma before the next, and warns of it (C75xx). This Triton's does so
# in every kernel.
SERIAL = "3.3."
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """One way of calling attention, with the kernels wanted of it (all if empty) and tiles in place of the
    table's, by their names there."""

    arch: int
    head_dim: int
    features: str
    group: int = 1
    dtype: str = "bfloat16"
    kernels: tuple[str, ...] = ()
    tiles: tuple[tuple[str, Tile], ...] = ()


def main(words: list[str]) -> int:
    sets: list[dict[str, str]] = [{}]
    for word in words:
        if word == "and":
            sets.append({})
        else:
            key, value = word.split("=", 1)
            sets[-1][key] = value
    from words import tell

    options = {key: value for some in sets for key, value in some.items()}
    cases = dict.fromkeys(case for some in sets for case in shipped(some))
    started_at = time.monotonic()
    rows = []
    print(TITLES)
    for row in compile_all(cases, int(options.get("processes", os.cpu_count() or 1))):
        rows.append(row)
        print(line(row), flush=True)
        tell(options, **row)
    print(f"{len(rows)} kernels in {time.monotonic() - started_at:.0f} s, triton {triton.__version__}")
    if "record" in options:
        record(rows)
    refused = [row for row in rows if row["refused"]]
    for row in refused:
        print(f"error: {line(row)[:71].strip()}: {row['refused']}.", file=sys.stderr)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if refused else 0


def record(rows: list[dict[str, Any]]) -> None:
    """Write what rows spill and how long their loops are, in place of what this Triton had for them."""
    ours = {_key(row): row for row in rows if "error" not in row}
    lines = [
        each
        for each in recorded().values()
        if (each["triton"], _key(each)) not in {(VERSION, k) for k in ours}
    ]
    lines += [{**row, "triton": VERSION} for row in ours.values()]
    with RECORD.open("w", newline="") as file:
        table = csv.DictWriter(file, HEADS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(lines, key=lambda row: [str(row[name]) for name in HEADS]))
    recorded.cache_clear()


@functools.cache
def recorded() -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of the record, by version and key."""
    if not RECORD.exists():
        return {}
    with RECORD.open(newline="") as file:
        return {(row["triton"], *_key(row)): row for row in csv.DictReader(file)}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def why_worse(row: dict[str, Any]) -> str | None:
    """What a row has more of than its record; None if nothing, or if there is none."""
    before = recorded().get((VERSION, *_key(row)))
    if before is None or row["tiles"]:
        return None
    if row["spilled"] > int(before["spilled"]):
        return f"{row['spilled']} bytes are spilled, {before['spilled']} were"
    if row["loop"] > int(before["loop"]) * (1 + MORE):
        return f"its loop has {row['loop']} instructions, {before['loop']} were in it"
    return None


def shipped(options: dict[str, str]) -> Iterator[Case]:
    """Every combination of what the options name, or else of all there is."""

    def asked(name: str, default: Iterable[object]) -> list[str]:
        return options[name].split(",") if name in options else [str(x) for x in default]

    kernels = tuple(asked("kernel", ()))
    if not options:
        steps = itertools.product(ARCHITECTURES, ("float32", "bfloat16", "int8"))
        yield from (Case(arch, 0, "lion", dtype=dtype) for arch, dtype in steps)
        others = itertools.product(ARCHITECTURES, OTHERS, ("bfloat16", "float32"))
        yield from (Case(arch, 0, features, dtype=dtype) for arch, features, dtype in others)
    for arch, head_dim, features, group, dtype in itertools.product(
        asked("arch", ARCHITECTURES),
        asked("head_dim", HEAD_DIMS),
        asked("features", FEATURES),
        asked("group", (1, 4)),
        asked("dtype", ("bfloat16", "float32")),
    ):
        yield Case(int(arch), int(head_dim), features, int(group), dtype, kernels)


def compile_all(cases: Iterable[Case], processes: int) -> Iterator[dict[str, Any]]:
    """The rows of all cases, each of which is compiled by one of the processes."""
    pool = ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        for rows in pool.map(compile_case, cases):
            yield from rows


def compile_case(case: Case) -> list[dict[str, Any]]:
    """Compile the kernels of a forward, a backward and a decoding step, and describe each."""
    rows: dict[str, dict[str, Any]] = {}
    kept: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        if (case.kernels and name not in case.kernels) or "error" in rows.get(name, {}):
            return
        tile = [options[key] for key in ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages") if key in options]
        row = rows.setdefault(name, {**case._asdict(), "kernel": name, "tile": tile})
        started_at = time.monotonic()
        try:
            compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as raised:
            row["error"] = _cause_of(raised)
            return
        if name not in kept:
            kept[name] = compiled
            row |= {"seconds": time.monotonic() - started_at, **describe(compiled)}
        elif compiled is not kept[name]:
            row["error"] = "it is compiled again for another batch or length"

    driver.set_active(_NoGPU(case.arch))
    attention_triton.tile_of = lambda kernel, head_dim, capability, number_bytes, **has_dropout: dict(
        case.tiles
    ).get(kernel, tile_of(kernel, head_dim, divmod(case.arch, 10), number_bytes, **has_dropout))
    JITFunction.run = compile_instead
    lion_fused.is_interpreted = lambda: True  # or a CPU would take the step that PyTorch compiles
    try:
        if case.features == "lion":
            call_lion(case)
        elif case.features.startswith("loss"):
            call_loss(case)
        elif case.features.startswith("norm"):
            call_norm(case)
        else:
            call_attention(case, batch=2, seq=64, past=0)
            call_attention(case, batch=1, seq=1, past=36)
    finally:
        JITFunction.run = launch
    return [{**row, "refused": why_refused(row)} for row in rows.values()]


def _cause_of(error: BaseException) -> str:
    """Triton wraps an error in one more for each function around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[-300:]


class _NoGPU:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # by which the launcher keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def call_attention(case: Case, batch: int, seq: int, past: int) -> None:
    """Forward, backward and a decoding step of (batch, seq) queries; what comes out means nothing."""
    n_heads, keys, head_dim = 32, past + seq, case.head_dim
    kv_heads = n_heads // case.group
    has = (EVERYTHING if case.features == "everything" else case.features).split("+")
    places = torch.arange(keys).expand(batch, keys)
    context = AttentionContext(
        head_dim**-0.5,
        slopes=alibi_slopes(n_heads, 8) if "alibi" in has else None,
        documents=places // 40 if {"documents", "gaps"} & set(has) else None,
        prefix=places < 20 if "prefix" in has else None,
        window=32 if "window" in has else None,
        softcap=30.0 if "softcap" in has else None,
        dropout=0.1 if "dropout" in has else 0.0,
        max_documents=None if "gaps" in has else 2,
        cache=_Cache(),
        skips="unskipped" not in has,
    )
    widths = [heads * head_dim for heads in (n_heads, kv_heads, kv_heads)]
    fused = torch.zeros(batch, keys, sum(widths), dtype=getattr(torch, case.dtype), requires_grad=True)
    query, key, value = (part.unflatten(-1, (-1, head_dim)) for part in fused.split(widths, -1))
    out = attention_triton.attend(query[:, past:], key, value, context)
    out.backward(torch.zeros_like(out))
    if context.dropout == 0:
        decoding = dataclasses.replace(context, max_documents=None, _made={})  # unknown with a cache
        with torch.no_grad():
            attention_triton.attend(query[:, -1:], key, value, decoding)


def call_lion(case: Case) -> None:
    """The optimizer's step in one pass, with clipping and a copy of the weights in bfloat16.

    The case's dtype is the momentum's.
    """
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    optimizer = DecoupledLionW([weight], weight_decay=1e-5, momentum_dtype=getattr(torch, case.dtype))
    optimizer.gradient_scale = torch.ones(())
    optimizer.bf16_copies = {weight: Copy(weight.detach().bfloat16())}
    optimizer.step()


def call_loss(case: Case) -> None:
    """The cross entropy of MPT-7B's vocabulary."""
    logits = torch.zeros(2, 50_432, dtype=getattr(torch, case.dtype))
    softcap = 30.0 if "softcap" in case.features else 0.0
    cross_entropy(logits, torch.zeros(2, dtype=torch.int64), -100, softcap)


def call_norm(case: Case) -> None:
    """The residual stream's sum and norm, there and back, 4,096 and 8,192 wide."""
    width = 8192 if "wide" in case.features else 4096
    x, delta = (torch.zeros(2, width, dtype=getattr(torch, case.dtype), requires_grad=True) for _ in range(2))
    weight = torch.ones(width, requires_grad=True)
    bias = torch.zeros(width, requires_grad=True) if "bias" in case.features else None
    total, out = add_norm(x, delta, weight, bias, 1e-5, "rms" not in case.features)
    (total + out).sum().backward()


class _Cache:
    """That there is one makes a step without gradients a decoding step."""

    length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


def describe(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and tensor-core instructions of a compiled kernel."""
    ptx, layouts = compiled.asm["ptx"], compiled.asm["ttgir"]
    products = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) [^\n]*-> tensor<[^\n#]*(#\w+)>", layouts)
    on_cores = set(re.findall(r"(#\w+) = #ttg\.nvidia_mma", layouts))
    in_tensor_memory = len(re.findall(r"ttng\.tc_gen5_mma\b", layouts))  # sm_100: no layout of its own
    spilled, warnings = 0, []
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _told_by("cuobjdump", "-res-usage", cubin)
        loop = instructions_of_loop(_told_by("nvdisasm", "-c", cubin))
        if _number(r"STACK:(\d+)", usage) or "wgmma.mma_async" in ptx:
            source.write_text(ptx)
            arch = re.findall(r"\.target (sm_\w+)", ptx)[0]
            options = ["-v", "-lineinfo", *REGISTERS, f"--gpu-name={arch}"]
            told = _told_by(_assembler_of(arch), *options, source, "-o", cubin)
            spilled = _number(r"(\d+) bytes spill stores", told) + _number(r"(\d+) bytes spill loads", told)
            warnings = sorted(set(re.findall(r"\bC75\d\d\b", told)))
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled": spilled,
        "warnings": warnings,
        "loop": loop,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "dots": len(products) + in_tensor_memory,
        "dots_on_cores": sum(layout in on_cores for layout in products) + in_tensor_memory,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tcgen05": ptx.count("tcgen05.mma"),
    }


def instructions_of_loop(assembly: str) -> int:
    """Machine instructions of the shortest loop without another loop in it that has a tensor-core product.

    It is the one for blocks without a mask, which most blocks of a long row take. 0 if there is none.
    """
    places: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for text in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            places[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", text):
            code.append(instruction[1])
            jump = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in places:
                loops.append((places[jump[1]], len(code)))
    innermost = [
        (start, stop)
        for start, stop in loops
        if not any(start <= other[0] and other[1] <= stop for other in loops if other != (start, stop))
    ]
    return min((stop - start for start, stop in innermost if _multiplies(code[start:stop])), default=0)


def _multiplies(code: list[str]) -> bool:
    return any(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", instruction) for instruction in code)


def _assembler_of(arch: str) -> str:
    """The ptxas that Triton calls for an architecture, such as `sm_120a`: it has one for Blackwell."""
    newer = "ptxas-blackwell"
    return newer if _number(r"sm_(\d+)", arch) >= 100 and (TOOLS / newer).is_file() else "ptxas"


def _told_by(tool: str, *words: object) -> str:
    command = [str(TOOLS / tool), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def why_refused(row: dict[str, Any]) -> str | None:
    """Which rule a variant breaks; None if it may ship."""
    if "error" in row:
        return row["error"]
    if worse := why_worse(row):
        return worse
    name, arch = row["kernel"], row["arch"]
    allowed = SPILL_LIMIT.get(name, (0, 0))[row["head_dim"] > 128]
    if row["spilled"] > allowed and triton.__version__.startswith(TRITON):
        return f"{row['spilled']} bytes are spilled, {allowed} may be"
    if row["shared"] > SHARED_LIMIT[arch]:
        return f"it takes {row['shared']} bytes of shared memory, there are {SHARED_LIMIT[arch]}"
    if row["warnings"] and not triton.__version__.startswith(SERIAL):
        return f"the assembler waits for each wgmma before the next ({', '.join(row['warnings'])})"
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        return f"it takes {row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}"
    dots = DOTS.get(name, 0)
    if row["dots"] < dots:
        return f"it has {row['dots']} matrix products, not {dots}"
    if row["dtype"] == "float32" or not dots:
        return None
    if row["dots_on_cores"] < row["dots"]:
        return f"{row['dots'] - row['dots_on_cores']} of its matrix products are not done by tensor cores"
    if arch == 90 and name != "decode_kernel" and (row["mma"] or not row["wgmma"]):
        return "its matrix products are not done by wgmma"
    return None


TITLES = (
    "kernel           arch dim features           group dtype    tile          "
    " registers spilled serial  loop  shared  dots cores wgmma   mma seconds"
)


def line(row: dict[str, Any]) -> str:
    tile = "x".join(map(str, row["tile"]))
    head = f"{row['kernel'].removesuffix('_kernel'):16} {row['arch']:>4} {row['head_dim']:>3} "
    head += f"{row['features']:18} {row['group']:>5} {row['dtype']:8} {tile:14} "
    if "error" in row:
        return f"{head}{row['error']}"
    row = row | {"serial": ",".join(row["warnings"]) or "-"}
    keys = {"registers": 9, "spilled": 7, "serial": 6, "loop": 5, "shared": 7, "dots": 5, "dots_on_cores": 5}
    widths = (keys | {"wgmma": 5, "mma": 5}).items()
    return head + " ".join(f"{row[key]:>{width}}" for key, width in widths) + f" {row['seconds']:>7.1f}"


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
