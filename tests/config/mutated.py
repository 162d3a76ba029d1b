"""Whole configurations of every kind, mutated from a seed, and what `check` answers to each."""

from __future__ import annotations

import importlib.util
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from mptfoundry.check import check
from mptfoundry.config.load import load_train_config, to_yaml
from mptfoundry.errors import MPTFoundryError

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tests" / "fuzz.py")
assert _spec is not None and _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

NAMES = (
    *("mpt-tiny", "mpt-7b", "mpt-30b-8k", "mpt-7b-instruct-lora", "mpt-7b-storywriter", "finetune-demo"),
    *("mpt-text-classification", "mpt-question-answering"),
)
# Sections that few published configs have.
MORE: dict[str, Any] = {
    "fsdp_config": {
        "sharding_strategy": "HYBRID_SHARD",
        "forward_prefetch": True,
        "forward_prefetch_limit": 2,
    },
    "compile_config": {"mode": "default"},
    "callbacks": {
        "speed_monitor": {"window_size": 10},
        "early_stopper": {"monitor": "loss", "dataloader_label": "train", "patience": "1ba"},
        "generate_callback": {"prompts": ["a"], "interval": "1ba", "top_p": 0.9},
        "hf_checkpointer": {"save_interval": "1ba", "save_folder": "x"},
    },
    "loggers": {"wandb": {"project": "a"}, "tensorboard": {}},
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
    "variables": {"root": "${run_name}/x"},
    "metadata": {"note": "${run_name}", "api_key": "a", "list": [1, {"b": 2}]},
    "save_filename": "b{batch}.pt",
    "allow_changes": ["optimizer.lr"],
    "load_ignore_keys": ["state/*"],
}
SECONDS = 5


def mutations(seed: int, count: int, names: Sequence[str] = NAMES) -> Iterator[tuple[str, str]]:
    """Pairs of what was done and the text of the file: values of one or two places changed, or bytes."""
    draw = random.Random(seed)
    trees = [yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in names]
    for number in range(count):
        tree = draw.choice(trees)
        tree = {**tree, **{key: MORE[key] for key in draw.sample(sorted(MORE), 3)}}
        kind = draw.random()
        if kind < 0.2:
            text = (ROOT / "configs" / f"{draw.choice(names)}.yaml").read_bytes()
            [(said, changed)] = fuzz.damaged_bytes(text, draw.randrange(10**9), 1)
            yield f"{number}: {said}", changed.decode(errors="replace")
            continue
        [(said, changed)] = fuzz.odd_values(tree, draw.randrange(10**9), 1)
        if kind < 0.5 and isinstance(changed, dict) and changed:
            [(more, changed)] = fuzz.odd_values(changed, draw.randrange(10**9), 1)
            said = f"{said}, {more}"
        yield f"{number}: {said}", yaml.safe_dump(changed)


def judge(text: str, folder: Path) -> str | None:
    """What `check` says of a file: None, or its error in lines. Any other exception leaves it, and so does an
    answer that takes more than `SECONDS` of the processor."""
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s of the processor")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        config, _ = load_train_config(file)
        check(config)
        to_yaml(config)
    except MPTFoundryError as error:
        return str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None
