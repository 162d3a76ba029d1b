"""Train small models plainly and with options that change the numbers; print the means of the last losses.

    python scripts/option_losses.py [options=bfloat16,int8] [text=mptfoundry] [steps=250] [seeds=1,2,3]
    TRITON_INTERPRET=1 python scripts/option_losses.py options=loss,norms

Options are dtypes of LION's momentum; recipes of products in float8 (`tensorwise`, `rowwise`,
`rowwise_with_gw_hp`; by torchao, emulated on a CPU); and the kernels of the `loss` and of the `norms`, by
Triton's interpreter, in bf16 autocast. An option is compared with a plain model in its own precision, float32
or bf16 autocast. Each model (d_model 64, 2 layers) reads 8 rows of 128 bytes in each step, from the Python
files below `text`. With a seed all start with the same weights and read the same rows.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mptfoundry.models.float8 import use_float8  # noqa: E402
from mptfoundry.mpt import loss as loss_module  # noqa: E402
from mptfoundry.mpt.block import Block  # noqa: E402
from mptfoundry.mpt.config import AttnConfig, MPTConfig  # noqa: E402
from mptfoundry.mpt.network import MPT  # noqa: E402
from mptfoundry.optim.lion import DecoupledLionW  # noqa: E402
from tests.mpt.interpreter import patch_interpreter  # noqa: E402

ROWS, SEQ, LAST, LR, WARMUP = 8, 128, 50, 1e-3, 25
# Options in bf16 autocast, and what is replaced for them: the choice of the plain computation on a CPU.
KERNELS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "loss": (
        (loss_module, "_losses_and_grads", loss_module._fused_losses_and_grads),
        (loss_module, "_has_kernel", lambda matrix: True),
    ),
    "norms": ((Block, "forward", Block._forward_fused),),
}


def main(words: list[str]) -> None:
    given = {"options": "bfloat16,int8", "text": str(ROOT / "mptfoundry"), "steps": "250", "seeds": "1,2,3"}
    given |= dict(word.split("=", 1) for word in words)
    files = sorted(Path(given["text"]).rglob("*.py"))
    text = torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))
    options = given["options"].split(",")
    plain = "bf16 autocast" if set(options) <= KERNELS.keys() else "float32"
    if plain == "float32" and KERNELS.keys() & set(options):
        raise SystemExit(f"error: options: {' and '.join(KERNELS)} are measured without others.")
    if plain != "float32":
        patch_interpreter(setattr)
    print(f"{len(text):,} bytes; means of the last {LAST} losses")
    print(f"| seed | {plain} | " + " | ".join(f"{option} | difference" for option in options) + " |")
    print("|---:|---:|" + "---:|---:|" * len(options))
    for seed in map(int, given["seeds"].split(",")):
        base, *others = (mean_loss(text, seed, int(given["steps"]), each, plain) for each in ("", *options))
        shown = " | ".join(f"{other:.4f} | {other - base:+.4f}" for other in others)
        print(f"| {seed} | {base:.4f} | {shown} |", flush=True)


def mean_loss(text: torch.Tensor, seed: int, steps: int, option: str, precision: str) -> float:
    """The mean of the last losses of a model that is trained along a warmup and a cosine."""
    attention = AttnConfig(alibi=True, attn_impl="torch")
    config = MPTConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=SEQ, vocab_size=256, attn_config=attention
    )
    net = MPT(config, seed=seed).train()
    dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(option)
    if option and dtype is None and option not in KERNELS:
        use_float8(net, option)
    optimizer = DecoupledLionW(net.parameters(), lr=LR, weight_decay=1e-4, momentum_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with ExitStack() as replaced:
        for target, name, value in KERNELS.get(option, ()):
            replaced.enter_context(patch.object(target, name, value))
        for step in range(steps):
            starts = torch.randint(len(text) - SEQ, (ROWS,), generator=generator).tolist()
            ids = torch.stack([text[start : start + SEQ] for start in starts])
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP) * cosine
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
                loss = net(ids, labels=ids).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses[-LAST:]) / len(losses[-LAST:])


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
