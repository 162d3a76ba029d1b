"""Measure what guards cost: training steps with all guards and without any, interleaved.

    python scripts/bench_guards.py [steps=10] [rounds=8] [ranks=1] [everything=0]

The model is that of configs/mpt-tiny.yaml, with synthetic data. The guards are those that `train` adds to
every run: signal handling, the decisions of each step, loss spike checks, and rank heartbeats. Both trainers
share one process, or `ranks` processes, and alternate every `steps` batches.

With `everything=1` it compares the whole trainer of `train` (guards, metrics file, throughput, a line per
batch on the console) with Composer's own, on a network that takes nearly no time; and with Composer's own and
as many callbacks, which do nothing: calling them at each event takes time, too.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from mptfoundry import build, loaders
from mptfoundry.callbacks.loss_spikes import LossSpikes
from mptfoundry.config.load import load_train_config
from mptfoundry.data.prepare.prepare import prepare
from mptfoundry.plan.devices import detect_device
from mptfoundry.plan.plan import make_plan
from mptfoundry.ranks import RankWatch
from mptfoundry.run.lifecycle import guarded
from mptfoundry.run.signals import StopSignals
from mptfoundry.run.step_guard import StepGuard
from mptfoundry.tokenizer import train_bpe
from mptfoundry.train import build_trainer

ROOT = Path(__file__).parent.parent
# A network that takes nearly no time, so that a step is what a trainer does around it.
SMALLEST = [
    *("model.d_model=32", "model.n_heads=2", "model.n_layers=1", "max_seq_len=32"),
    *("global_train_batch_size=2", "device_train_microbatch_size=2", "run_name=bench"),
]


class Seconds(Callback):
    """Notes how long each batch takes, its data included: on the clock, and of the processor."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._since = (0.0, 0.0)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clocks."""
        self._since = (time.perf_counter(), time.process_time())

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop them."""
        now = (time.perf_counter(), time.process_time())
        self.steps.append((now[0] - self._since[0], now[1] - self._since[1]))


def main(words: list[str]) -> int:
    defaults = {"steps": 10, "rounds": 8, "ranks": 1, "everything": 0}
    options = defaults | {key: int(value) for key, value in (word.split("=") for word in words)}
    if options["ranks"] > 1 and "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(options["ranks"]), __file__]
        return subprocess.call([*launcher, *words])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(os.environ.setdefault("BENCH_FOLDER", made))
        smaller = SMALLEST if options["everything"] else []
        config, _ = load_train_config(ROOT / "configs" / "mpt-tiny.yaml", words_for(folder) + smaller)
        device = detect_device()
        dist.initialize_dist(device.kind)
        found = [str(folder)]
        dist.broadcast_object_list(found)
        if found[0] != str(folder):
            config, _ = load_train_config(
                ROOT / "configs" / "mpt-tiny.yaml", words_for(Path(found[0])) + smaller
            )
        elif dist.get_global_rank() == 0:
            make_data(folder, config.max_seq_len)
        dist.barrier()
        if options["everything"]:
            with guarded(config, device) as run:
                whole = build_trainer(config, make_plan(config, device), run)
                whole.state.callbacks.append(Seconds())
                idle = [type(f"Idle{i}", (Callback,), {})() for i in range(len(whole.state.callbacks) - 1)]
                trainers = {"guarded": whole, "idle": trainer_of(config, device, idle)}
                trainers["bare"] = trainer_of(config, device, [])
                steps = measure(trainers, options["steps"], options["rounds"])
        else:
            with RankWatch(config.dist_timeout) as watch, StopSignals() as signals:
                guards = [StepGuard(signals, watch), LossSpikes()]
                bare = trainer_of(config, device, [])
                with signals.answered_by_training():
                    trainers = {"guarded": trainer_of(config, device, guards), "bare": bare}
                    steps = measure(trainers, options["steps"], options["rounds"])
        if dist.get_global_rank() == 0:
            report(steps)
        dist.barrier()
    return 0


def words_for(folder: Path) -> list[str]:
    data = [f"tokenizer.name={folder}/tokenizer", f"train_loader.dataset.local={folder}/shards"]
    data += ["train_loader.dataset.streams=null"]
    data += ["train_loader.num_workers=0", "eval_loader=null", "max_duration=100000ba"]
    return [*data, f"save_folder={folder}/runs/{{run_name}}", "save_interval=100000ba"]


def make_data(folder: Path, seq: int) -> None:
    """A tokenizer of 4,096 ids or fewer, and enough rows of `seq` tokens."""
    draw = random.Random(0)
    names = [f"{a}{b}" for a in ("left", "right", "first", "sum", "key", "row") for b in range(40)]
    words = [draw.choice(names) for _ in range(180000)]
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    lines = [f"def {name}({argument}):\n    return {value}\n" for name, argument, value in rows]
    (folder / "text").mkdir()
    (folder / "text" / "made.txt").write_text("".join(lines))
    train_bpe(lines[:5000], 4096, folder / "tokenizer")
    options: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "max_seq_len": seq,
        "workers": 1,
        "progress": False,
    }
    prepare([str(folder / "text")], folder / "shards", **options)


def trainer_of(config: Any, device: Any, guards: list[Callback]) -> Trainer:
    """A training as `train` builds it, with these guards and no others."""
    plan = make_plan(config, device)
    tokenizer = build.build_tokenizer(config)
    model = build.build_model(config, plan, tokenizer)
    return Trainer(
        model=model,
        train_dataloader=loaders.build_loaders(config, plan, tokenizer)[0],
        optimizers=build.build_optimizer(config, model),
        schedulers=build.build_scheduler(config),
        algorithms=build.build_algorithms(config),
        callbacks=[*guards, Seconds()],
        device=device.kind,
        seed=config.seed,
        max_duration=config.max_duration,
        device_train_microbatch_size=plan.device_train_microbatch_size,
        progress_bar=False,
        log_to_console=False,
    )


def measure(trainers: dict[str, Trainer], steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The steps of each training, in turns; the first round warms up and is left out."""
    for number in range(rounds + 1):
        for trainer in trainers.values():
            if number == 1:
                seconds_of(trainer).steps.clear()
            trainer.fit(duration=f"{steps}ba")
    return {name: seconds_of(trainer).steps for name, trainer in trainers.items()}


def seconds_of(trainer: Trainer) -> Seconds:
    return next(each for each in trainer.state.callbacks if isinstance(each, Seconds))


def report(steps: dict[str, list[tuple[float, float]]]) -> None:
    for number, clock in enumerate(("on the clock", "of the processor")):
        median = {name: statistics.median(each[number] for each in found) for name, found in steps.items()}
        times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in median.items())
        print(f"  a step {clock:17} {times}")
        for name in median.keys() - {"guarded"}:
            more = median["guarded"] - median[name]
            print(f"    more than {name:14} {more / median[name]:+.2%}, {more * 1e3:+.2f} ms")


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
