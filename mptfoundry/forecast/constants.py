"""The constants of the model of a step: shipped with their sources, and fitted to measurements.

`constants.json` holds them for the GPUs on which llm-foundry published its throughput
(`llmfoundry_throughput.csv`). Other GPUs take those of the nearest of these, as an estimate.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mptfoundry.errors import DataError, first_line
from mptfoundry.forecast.hardware import GB, PUBLISHED, Hardware
from mptfoundry.forecast.step_time import Rates, Step, step_time
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.plan.gpus import SHORT_NAMES, kind_of, short_name

FOLDER = Path(__file__).parent
# d_model, n_heads and n_layers of llm-foundry's sizes.
SIZES = {
    "125m": (768, 12, 12),
    "350m": (1024, 16, 24),
    "760m": (1536, 12, 24),
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
# Where a fit starts, and the range of each constant.
START = Rates(matmul=0.75, attention=0.3, memory=0.4, exposed=0.5, latency=1e-5)
RANGE = {
    "matmul": (0.2, 1.0),
    "attention": (0.03, 1.0),
    "memory": (0.05, 1.0),
    "exposed": (0.001, 1.0),
    "latency": (1e-8, 1e-2),
}
# Of the estimate, up and down, where nothing was fitted to the kernels that will run.
BAND_OF_ANOTHER_STACK, BAND_OF_ANOTHER_GPU = 0.2, 0.3


@dataclass(frozen=True)
class Constants:
    """The constants of a GPU, and where they come from.

    Attributes:
        rates: The constants.
        source: What they were fitted to, in words.
        band: The estimate may be off by this fraction.
        is_fitted: Whether they were fitted to measurements of this project's own steps on this GPU.
    """

    rates: Rates
    source: str
    band: float
    is_fitted: bool = False


@dataclass(frozen=True)
class Measured:
    """A step that was measured: its setting, its GPU, and tokens per second of one GPU."""

    step: Step
    gpu: str
    tokens_per_second: float
    model: str = ""


def constants_for(name: str) -> Constants:
    """The constants of the GPU of this full name."""
    shipped, short = _shipped(), short_name(name)
    if short in shipped:
        entry = shipped[short]
        source = (
            f"fitted to {entry['rows']} steps that llm-foundry published on it (mean error "
            f"{entry['error']:.1%}); this project's kernels have not been measured on it"
        )
        return Constants(_rates(entry), source, BAND_OF_ANOTHER_STACK)
    kind = kind_of(name)
    nearest = "h100" if kind is not None and kind.capability >= (9, 0) else "a100-80gb"
    source = f"an estimate: those of the {nearest}, nothing has been measured on this GPU"
    return Constants(_rates(shipped[nearest]), source, BAND_OF_ANOTHER_GPU)


def published_steps() -> list[Measured]:
    """llm-foundry's published steps in bfloat16; those in FP8 are left out."""
    lines = (FOLDER / "llmfoundry_throughput.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [_published_step(row) for row in rows if row["precision"] != "amp_fp8"]


def hardware_of_name(gpu: str, per_node: int = 8) -> Hardware:
    """The published rates of a GPU by its short name."""
    kind, rates = kind_of(SHORT_NAMES[gpu]), PUBLISHED[gpu]
    assert kind is not None and kind.tflops is not None
    return Hardware(kind.tflops * 1e12, rates.memory * GB, rates.link * GB, rates.network * GB, per_node)


def predicted(measured: Measured, rates: Rates) -> float:
    """Tokens per second of one GPU."""
    seconds = step_time(measured.step, hardware_of_name(measured.gpu), rates).total
    return measured.step.tokens * measured.step.microbatches / seconds


def mean_error(steps: Sequence[Measured], rates: Rates) -> float:
    """Mean absolute relative error of the throughput."""
    return sum(abs(predicted(each, rates) / each.tokens_per_second - 1) for each in steps) / len(steps)


def left_out_error(steps: Sequence[Measured], start: Rates = START) -> float:
    """The mean error on each model with constants that were fitted to the other models."""
    total = 0.0
    for model in {each.model for each in steps}:
        rates = fit([each for each in steps if each.model != model], start)
        held_out = [each for each in steps if each.model == model]
        total += mean_error(held_out, rates) * len(held_out)
    return total / len(steps)


def fit(steps: Sequence[Measured], start: Rates = START) -> Rates:
    """Fit the constants to measured steps: least squares of the logarithms of the rates, in which a step that
    is far off counts less (Levenberg-Marquardt)."""
    import numpy as np

    names = [each.name for each in fields(Rates)]
    low, high = (np.log([RANGE[name][side] for name in names]) for side in (0, 1))

    def rates_at(point: Any) -> Rates:
        return Rates(*np.exp(point).tolist())

    def errors(point: Any) -> Any:
        rates = rates_at(point)
        off = np.array([math.log(predicted(each, rates) / each.tokens_per_second) for each in steps])
        # sqrt of the soft absolute value, on a scale of 3 %
        return np.sign(off) * np.sqrt(2 * (np.sqrt(1 + (off / 0.03) ** 2) - 1))

    point, damping = np.log([getattr(start, name) for name in names]), 1e-2
    now = errors(point)
    for _ in range(60):
        slope = np.stack([(errors(point + 1e-5 * axis) - now) / 1e-5 for axis in np.eye(len(names))], axis=1)
        normal = slope.T @ slope
        step = np.linalg.solve(
            normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(5)), slope.T @ now
        )
        tried = np.clip(point - step, low, high)
        after = errors(tried)
        if after @ after < now @ now:
            is_done = now @ now - after @ after < 1e-4 * (now @ now)
            point, now, damping = tried, after, damping / 3
            if is_done:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return rates_at(point)


def refitted(path: str | Path, name: str, constants: Constants) -> Constants:
    """Fit a GPU's constants to a benchmark's JSON, as `scripts/bench_step.py out=FILE.json` writes it.

    Fewer than ten rows don't tell all constants, so those of `constants` are then scaled together.

    Raises:
        DataError: The file can't be read, or has no row of this GPU.
    """
    try:
        rows = json.loads(Path(path).read_text())
        steps = [_measured_step(row) for row in rows if row.get("device") == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DataError(
            f"measured: {path} is not what a benchmark of steps writes ({first_line(problem)}). Make it with "
            "python scripts/bench_step.py config=CONFIG out=FILE.json on this GPU."
        ) from problem
    if not steps:
        raise DataError(f"measured: {path} has no step of {name}. Measure one on this GPU.")
    if len(steps) < 10:
        ratio = math.exp(
            sum(math.log(each.tokens_per_second / predicted(each, constants.rates)) for each in steps)
            / len(steps)
        )
        old = constants.rates
        capped = {key: min(1.0, getattr(old, key) * ratio) for key in ("matmul", "attention", "memory")}
        rates = replace(old, **capped)
    else:
        rates = fit(steps, constants.rates)
    off = mean_error(steps, rates)
    source = f"fitted to {len(steps)} measured step{'s' * (len(steps) > 1)} of {path} (mean error {off:.1%})"
    return Constants(rates, source, max(0.1, 2 * off), is_fitted=True)


def write_constants(path: Path = FOLDER / "constants.json") -> dict[str, Any]:
    """Fit the shipped constants to the published steps again, and write them."""
    shipped: dict[str, Any] = {}
    for gpu in ("h100", "a100-80gb", "a100-40gb"):
        steps = [each for each in published_steps() if each.gpu == gpu]
        rates = fit(steps)
        rounded = Rates(**{name: float(f"{value:.4g}") for name, value in asdict(rates).items()})
        shipped[gpu] = {
            **asdict(rounded),
            "rows": len(steps),
            "error": round(mean_error(steps, rounded), 4),
            "left_out_error": round(left_out_error(steps), 4),
            "source": "llmfoundry_throughput.csv",
        }
    path.write_text(json.dumps(shipped, indent=2) + "\n")
    return shipped


def _shipped() -> dict[str, Any]:
    return json.loads((FOLDER / "constants.json").read_text())


def _rates(entry: Mapping[str, Any]) -> Rates:
    return Rates(**{each.name: entry[each.name] for each in fields(Rates)})


def _published_step(row: Mapping[str, str]) -> Measured:
    d_model, n_heads, n_layers = SIZES[row["model"]]
    seq_len, devices = int(row["max_seq_len"]), int(row["gpus"])
    network = MPTConfig(
        d_model=d_model, n_heads=n_heads, n_layers=n_layers, max_seq_len=seq_len, vocab_size=50368
    )
    step = Step(
        network,
        seq_len,
        microbatch=int(row["microbatch"]),
        microbatches=int(row["microbatches"]),
        devices=devices,
        shards=devices,
        reshards=row["sharding_strategy"] == "FULL_SHARD",
        recomputed=1.0 if row["activation_checkpointing"] == "True" else 0.0,
        reduced_bytes=2 if row["mixed_precision"] == "PURE" else 4,
    )
    return Measured(step, row["gpu"], float(row["tokens_per_second_per_gpu"]), row["model"])


def _measured_step(row: Mapping[str, Any]) -> Measured:
    """A row of `scripts/bench_step.py`, which trains on one GPU."""
    network = MPTConfig(**row["network"])
    batch, seq_len = (int(number) for number in row["batch x seq_len"].split(" x "))
    step = Step(network, seq_len, batch, is_sharded=False, optimizer_bytes=24)
    return Measured(step, short_name(row["device"]) or "", float(row["tokens per second"]))
