"""A model out of a run, a checkpoint or an exported folder: its architecture, tokenizer and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from mptfoundry.checkpoints.hf_config import config_from_dict, config_of_folder, config_of_others
from mptfoundry.checkpoints.hf_folder import FolderWeights
from mptfoundry.checkpoints.names import find_checkpoint
from mptfoundry.checkpoints.sharded import ShardedWeights
from mptfoundry.checkpoints.torch_files import open_composer_file
from mptfoundry.checkpoints.weights import EMBEDDING, PROJECTION, Weights
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.mpt.config import MPTConfig

if TYPE_CHECKING:
    from mptfoundry.mpt.network import MPT

AttnImpl = Literal["auto", "torch", "flash", "triton"]

RUN_CONFIG = "config.yaml"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, opened but not loaded.

    Attributes:
        path: The checkpoint's file or folder, or the exported folder.
        config: The architecture.
        weights: The tensors, by MPT's names.
        tokenizer_folder: Where its tokenizer lies, if it has one.
        run_folder: The run that it came from, if that is known.
    """

    path: Path
    config: MPTConfig
    weights: Weights
    tokenizer_folder: Path | None
    run_folder: Path | None

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's weights one by one, in memory of their own, in `dtype` or as stored.

        Every tensor of the architecture comes exactly once, in the network's order. Nothing else is read.
        """
        for name in expected_shapes(self.config):
            yield name, self.weights.read(name, dtype)


def open_model(path: str | Path) -> ModelSource:
    """Open a run folder, a checkpoint or a Hugging Face folder, and check that its weights fit its config.

    Raises:
        CheckpointError: Nothing is there, a file is damaged, or a tensor is missing, unknown or of another
            shape than the config says.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        weights: Weights = FolderWeights(path)
        source = ModelSource(path, config_of_folder(path), weights, _tokenizer_in(path), None)
    else:
        source = _open_checkpoint(find_checkpoint(path))
    check_weights(source)
    return source


def load_network(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_impl: AttnImpl = "auto",
) -> tuple[MPT, Any]:
    """The network of a run, a checkpoint or a Hugging Face folder, ready to evaluate, and its tokenizer.

    Args:
        path: As for `open_model`.
        device: Where the network is put.
        dtype: Number format of the weights. Default: as stored.
        attn_impl: The attention backend.

    Returns:
        The network in eval mode, and the tokenizer or None where there is none.

    Raises:
        CheckpointError: As `open_model`.
        ConfigError: As `network_of`.
    """
    source = open_model(path)
    return network_of(source, device=device, dtype=dtype, attn_impl=attn_impl), tokenizer_of(source)


def network_of(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_impl: AttnImpl = "auto",
) -> MPT:
    """The network of an opened model, in eval mode; its weights are read one by one.

    Raises:
        ConfigError: The attention backend that is asked for can't serve this model on this device.
    """
    from mptfoundry.mpt.attention import choose_backend
    from mptfoundry.mpt.network import MPT

    config = replace(source.config, attn_config=replace(source.config.attn_config, attn_impl=attn_impl))
    try:
        choose_backend(config, torch.device(device).type)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    network = MPT(config, device="meta")
    network.to(dtype or source.weights.outlines[EMBEDDING].dtype).to_empty(device=device)
    targets = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in source.tensors():
            targets[name].copy_(tensor)
    return network.eval()


def tokenizer_of(source: ModelSource) -> Any:
    """The tokenizer of an opened model, or None where there is none."""
    from mptfoundry.tokenizer import load_tokenizer

    if source.tokenizer_folder is None:
        return None
    return load_tokenizer(str(source.tokenizer_folder), max_seq_len=source.config.max_seq_len)


def expected_shapes(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a network, in its order."""
    from mptfoundry.mpt.network import MPT

    network = MPT(config, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def check_weights(source: ModelSource) -> None:
    """Raise CheckpointError, naming them, for tensors that are missing, unknown or of another shape."""
    found = {name: outline.shape for name, outline in source.weights.outlines.items()}
    if source.config.tie_word_embeddings and PROJECTION in found:
        _check_that_it_is_tied(source)
        found.pop(PROJECTION)
    blocks = {name.split(".")[2] for name in found if name.startswith("transformer.blocks.")}
    if len(blocks) != source.config.n_layers:
        raise CheckpointError(
            f"{source.path}: holds {len(blocks)} blocks; its config says n_layers: {source.config.n_layers}."
        )
    expected = expected_shapes(source.config)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not of this architecture" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name]}, its config says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
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


def _open_checkpoint(checkpoint: Path) -> ModelSource:
    """A Composer checkpoint, with the config of its run, or the one that llm-foundry puts inside."""
    hugging_face: dict[str, Any] = {}
    if checkpoint.is_dir():
        weights: Weights = ShardedWeights(checkpoint)
    else:
        weights, hugging_face = open_composer_file(checkpoint)
    run_folder = next(
        (f for f in (checkpoint.parent, checkpoint.parent.parent) if (f / RUN_CONFIG).is_file()), None
    )
    if run_folder is not None:
        config = _config_of_run(run_folder)
    elif content := hugging_face.get("model", {}).get("config", {}).get("content"):
        config = config_of_others(content, f"{checkpoint}: state.integrations.huggingface")
    else:
        raise CheckpointError(
            f"{checkpoint}: no {RUN_CONFIG} beside it, so its architecture isn't known. Keep a "
            "checkpoint in its run's folder, or put the run's config there."
        )
    tokenizer_folder = _tokenizer_in(run_folder / "tokenizer") if run_folder else None
    return ModelSource(checkpoint, config, weights, tokenizer_folder, run_folder)


def _config_of_run(run_folder: Path) -> MPTConfig:
    """The architecture that a run's resolved config tells."""
    file = run_folder / RUN_CONFIG
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        model = dict(run["model"])
    except (yaml.YAMLError, OSError, UnicodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no section `model` can be read from it.") from error
    if model.get("max_seq_len") is None and "max_seq_len" in run:
        model["max_seq_len"] = run["max_seq_len"]
    return config_from_dict(model, f"{file}: model")


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None
