"""A tiny tokenizer, a tiny network and a run folder as Composer leaves it, for the rooms that need them."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Without a GPU, Triton's kernels run on the CPU. Triton asks when it is first imported, which torch may do.
if not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import yaml
from torch.torch_version import TorchVersion

from mptfoundry.mpt.config import AttnConfig, MPTConfig
from tests.ranks import Ranks

# Tiny products are slower on several threads than on one, above all where several processes test.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
MOST_FILES_OF_SHARED_MEMORY = 100
OF_A_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
TINY_RUN = """
max_seq_len: 32
model: {{name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  resid_pdrop: 0.1, attn_config: {{alibi: true}}}}
tokenizer: {{name: {folder}/tokenizer}}
train_loader:
  name: text
  num_workers: 0
  dataset:
    split: train
    num_canonical_nodes: 2
    streams:
      a: {{local: {folder}/a, proportion: 0.75}}
      b: {{local: {folder}/b, proportion: 0.25}}
optimizer: {{name: decoupled_lionw, lr: 1e-3}}
scheduler: {{name: cosine_with_warmup, t_warmup: 1ba}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
max_duration: 12ba
global_train_batch_size: 8
save_folder: {out}/{{run_name}}
save_interval: 3ba
"""
TINY = MPTConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    vocab_size=384,
    no_bias=True,
    attn_config=AttnConfig(alibi=True),
)


class RunsCode:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


_shared_memory: list[tuple[Any, bool]] = []  # with whether this process created it


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pictures: draws the pictures of reports; other tests don't")
    config.addinivalue_line("markers", "soak: takes long and has a quicker sibling; only `make soak` runs it")
    config.addinivalue_line("markers", "long: a file whose tests take long, so that they start early")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let long files start first: one that starts last leaves all other processes without work.

    Tests for `make soak` are left out of any other run.
    """
    if os.environ.get("MPTFOUNDRY_SOAK") != "1":
        later = [item for item in items if item.get_closest_marker("soak") is not None]
        items[:] = [item for item in items if item not in later]
        config.hook.pytest_deselected(items=later)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A picture takes more time than all else of a tiny run, so only tests of pictures draw them.

    Runs in other processes draw theirs.
    """
    if (report := sys.modules.get("mptfoundry.run.report")) is not None:
        draw = vars(report).setdefault("_draw_pictures", report.draw)
        report.draw = draw if item.get_closest_marker("pictures") else _draw_nothing
    # Composer reads a list of all its files for each checkpoint.
    if (environment := sys.modules.get("composer.utils.collect_env")) is not None:
        commit_hash = environment.get_composer_commit_hash
        if not hasattr(commit_hash, "cache_info"):
            environment.get_composer_commit_hash = functools.cache(commit_hash)


def _draw_nothing(batches: Any, evaluations: Any, path: Path) -> None:
    path.write_bytes(b"a picture")


@pytest.fixture(autouse=True)
def shared_memory_is_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streaming keeps every file of shared memory open until the process ends: too many for one process.

    What a data set still maps is closed after a later test, once nothing refers to the data set.
    """
    register = atexit.register

    def noting(function: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if type(owner).__module__ != "streaming.base.shared.memory":
            return register(function, *args, **kwargs)
        _shared_memory.extend((file, True) for file in owner.created_shms)
        _shared_memory.extend((file, False) for file in owner.opened_shms)
        return function

    monkeypatch.setattr(atexit, "register", noting)
    yield
    _close_shared_memory()
    if len(_shared_memory) > MOST_FILES_OF_SHARED_MEMORY:
        gc.collect()
        _close_shared_memory()


def _close_shared_memory() -> None:
    files, _shared_memory[:] = tuple(_shared_memory), []
    for file, is_created in files:
        try:
            is_ours = False
            with contextlib.suppress(OSError):  # closed or removed already
                # Streaming may have removed the file, and another process may use its name by now.
                is_ours = is_created and os.path.samestat(
                    os.fstat(file._fd), Path("/dev/shm", file.name).stat()
                )
            with contextlib.suppress(OSError):
                file.close()
                # A data set that looks for a number opens those of all others; they aren't ours to remove.
                if is_ours:
                    file.unlink()
        except BufferError:
            _shared_memory.append((file, is_created))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Composer leaves a process group and its rank in the environment; no test inherits another's."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    # A fixture of the whole module may have trained before this test began.
    os.environ.update({name: value for name, value in before.items() if name not in OF_A_RANK})


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws without a seed of its own doesn't depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_files() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with small_files(size):` no file of this process grows above `size` bytes, as on a disk that is full.

    Inside a test only: pytest writes of it once it has ended, perhaps to a file that is longer."""
    return no_file_above


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 320 ids."""
    from mptfoundry.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_bpe([Path(__file__).read_text(), "naïve café 言葉 " * 4], 320, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tokenizer_folder: Path) -> Any:
    from mptfoundry.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folder), max_seq_len=TINY.max_seq_len)


@pytest.fixture(scope="session")
def adding_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small tokenizers with `<unk>`, `<s>` and `</s>` (ids 0 to 2), of Llama's kind (`▁` for a
    space, bytes for what is unknown), by what they add to a text by themselves: `nothing`, `bos` as Llama's,
    `eos` as T5's, `both` as RoBERTa's, or `pairs`, two tokens on each side."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("adding")
    special = ["<unk>", "<s>", "</s>"]
    templates = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}
    templates["pairs"] = "<s> <unk> $A <unk> </s>"
    for name, template in templates.items():
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[*(AddedToken(token, special=True) for token in special), *bytes_of],
            show_progress=False,
        )
        backend.train_from_iterator([Path(__file__).read_text()], trainer)
        backend.post_processor = TemplateProcessing(
            single=template, special_tokens=[(token, number) for number, token in enumerate(special)]
        )
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in templates}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer` (384 ids) and the streams `a` (code; train and val) and `b` (prose; train),
    rows of 32 tokens, the same under every version of Python."""
    from mptfoundry.data.prepare.prepare import prepare
    from mptfoundry.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("shards")
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text("".join(documents(name)))
    train_bpe(documents("a"), 384, folder / "tokenizer")
    options: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "max_seq_len": 32, "workers": 1}
    prepare([str(folder / "a.jsonl")], folder / "a", held_out=0.2, progress=False, **options)
    prepare([str(folder / "b.jsonl")], folder / "b", progress=False, **options)
    return folder


def documents(kind: str) -> list[str]:
    """Lines of JSONL: 200 small functions, or sentences about them."""
    draw = random.Random(kind)
    names = ["first", "second", "total", "count", "left", "right"]
    rows = []
    for _ in range(200):
        one, two, number = draw.choice(names), draw.choice(names), draw.randrange(100)
        code = f"def {one}({two}):\n    return {two} * {number} + {number % 7}\n"
        prose = f"The {one} of {number} is larger than the {two} of {number % 7}.\n"
        rows.append(json.dumps({"text": code if kind == "a" else prose}) + "\n")
    return rows


@pytest.fixture
def tiny_run(shards: Path, tmp_path: Path) -> Path:
    """The config of a run of twelve batches with dropout and two streams, saved every third batch; its runs
    lie in `tmp_path`."""
    return tiny_run_in(tmp_path, shards)


@pytest.fixture(scope="module")
def tiny_runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests of a file; its runs lie beside it."""
    return tiny_run_in(tmp_path_factory.mktemp("runs"), shards)


def tiny_run_in(folder: Path, shards: Path) -> Path:
    config = folder / "tiny.yaml"
    config.write_text(TINY_RUN.format(folder=shards, out=folder))
    return config


def losses(folder: Path) -> list[float]:
    """Of the batches of a run."""
    return [loss for _, loss in losses_by_batch(folder)]


def losses_by_batch(folder: Path) -> list[tuple[int, float]]:
    from mptfoundry.run.metrics_file import read_rows

    return [(row["batch"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


@dataclass
class Launched:
    """A training on one rank or more.

    Attributes:
        process: The `composer` launcher in a session of its own, or ranks without one.
        log: What all ranks print under a launcher.
    """

    process: subprocess.Popen[bytes] | Ranks
    log: Path

    @property
    def printed(self) -> str:
        if isinstance(self.process, Ranks):
            return self.process.printed
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 600) -> int:
        """The exit code, once all has ended."""
        return self.process.wait(timeout=seconds)

    def kill_after(self, rows: int, folder: Path) -> None:
        """Kill all of it when its metrics have so many rows, unless it has ended by then."""
        metrics = folder / "metrics.jsonl"
        while self.process.poll() is None:
            if metrics.is_file() and metrics.read_text().count("\n") >= rows:
                break
            time.sleep(0.02)
        self.kill_all()

    def kill_all(self) -> None:
        """Kill the launcher and every rank at once, as a machine that loses its power does."""
        if isinstance(self.process, Ranks):
            self.process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Start `scripts/train.py CONFIG [key=value ...]`; nothing of it outlives the test.

    With `launcher` under the `composer` launcher; `options` are the launcher's own; `within` is a command
    that runs it, such as in a namespace.
    """
    started: list[Launched] = []

    def start(
        config: Path,
        *words: str,
        ranks: int = 1,
        launcher: bool = False,
        options: Sequence[str] = (),
        within: Sequence[str] = (),
        **environment: str,
    ) -> Launched:
        log = tmp_path / f"launched-{len(started)}.log"
        if not (launcher or options or within):
            log.mkdir()
            forked = Ranks(log, "scripts/train.py", config, *words, ranks=ranks, **environment)
            started.append(Launched(forked, log))
            return started[-1]
        command = [*within, sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks), *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "scripts/train.py", str(config), *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(Launched(process, log))
        return started[-1]

    yield start
    for each in started:
        each.kill_all()


@pytest.fixture
def write_run(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Write a run folder with one whole checkpoint and return it; `network` defaults to a new one."""
    from mptfoundry.mpt.network import MPT

    def write(config: MPTConfig = TINY, network: Any = None, batch: int = 10, name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        network = network if network is not None else MPT(config, seed=1)
        run = {
            "max_seq_len": config.max_seq_len,
            "model": {"name": "mpt_causal_lm", **_plain(config.to_dict())},
            "train_loader": {"dataset": {"streams": {"code": {"proportion": 0.7}, "prose": {"local": "/x"}}}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(run))
        if not (folder / "tokenizer").exists():
            (folder / "tokenizer").symlink_to(tokenizer_folder)
        torch.save(composer_state(network, batch), folder / f"ep0-ba{batch}-rank0.pt")
        latest = folder / "latest-rank0.pt"
        latest.unlink(missing_ok=True)
        latest.symlink_to(f"ep0-ba{batch}-rank0.pt")
        return folder

    return write


def composer_state(network: torch.nn.Module, batch: int) -> dict[str, Any]:
    """What Composer's trainer puts into a checkpoint."""
    model = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in model.items()}
    return {
        "state": {
            "model": model,
            "optimizers": {"DecoupledLionW": {"state": moments, "param_groups": [{"lr": 1e-3}]}},
            "timestamp": {"Timestamp": {"batch": batch, "total_wct": datetime.timedelta(seconds=3)}},
            "algorithms": [],
            "integrations": {},
            "metadata": {"torch_version": TorchVersion(torch.__version__), "world_size": 1},
        },
        "rng": [
            {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
