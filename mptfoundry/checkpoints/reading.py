"""Read a model from a run, a checkpoint or an exported folder: its architecture, tokenizer and weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mptfoundry.architecture.dialects import config_of_folder, config_of_others
from mptfoundry.architecture.hub import locate
from mptfoundry.architecture.of_run import RUN_CONFIG, config_of_run, overridden, read_run, run_of
from mptfoundry.checkpoints.adapters import (
    PEFT_CONFIG,
    is_peft_folder,
    lora_of,
    with_adapters,
    with_peft_folder,
)
from mptfoundry.checkpoints.checkpoint import Checkpoint, find_checkpoint
from mptfoundry.checkpoints.checksums import Verifier
from mptfoundry.checkpoints.hf_folder import FolderWeights
from mptfoundry.checkpoints.source import ModelSource, expected_shapes, shape_problems, with_rows
from mptfoundry.checkpoints.weights import (
    EMBEDDING,
    PROJECTION,
    check_number_formats,
)
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.files import confined, read_json
from mptfoundry.mpt.config import AttnImpl, MPTConfig
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.ranks import rank

if TYPE_CHECKING:
    from mptfoundry.mpt.network import MPT


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TEXTS = (".json", ".txt", ".jinja", ".model")


def open_model(
    path: str | Path, config: MPTConfig | None = None, *, base: str | None = None, verify: bool = True
) -> ModelSource:
    """Open a run folder, a checkpoint or a Hugging Face folder, and check that its weights fit its config.

    Args:
        path: The folder or file.
        config: The architecture, instead of the one found there.
        base: The model that an adapter in peft's format belongs to: a path or a name on the hub.
        verify: Compare what is read with its checksums, and say on rank 0 what has none.

    Raises:
        CheckpointError: Nothing is there, a file is damaged, or a tensor is missing, unknown or has another
            shape than the config says.
    """
    path, verifier = Path(path), Verifier(is_on=verify)
    if is_peft_folder(path):
        return _open_adapter(path, base, verifier)
    if base is not None:
        raise CheckpointError(f"base: {path} is not an adapter in peft's format, so it has none. Remove it.")
    if (path / "config.json").exists():
        config, weights = config or config_of_folder(path), FolderWeights(path, verifier)
        source = ModelSource(path, config, weights, _tokenizer_in(path), None, verifier)
    else:
        source = _open_checkpoint(find_checkpoint(path), config, verifier)
    check_weights(source)
    _say_notes(verifier, verify)
    return source


def _say_notes(verifier: Verifier, verify: bool) -> None:
    for sentence in verifier.notes if verify and rank() == 0 else ():
        print(f"note: {sentence}.", file=sys.stderr, flush=True)


def _open_adapter(folder: Path, base: str | None, verifier: Verifier) -> ModelSource:
    """Open an adapter in peft's format together with its base."""
    if base is None:
        name = read_json(folder, PEFT_CONFIG).get("base_model_name_or_path")
        of = f" of {name}" if isinstance(name, str) else ""
        raise CheckpointError(
            f"{folder}: is an adapter{of}, not a whole model. Name the model that it belongs to: base=MODEL, "
            f"for generate, chat, eval and export. `mptfoundry export {folder} OUT base=MODEL` makes one "
            "model of both."
        )
    source = with_peft_folder(folder, open_model(locate(base), verify=verifier.is_on), verifier)
    _say_notes(verifier, verifier.is_on)
    return replace(source, tokenizer_folder=_tokenizer_in(folder) or source.tokenizer_folder, run_folder=None)


def load_network(
    path: str | Path,
    *,
    base: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_impl: AttnImpl = "auto",
    config_overrides: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> tuple[MPT, Any]:
    """Load the network of a run, a checkpoint or a Hugging Face folder, ready to evaluate, and its tokenizer.

    Args:
        path, base: As for `open_model`.
        device: Where to put the network.
        dtype: Number format of the weights. Default: as stored.
        attn_impl: The attention backend.
        config_overrides: Switches of the architecture to change, such as `{"max_seq_len": 65536}`.
        verify: As for `open_model`.

    Returns:
        The network in eval mode, and the tokenizer or None if there is none.

    Raises:
        CheckpointError: As for `open_model`, or the model has a head for another task.
        ConfigError: As for `network_of`.
    """
    source = with_overrides(open_model(path, base=base, verify=verify), config_overrides or {})
    if isinstance(source.config, HeadConfig):
        raise CheckpointError(f"{path}: it ends in a head ({source.config.architecture}) and makes no text.")
    network = network_of(source, device=device, dtype=dtype, attn_impl=attn_impl)
    return cast("MPT", network), tokenizer_of(source)


def with_overrides(source: ModelSource, overrides: Mapping[str, Any]) -> ModelSource:
    """Return the model with some switches changed; another `vocab_size` cuts or pads its embedding.

    Raises:
        CheckpointError: There is no such switch, or the weights no longer fit the architecture.
    """
    if not overrides:
        return source
    target = overridden(source.config, overrides)
    config = replace(target, vocab_size=source.config.vocab_size)
    changed = with_rows(replace(source, config=config), target.vocab_size)
    check_weights(changed)
    return changed


def network_of(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    attn_impl: AttnImpl = "auto",
) -> nn.Module:
    """Build the network of an opened model, in eval mode; its weights are read one by one.

    `compute_dtype` is what autocast will compute in; by default it is the dtype of the weights.

    Raises:
        ConfigError: The requested attention backend can't run this model on this device.
    """
    dtype = dtype or source.weights.outlines[EMBEDDING].dtype
    network = outline_of(source, device=device, compute_dtype=compute_dtype or dtype, attn_impl=attn_impl)
    network.to(dtype).to_empty(device=device)
    targets = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in source.tensors():
            targets[name].copy_(tensor)
    return network.eval()


def outline_of(
    source: ModelSource, *, device: str | torch.device, compute_dtype: torch.dtype, attn_impl: AttnImpl
) -> nn.Module:
    """Build the network of an opened model on the meta device, for `device`; reads nothing.

    Raises:
        ConfigError: As for `network_of`.
    """
    from mptfoundry.mpt.attention import capability_of
    from mptfoundry.mpt.backends import choose_backend
    from mptfoundry.mpt.heads import make_network

    config = replace(source.config, attn_config=replace(source.config.attn_config, attn_impl=attn_impl))
    device_type = torch.device(device).type
    capability = capability_of(torch.device(device).index) if device_type == "cuda" else None
    try:
        choose_backend(config, device_type, str(compute_dtype).removeprefix("torch."), capability)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return make_network(config, device="meta")


def tokenizer_of(source: ModelSource) -> Any:
    """Load the tokenizer of an opened model, or None if there is none."""
    from mptfoundry.tokenizer import load_tokenizer

    if source.tokenizer_folder is None:
        return None
    return load_tokenizer(str(source.tokenizer_folder), max_seq_len=source.config.max_seq_len)


def check_weights(source: ModelSource) -> None:
    """Raise CheckpointError with the names of tensors that are missing, unknown, have another shape or a
    number format that is not for weights."""
    expected, outlines = expected_shapes(source.config), source.weights.outlines
    check_number_formats(source.path, outlines, [*expected, PROJECTION])
    found = {name: outline.shape for name, outline in outlines.items()}
    if source.config.tie_word_embeddings and PROJECTION in found:
        _check_that_it_is_tied(source)
        found.pop(PROJECTION)
    blocks = {name.split(".")[2] for name in found if name.startswith("transformer.blocks.")}
    if len(blocks) != source.config.n_layers:
        raise CheckpointError(
            f"{source.path}: holds {len(blocks)} blocks; its config says n_layers: {source.config.n_layers}."
        )
    problems = shape_problems(found, expected)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{source.path}: {'; '.join(problems[:5])}{more}.")


def _check_that_it_is_tied(source: ModelSource) -> None:
    same = source.weights.outlines[PROJECTION].shape == source.weights.outlines[EMBEDDING].shape
    if not same or not torch.equal(source.weights.read(PROJECTION), source.weights.read(EMBEDDING)):
        raise CheckpointError(
            f"{source.path}: {PROJECTION} differs from the embedding, but its config says "
            "tie_word_embeddings: true."
        )


def _open_checkpoint(checkpoint: Checkpoint, config: MPTConfig | None, verifier: Verifier) -> ModelSource:
    """Open a Composer checkpoint, with the config of its run, or the one that llm-foundry stores inside."""
    path, weights = checkpoint.path, checkpoint.weights(verifier)
    folder = run_of(path)
    if config is None and folder is not None:
        config = config_of_run(folder)
    elif config is None:
        noted = weights.note("model").get("config")
        content = noted.get("content") if isinstance(noted, dict) else None
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path}: no {RUN_CONFIG} next to it, so its architecture isn't known. Keep a "
                "checkpoint in its run's folder, or put the run's config there."
            )
        config = config_of_others(content, f"{path}: state.integrations.huggingface")
    tokenizer_folder = _tokenizer_in(folder / "tokenizer") if folder else None
    run = read_run(folder) if folder is not None else {"model": {}}
    trained = folder if "train_loader" in run else None
    source = ModelSource(path, config, weights, tokenizer_folder, trained, verifier)
    if folder is None or (lora := lora_of(run)) is None:
        return source
    return with_adapters(_base_of(run, folder, config, verify=verifier.is_on), weights, lora, source)


def _base_of(run: Mapping[str, Any], folder: Path, config: MPTConfig, *, verify: bool) -> ModelSource:
    """Open the base that the run's adapters were trained on."""
    name = run["model"].get("pretrained_model_name_or_path") or run.get("load_path")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / RUN_CONFIG}: names no base for the adapters of model.peft_config.")
    try:
        path = locate(name, run["model"].get("revision"))
        if run_of(path.resolve()) == folder.resolve():
            raise CheckpointError(f"{name} is the run itself.")
        return with_rows(open_model(path, verify=verify), config.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapters in {folder}: {error}") from error


def _tokenizer_in(folder: Path) -> Path | None:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    for file in folder.iterdir():
        if file.is_symlink() and file.suffix in _TEXTS:
            confined(folder, file.name, file)
    return folder
