"""Measure the export of synthetic checkpoints with optimizer state: peak memory, and throughput vs. copying.

    python scripts/bench_export.py [layers=2,4,8] [d_model=4096] [heads=32] [vocab=50432] [kind=whole,sharded]
        [moments=1] [folder=FOLDER] [out=FILE.json]

The default width is MPT-7B's; fewer layers than its 32 only make the export shorter. Each checkpoint holds
random float32 weights, and `moments` optimizer moments for each (1: LION, 2: AdamW). The export to bf16 runs
in its own process. `peak` is its largest resident memory; the part that is not `own` is page cache, which the
kernel can reclaim. `export` is the time in seconds until all weights are on disk. `copy` is the time to read
as many bytes as the weights have in the checkpoint and to write as many as the export does, with a cold
cache. `all` is the time of the whole command: imports, export, comparison.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint as dcp

from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.mpt.network import MPT
from mptfoundry.tokenizer import train_bpe

GIB = 2**30
CHUNK = 1 << 24
DEFAULTS = {"layers": "2,4,8", "d_model": "4096", "heads": "32", "vocab": "50432", "kind": "whole,sharded"}
ROW = (
    "{kind:<8} {layers:>6} {weights_gib:>7.2f}Gi {checkpoint_gib:>8.2f}Gi {peak_gib:>7.2f}Gi "
    "{own_gib:>7.2f}Gi {export_seconds:>7.1f}s {copy_seconds:>7.1f}s {all_seconds:>7.1f}s"
)
EXPORT = """
import json, sys
from mptfoundry.export.folder import export
summary = export(sys.argv[1], sys.argv[2], dtype="bf16", progress=False)
said = {"seconds": summary.seconds, "bytes": summary.weight_bytes, "comparison": str(summary.comparison)}
print(json.dumps(said))
"""


def main(words: list[str]) -> int:
    options = DEFAULTS | {"moments": "1", "folder": "."} | dict(word.split("=", 1) for word in words)
    config = MPTConfig(
        d_model=int(options["d_model"]),
        n_heads=int(options["heads"]),
        n_layers=1,
        vocab_size=int(options["vocab"]),
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )
    titles = ("kind", "layers", "weights", "checkpoint", "peak", "own", "export", "copy", "all")
    print("{:<8} {:>6} {:>9} {:>10} {:>9} {:>9} {:>8} {:>8} {:>8}".format(*titles), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options["folder"], prefix="bench_export.") as temporary:
        for layers in map(int, options["layers"].split(",")):
            for kind in options["kind"].split(","):
                case = replace(config, n_layers=layers)
                row = measure(Path(temporary), case, kind, int(options["moments"]))
                rows.append(row)
                print(ROW.format(**row), flush=True)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(folder: Path, config: MPTConfig, kind: str, moments: int) -> dict[str, object]:
    """One export: sizes in GiB, seconds of writing the weights, of a copy, and of the whole command."""
    run = make_run(folder / "run", config, kind, moments)
    checkpoint = next(run.glob("ep0-ba1*"))
    weights = 4 * count_parameters(config)
    forget(run)
    started_at = time.perf_counter()
    words = [sys.executable, "-c", EXPORT, str(run), str(folder / "hf")]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak, own = watch(command)
    all_seconds = time.perf_counter() - started_at
    assert command.stdout is not None
    said = command.stdout.read()
    if command.wait():
        raise SystemExit(command.returncode)
    summary = json.loads(said.splitlines()[-1])
    shutil.rmtree(folder / "hf")
    forget(run)
    row = {
        "kind": kind,
        "layers": config.n_layers,
        "weights_gib": weights / GIB,
        "checkpoint_gib": sum(file.stat().st_size for file in files_of(checkpoint)) / GIB,
        "peak_gib": peak / GIB,
        "own_gib": own / GIB,
        "export_seconds": summary["seconds"],
        "copy_seconds": copy(files_of(checkpoint), folder / "copied", weights, summary["bytes"]),
        "all_seconds": all_seconds,
        "comparison": summary["comparison"],
    }
    shutil.rmtree(run)
    return row


def make_run(run: Path, config: MPTConfig, kind: str, moments: int) -> Path:
    """A run folder with one checkpoint; its file is laid out first, and filled by mapping it."""
    run.mkdir()
    text = {"max_seq_len": config.max_seq_len, "model": {"name": "mpt_causal_lm", **config.to_dict()}}
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(text))))
    train_bpe([Path(__file__).read_text()], 320, run / "tokenizer")
    whole = run / "ep0-ba1-rank0.pt"
    with FakeTensorMode():
        model = {f"model.{name}": tensor for name, tensor in MPT(config, empty=True).state_dict().items()}
        state = {
            name: {f"moment_{number}": torch.empty_like(tensor) for number in range(moments)}
            for name, tensor in model.items()
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"state": {"model": model, "optimizers": {"Optimizer": {"state": state}}}}, whole)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        content = torch.load(whole, mmap=True, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for tensor in content["state"]["model"].values():
        tensor.normal_(std=0.02, generator=generator)
        if tensor.dim() == 1:
            tensor += 1
    if kind == "sharded":
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.save(content, storage_writer=dcp.FileSystemWriter(run / "ep0-ba1"), no_dist=True)
        del content, tensor
        whole.unlink()
    return run


def watch(command: subprocess.Popen[str]) -> tuple[int, int]:
    """A process' largest resident memory, and of it what isn't pages of files, in bytes."""
    peak = own = 0
    while command.poll() is None:
        lines = Path(f"/proc/{command.pid}/status").read_text().splitlines()
        values = {
            key: int(value.split()[0]) * 1024
            for key, _, value in (line.partition(":") for line in lines)
            if " kB" in value
        }
        peak, own = max(peak, values.get("VmHWM", 0)), max(own, values.get("RssAnon", 0))
        time.sleep(0.02)
    return peak, own


def copy(sources: list[Path], target: Path, read_bytes: int, write_bytes: int) -> float:
    """Seconds to read so many bytes of files and to write so many, through to the disk."""
    buffer = bytearray(CHUNK)
    started_at = time.perf_counter()
    with target.open("wb") as out:
        for source in sources:
            with source.open("rb", buffering=0) as file:
                while read_bytes > 0 and (size := file.readinto(buffer)):
                    read_bytes -= size
                    part = min(write_bytes, size // 2)
                    write_bytes -= out.write(memoryview(buffer)[:part])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started_at
    target.unlink()
    return seconds


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.distcp")) if checkpoint.is_dir() else [checkpoint]


def forget(folder: Path) -> None:
    """Write a folder's files to the disk, and ask the kernel to cache nothing of them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
