"""Where a training run starts: from its own checkpoint, from one that the config names, or from scratch.

This is decided before anything is built, from the files in the run's folder and, if `save_folder` is a URL,
in the store; links are ignored. Rank 0 decides, and all ranks start from the same checkpoint or fail with the
same error.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from composer.utils import dist

from mptfoundry.architecture.of_run import RUN_CONFIG as CONFIG
from mptfoundry.architecture.of_run import config_of_run, read_run
from mptfoundry.architecture.trainable import names_in
from mptfoundry.checkpoints.adapters import lora_of
from mptfoundry.checkpoints.checkpoint import Checkpoint, checkpoint_at, find_checkpoint, newest_first
from mptfoundry.checkpoints.staging import remote_checkpoints, staged
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import CheckpointError
from mptfoundry.files import Upload, remove_unfinished, writing_into
from mptfoundry.places import is_url, progress_of
from mptfoundry.ranks import decided_by_rank_0, once_per_node, rank, say, world_size
from mptfoundry.run.changes import (
    Change,
    RunNotes,
    changed_inputs,
    changes_since,
    makes_the_run,
    read_notes,
    refuse_changes,
    saved_config,
)
from mptfoundry.run.metrics_file import NAME as METRICS
from mptfoundry.run.report import TRACKERS
from mptfoundry.stores import IN_BACKGROUND, Patience, uploader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: A local file or folder of shards; None means from scratch.
        is_own: The run continues from its own checkpoint; otherwise `load_path` names it.
        is_fetched: It was downloaded from the run's store, and is removed after loading.
        notes: What the run's own checkpoint records about the run; None if an older version wrote it.
    """

    checkpoint: Path | None = None
    is_own: bool = False
    is_fetched: bool = False
    notes: RunNotes | None = None


def run_folder(config: TrainConfig) -> Path:
    """Return the run's local folder: `save_folder` if that is local, else `runs/{run_name}`."""
    if config.save_folder is not None and not is_url(config.save_folder):
        return Path(config.save_folder.format(run_name=config.run_name))
    return Path("runs") / config.run_name


@contextmanager
def resolve_start(config: TrainConfig) -> Iterator[Start]:
    """Find where the run starts; a downloaded checkpoint exists until the block ends.

    Raises:
        CheckpointError: The newest checkpoint is damaged or belongs to another model, or `load_path` names
            none.
        ConfigError: A key that makes the run has changed in the config.
    """
    folder = run_folder(config)
    local = decided_by_rank_0(lambda: newest_first(folder)) or []
    start = Start()
    with ExitStack() as stack:
        if local or config.load_path is not None or is_url(config.save_folder or ""):
            start = _find_checkpoint(config, folder, local, stack)
        yield start
        dist.barrier()


def _find_checkpoint(
    config: TrainConfig, folder: Path, local: Sequence[Checkpoint], stack: ExitStack
) -> Start:
    if local:
        decided_by_rank_0(lambda: refuse_another_model(config, folder, local))
    own = None
    if config.resumes and config.save_folder is not None and (local or is_url(config.save_folder)):
        own = _own_checkpoint(config, folder, local, stack)
    if own is None and config.load_path is not None:
        return Start(_named_checkpoint(config, folder, stack))
    return own or Start()


def refuse_another_model(config: TrainConfig, folder: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise CheckpointError if the run's folder holds checkpoints that `config.model` can't continue.

    This runs before anything is written, because the folder's `config.yaml` belongs to those checkpoints.
    """
    # Damage is reported later, together with advice on how to get past it.
    whole = next((each.path for each in checkpoints if each.problem() is None), None)
    if whole is None:
        return
    notes = None
    with suppress(CheckpointError):
        notes = read_notes(whole)
    with _config_of_checkpoint(folder, notes) as place:
        if place is None:
            return
        saved_config(place / CONFIG)
        saved = names_in(config_of_run(place), lora_of(read_run(place)))
    here = names_in(config.model.network(), config.model.peft_config)
    for name in [*here, *saved]:
        if saved.get(name) != here.get(name):
            sizes = [str(shapes[name]) if name in shapes else "missing" for shapes in (saved, here)]
            raise CheckpointError(
                f"save_folder: {folder} holds checkpoints of another model: {name} is {sizes[0]} there and "
                f"{sizes[1]} in this config. Use another run_name or save_folder."
            )


@contextmanager
def _config_of_checkpoint(folder: Path, notes: RunNotes | None) -> Iterator[Path | None]:
    """Yield the folder with the `config.yaml` of a checkpoint, or None.

    The config inside the checkpoint wins; checkpoints of older versions have it next to them.
    """
    if notes is None:
        yield folder if (folder / CONFIG).is_file() else None
        return
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / CONFIG).write_text(notes.config, encoding="utf-8")
        yield Path(place)


def say_config_changes(config: TrainConfig, folder: Path, notes: RunNotes | None) -> None:
    """Print what has changed in the config since the checkpoint, or raise if it must not change."""
    with _config_of_checkpoint(folder, notes) as place:
        if notes is None:
            unknown = "config, data and tokenizer" if place is None else "data and tokenizer"
            text = "not compared, since an older version wrote the checkpoint without recording them"
            print(f"{unknown}: {text}", flush=True)
        if place is not None:
            _say_changes(changes_since(place / CONFIG, config), config, folder, "config")


def say_changed_inputs(config: TrainConfig, notes: RunNotes, fingerprints: Mapping[str, str]) -> None:
    """Print which streams have changed since the checkpoint was written, or raise if they must not change.

    Args:
        config: The run's config.
        notes: What the checkpoint records about the run.
        fingerprints: What this start reads, in the form of `RunNotes`.

    Raises:
        ConfigError: A training stream or the tokenizer has changed, and `allow_changes` does not name it.
    """
    changes = changed_inputs(notes.fingerprints, fingerprints)
    _say_changes(changes, config, run_folder(config), "data and tokenizer")


def _say_changes(changes: Sequence[Change], config: TrainConfig, place: Path, what: str) -> None:
    refuse_changes(changes, config, place)
    if changes:
        print(f"{what}: changed since the checkpoint", flush=True)
    for change in changes:
        note = " (allowed)" if makes_the_run(change.key, config) else ""
        print(f"  {change}{note}", flush=True)


def uploader_of(config: TrainConfig, patience: Patience = IN_BACKGROUND) -> Upload | None:
    """Return a function that uploads a run's files to a remote `save_folder`; None if it is local."""
    if config.save_folder is None or not is_url(config.save_folder):
        return None
    return uploader(_url(config), patience)


def _own_checkpoint(
    config: TrainConfig, folder: Path, local: Sequence[Checkpoint], stack: ExitStack
) -> Start | None:
    """Find the run's newest whole checkpoint, on this machine or in its store, and its notes."""
    own = _newest_sound(config, folder, local, stack)
    if own is None or own.checkpoint is None:
        return None
    # A downloaded checkpoint has its config next to it.
    checkpoint, written = own.checkpoint, own.checkpoint.parent if own.is_fetched else folder
    notes = decided_by_rank_0(lambda: read_notes(checkpoint))
    decided_by_rank_0(lambda: say_config_changes(config, written, notes))
    return replace(own, notes=notes)


def _newest_sound(
    config: TrainConfig, folder: Path, checkpoints: Sequence[Checkpoint], stack: ExitStack
) -> Start | None:
    local = decided_by_rank_0(lambda: _finished_ones(checkpoints)) or []
    url = _url(config)
    remote = decided_by_rank_0(lambda: remote_checkpoints(url)) or [] if is_url(url) else []
    newest_local = max((_batch(path) for path in local), default=-1)
    for name in remote:
        if _batch(Path(name)) <= newest_local:
            break
        fetched = _fetched(f"{url}/{name}", folder, stack)
        if _is_sound(fetched, config, shown_as=f"{url}/{name}"):
            return Start(fetched, is_own=True, is_fetched=True)
    for path in local:
        _refuse_one_file(path, config, "save_folder")
        if _is_sound(path, config):
            return Start(path, is_own=True)
    if local or remote:
        raise CheckpointError(
            f"save_folder: none of the {len({*remote, *(path.name for path in local)})} checkpoints in {url} "
            "is whole. Restore one, or use another run_name."
        )
    return None


def _named_checkpoint(config: TrainConfig, folder: Path, stack: ExitStack) -> Path:
    """Return the checkpoint that `load_path` names."""
    assert config.load_path is not None
    path = config.load_path.format(rank=0, run_name=config.run_name)
    local = _fetched(path, folder, stack) if is_url(path) else Path(path)
    if not local.exists():
        raise CheckpointError(f"load_path: {path} is missing. Name a checkpoint, or remove the key.")
    if (local / "config.json").is_file():
        raise CheckpointError(
            f"load_path: {path} is a Hugging Face folder, which holds weights and no training state. Name it "
            "in model.pretrained_model_name_or_path instead."
        )
    checkpoint = find_checkpoint(local) if is_url(path) else decided_by_rank_0(lambda: find_checkpoint(local))
    assert checkpoint is not None
    _refuse_one_file(checkpoint.path, config, "load_path")
    if reason := _damage(checkpoint.path):
        raise CheckpointError(f"load_path: {checkpoint.path}: {reason}. Name another checkpoint.")
    if rank() == 0 and not checkpoint.parts():
        note = f"note: load_path: {checkpoint.path} has no checksums and is read unverified."
        print(note, file=sys.stderr, flush=True)
    return checkpoint.path


def _refuse_one_file(checkpoint: Path, config: TrainConfig, key: str) -> None:
    """Raise CheckpointError if a checkpoint is whole but the run needs sharded ones."""
    if checkpoint.is_file() and config.fsdp_config and config.fsdp_config.state_dict_type == "sharded":
        raise CheckpointError(
            f"{key}: {checkpoint} is one file, and fsdp_config.state_dict_type: sharded loads folders. For "
            "its weights alone, name it in model.pretrained_model_name_or_path instead."
        )


def _finished_ones(checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Return the finished checkpoints, and print a line about each of the others."""
    finished = []
    for checkpoint in checkpoints:
        if reason := checkpoint.unfinished():
            print(f"{checkpoint.path}: {reason}; passed over", flush=True)
        else:
            finished.append(checkpoint.path)
    return finished


def _is_sound(checkpoint: Path, config: TrainConfig, shown_as: str | None = None) -> bool:
    """Whether a checkpoint has the bytes that were written. If not, raise an error, unless
    `resume_past_damage` allows skipping it."""
    reason = _damage(checkpoint)
    if reason is None:
        return True
    if not config.resume_past_damage:
        raise CheckpointError(
            f"{shown_as or checkpoint}: {reason}. Restore it, remove it, or set resume_past_damage=true to "
            "continue from the one before it."
        )
    say(f"{shown_as or checkpoint}: {reason}; passed over, as resume_past_damage says")
    return False


def _damage(checkpoint: Path) -> str | None:
    """Say which bytes of a checkpoint are damaged; each rank checks its share."""
    try:
        form = checkpoint_at(checkpoint)
        parts = [] if (reason := form.problem()) else form.parts()
        reason = reason or form.damage(parts[rank() :: world_size()])
    except FileNotFoundError:
        reason = "not seen by all nodes; save_folder has to lie on a disk that they share, or be a URL"
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{checkpoint}: ").rstrip(".")
    return next((each for each in dist.all_gather_object(reason) if each is not None), None)


def _fetched(url: str, folder: Path, stack: ExitStack) -> Path:
    """Download a checkpoint from a store to each node's own disk, where it stays until the stack closes."""

    def fetch() -> str:
        first = rank() == 0
        # They take up disk space. Nodes may share the folder.
        remove_unfinished_files(folder, is_ours=world_size() == dist.get_local_world_size())
        return str(stack.enter_context(staged(url, folder / "fetched", None, progress=first)))

    return Path(once_per_node(fetch, what=f"fetching {url}"))


def remove_unfinished_files(folder: Path, *, is_ours: bool, but: Path | None = None) -> None:
    """Remove what killed runs left unfinished in a folder, which nodes may share, and print it."""
    for entry in remove_unfinished(folder, is_ours=is_ours, but=but) if folder.is_dir() else ():
        print(f"removed: {entry}, which a run that was killed had not finished", flush=True)


def take_small_files(start: Start, folder: Path) -> None:
    """Copy the small files next to a downloaded checkpoint, so that metrics continue and upload again."""
    assert start.checkpoint is not None
    with writing_into(folder):
        for name in (CONFIG, METRICS, TRACKERS, "best.json"):
            if (fetched := start.checkpoint.parent / name).is_file():
                shutil.copyfile(fetched, folder / name)
        if (fetched := start.checkpoint.parent / "tokenizer").is_dir():
            shutil.copytree(fetched, folder / "tokenizer", dirs_exist_ok=True)


def _url(config: TrainConfig) -> str:
    assert config.save_folder is not None
    return config.save_folder.format(run_name=config.run_name).rstrip("/")


def _batch(checkpoint: Path) -> int:
    progress = progress_of(checkpoint)
    return progress[1] if progress else -1
