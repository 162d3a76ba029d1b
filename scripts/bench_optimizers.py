"""Time the optimizers' steps on the same parameters and gradients, alternately in one process.

    python scripts/bench_optimizers.py [config=configs/mpt-125m.yaml] [rounds=5] [device=cpu] [key=value ...]
        [lines=true]

Peers are the loop of llm-foundry's DecoupledLionW, PyTorch's AdamW (foreach and fused) and Composer's
DecoupledAdamW. In each round every optimizer takes a step that makes its state, and two that are timed, so
that all of them see the same load of the machine. The table has the fastest step and the median over the
rounds of its ratio to llm-foundry's loop, both by the clock and by the process's own time on its processors,
which other programs disturb less (with OMP_NUM_THREADS=1: waiting threads count), and the bytes per parameter
that a step has to read and write at least.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from composer.optim import DecoupledAdamW

from mptfoundry.checkpoints.source import expected_shapes
from mptfoundry.config.load import load_train_config
from mptfoundry.optim import adamw_fused, lion_fused
from mptfoundry.optim.lion import DecoupledLionW

BASE = "LION, llm-foundry's loop"
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1e-5}
STEPS = 2


class LoopLion(torch.optim.Optimizer):
    """The step of llm-foundry's DecoupledLionW: a pass over whole tensors for each operation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                state, gradient = self.state[param], param.grad
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                if group["weight_decay"] != 0:
                    param.data.mul_(1 - lr / group["initial_lr"] * group["weight_decay"])
                update = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
                param.add_(update, alpha=-lr)
                state["exp_avg"].lerp_(gradient, 1 - beta2)


Make = Callable[[Any], torch.optim.Optimizer]
# What is measured, and the bytes per parameter that it reads and writes at least.
PEERS: dict[str, tuple[Make, int]] = {
    BASE: (lambda params: LoopLion(params, OPTIONS | {"initial_lr": OPTIONS["lr"]}), 20),
    "LION, ours": (partial(DecoupledLionW, **OPTIONS), 20),
    "LION, ours, fused": (partial(lion_fused.DecoupledLionW, **OPTIONS), 20),
    "AdamW, Composer's loop": (partial(DecoupledAdamW, **OPTIONS), 28),
    "AdamW, torch foreach": (partial(torch.optim.AdamW, **OPTIONS, foreach=True), 28),
    "AdamW, ours, fused": (partial(adamw_fused.DecoupledAdamW, **OPTIONS), 28),
    "AdamW, torch fused": (partial(torch.optim.AdamW, **OPTIONS, fused=True), 28),
}


def main(words: list[str]) -> int:
    from words import tell

    options = dict(word.split("=", 1) for word in words)
    own = {"config": "configs/mpt-125m.yaml", "rounds": "5", "device": "cpu", "lines": ""} | options
    ours = ("config", "rounds", "device", "lines")
    config, _ = load_train_config(own["config"], [f"{k}={v}" for k, v in options.items() if k not in ours])
    shapes = expected_shapes(config.model.network()).values()
    params = [torch.nn.Parameter(torch.randn(shape, device=own["device"]).mul_(0.02)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(0.01)
    numbers = sum(param.numel() for param in params)
    print(f"{numbers:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS}
    for _ in range(int(own["rounds"])):
        for name in PEERS:
            make, _ = PEERS[name]
            times[name].append(fastest_step(make(params), own["device"]))
    print(f"{'':26} {'ms':>8} {'ratio':>6} {'ms of processor':>16} {'ratio':>6} {'bytes':>6}")
    for name in PEERS:
        clock, processor = (min(each) * 1000 for each in zip(*times[name], strict=True))
        ratios = [ratio_to(times[BASE], times[name], which) for which in (0, 1)]
        shown = f"{clock:8.1f} {ratios[0]:6.2f} {processor:16.1f} {ratios[1]:6.2f} {PEERS[name][1]:6}"
        print(f"{name:26} {shown}")
        row = {"optimizer": name, "parameters": numbers, "milliseconds": clock, "ratio": ratios[0]}
        tell(own, **row, compared_with=BASE)
    return 0


def ratio_to(base: list[tuple[float, float]], times: list[tuple[float, float]], which: int) -> float:
    """The median over the rounds of the ratio of two steps in the same round."""
    return statistics.median(own[which] / other[which] for own, other in zip(times, base, strict=True))


def fastest_step(optimizer: torch.optim.Optimizer, device: str) -> tuple[float, float]:
    """Seconds by the clock and by the processors of the faster of two steps, once there is a state."""
    optimizer.step()
    seconds, processor = [], []
    for _ in range(STEPS):
        _wait(device)
        started_at, used = time.perf_counter(), time.process_time()
        optimizer.step()
        _wait(device)
        seconds.append(time.perf_counter() - started_at)
        processor.append(time.process_time() - used)
    return min(seconds), min(processor)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
