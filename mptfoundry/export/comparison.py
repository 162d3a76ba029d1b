"""Does an exported folder compute what its checkpoint computes?

The folder is loaded by transformers' MPT classes, or by ours where it brings its own code, and both sides
compute the logits of real text in float64, from the weights as they were rounded for the export. There they
differ by less than the classes' own rounding in float32; a switch that is ignored moves them by many thousand
times that.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mptfoundry.checkpoints.hf_folder import FolderWeights
from mptfoundry.checkpoints.reading import ModelSource, network_of
from mptfoundry.checkpoints.weights import EMBEDDING, PROJECTION, Rows, TensorOutline, Weights
from mptfoundry.devices import total_memory
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters

_TEXT = """A language model reads one token after another and learns to tell which comes next. "Why?", asked
the reader on 3 May 1994, "and how would one know?" Così è, se vi pare: Größe und Maß, 言葉, naïve façade.

def rows(table):
    for key, value in sorted(table.items()):
        yield f"{key}\\t{value / 2:.3f}"  # two columns

The same holds for code, for numbers such as 3.14159, and for lists: first, second, third."""
_LONGEST = 256
_LARGEST_LOGIT = 1e4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Logits of an exported folder beside those of its checkpoint, over the tokens of one text.

    Attributes:
        tokens: Of the text.
        layers: That were compared, from the first.
        all_layers: Of the model.
        difference: Largest difference in float64, both sides from the exported weights.
        float32_rounding: Root mean square of what float32 changes in the folder's logits.
        export_rounding: Largest change of a logit by rounding the weights to the exported dtype.
    """

    tokens: int
    layers: int
    all_layers: int
    difference: float
    float32_rounding: float
    export_rounding: float

    def __str__(self) -> str:
        some = (
            f", the first {self.layers} of {self.all_layers} layers" if self.layers < self.all_layers else ""
        )
        rounding = f" Rounding the weights moves them by at most {self.export_rounding:.1e}."
        return (
            f"Logits of the folder and of the checkpoint over {self.tokens} tokens{some}: they differ by "
            f"at most {self.difference:.1e} (float32 rounds by {self.float32_rounding:.1e})."
        ) + rounding * (self.export_rounding > 0)


def compare_logits(
    source: ModelSource, folder: Path, tokenizer: Any, dtype: torch.dtype, *, allow_absurd: bool = False
) -> Comparison:
    """Compare an exported folder with the model that it was made from.

    A model whose float64 weights would take more than a quarter of the machine's memory, or 3 GiB, is
    compared over its first layers and the text's part of the vocabulary, which shows every switch of the
    architecture.

    Raises:
        CheckpointError: The logits differ, or, unless `allow_absurd`, no trained model gives such logits.
    """
    longest = min(_LONGEST, source.config.max_seq_len)
    ids = torch.tensor([tokenizer(_TEXT, truncation=True, max_length=longest)["input_ids"]])
    words, memory_bytes, cut = None, _affordable_bytes(), source.config
    if 8 * count_parameters(cut) > memory_bytes:
        words, ids = ids.unique(return_inverse=True)
        cut = replace(cut, vocab_size=len(words))
        cut = replace(cut, n_layers=_layers_within(cut, memory_bytes))
    ours = replace(source, config=cut, weights=_Part(source.weights, words))
    exact, rounded = _our_logits(ours, ids, dtype)
    theirs_float32, theirs = _their_logits(folder, ids, cut, words)
    largest = torch.stack([exact, theirs_float32]).abs().max().item()
    if not largest <= _LARGEST_LOGIT:
        absurd = (
            f"{source.path}: its logits reach {largest:.1e}, and those of trained models stay below "
            f"{_LARGEST_LOGIT:.0e}: its weights are damaged, or its training diverged."
        )
        if not allow_absurd:
            raise CheckpointError(
                f"{absurd} Export an earlier checkpoint, or set verify=false to export this one."
            )
        log.warning("%s It is exported all the same.", absurd)
    if not math.isfinite(largest):
        exact, rounded, theirs_float32, theirs = (
            logits.nan_to_num() for logits in (exact, rounded, theirs_float32, theirs)
        )
    comparison = Comparison(
        tokens=ids.shape[1],
        layers=cut.n_layers,
        all_layers=source.config.n_layers,
        difference=(rounded - theirs).abs().max().item(),
        float32_rounding=_rms(theirs_float32 - theirs),
        export_rounding=(exact - rounded).abs().max().item(),
    )
    # transformers' softmax is float32 even in float64, so that its own rounding is the yardstick here too.
    if not _rms(rounded - theirs) <= 2 * comparison.float32_rounding:
        raise CheckpointError(
            f"{folder.name}: the export does not give the checkpoint's logits. {comparison}"
        )
    return comparison


def check_bytes(folder: Path) -> None:
    """Read an exported folder's tensors back; raises CheckpointError for one that isn't what was written."""
    written = FolderWeights(folder)
    for name in written.outlines:
        try:
            written.read(name)
        except CheckpointError as error:
            text = f"{folder.name}: {name} reads back otherwise than it was written."
            raise CheckpointError(text) from error


def _affordable_bytes() -> int:
    return min(3 << 30, (total_memory() or 12 << 30) // 4)


def _layers_within(config: MPTConfig, memory_bytes: int) -> int:
    one = count_parameters(replace(config, n_layers=1))
    block = count_parameters(replace(config, n_layers=2)) - one
    return max(1, min(config.n_layers, 1 + (memory_bytes // 8 - one) // block))


@dataclass(frozen=True)
class _Part:
    """Weights with some words of the vocabulary; all of them where `words` is None."""

    weights: Weights
    words: torch.Tensor | None

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        return self.weights.outlines

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        if self.words is None or name not in (EMBEDDING, PROJECTION):
            return self.weights.read(name, dtype, rows)
        tensor = self.weights.read(name)[self.words if rows is None else self.words[slice(*rows)]]
        return tensor.to(dtype or tensor.dtype)


@torch.inference_mode()
def _our_logits(
    source: ModelSource, ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, from the weights as they are and as they are rounded to `dtype`."""
    network = network_of(source, dtype=torch.float64)
    exact = _logits(network, ids)
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))
    return exact, _logits(network, ids)


@torch.inference_mode()
def _their_logits(
    folder: Path, ids: torch.Tensor, cut: MPTConfig, words: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the folder's classes in float32 and in float64."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as their_logging

    before = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if words is None:
            model = class_of(folder).from_pretrained(folder, torch_dtype=torch.float32)
        else:
            model = _load_part(folder, cut, words)
    finally:
        their_logging.set_verbosity(before)
    model.eval()
    in_float32 = _logits(model, ids).double()
    with _MasksInFloat64():
        return in_float32, _logits(model.double(), ids)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """All that a model says of one text; of its beginnings, too, where it says one thing of a text."""
    output = model(ids)
    if "start_logits" in getattr(output, "keys", list)():
        return torch.stack([output.start_logits, output.end_logits], -1)
    if output.logits.ndim == 2:
        return torch.stack([model(ids[:, : i + 1]).logits for i in range(0, ids.shape[1], 8)], 1)
    return output.logits


def _load_part(folder: Path, cut: MPTConfig, words: torch.Tensor) -> Any:
    """The folder's model with fewer layers and words; `from_pretrained` can't leave out the latter."""
    kind = class_of(folder)
    sizes = {"n_layers": cut.n_layers, "vocab_size": cut.vocab_size}
    model = kind(kind.config_class.from_pretrained(folder, **sizes))
    weights = _Part(FolderWeights(folder), words)
    for name, parameter in model.named_parameters():
        parameter.data = weights.read(name, torch.float32)
    return model


def class_of(folder: Path) -> Any:
    """The class that computes an exported folder: transformers' own, or of a custom folder ours.

    The code that lies in a custom folder is a copy of `mptfoundry.mpt`, so its class is taken from there.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values["model_type"] != "mpt":
        module, _, name = values["auto_map"]["AutoModelForCausalLM"].rpartition(".")
        return getattr(importlib.import_module(f"mptfoundry.mpt.{module}"), name)
    import transformers

    return getattr(transformers, values["architectures"][0].replace("MPT", "Mpt"))


class _MasksInFloat64(TorchFunctionMode):
    """transformers 4 makes a mask of the default dtype, whatever the model's; here it becomes float64.

    A mode holds for its own thread: nothing changes for a training that goes on meanwhile.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.full:
            kwargs.setdefault("dtype", torch.float64)
        return func(*args, **kwargs)


def _rms(difference: torch.Tensor) -> float:
    return difference.pow(2).mean().sqrt().item()
