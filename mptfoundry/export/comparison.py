"""Check that an exported folder computes what its checkpoint computes.

The folder is loaded with transformers' MPT classes, or with ours if it brings its own code, and both sides
compute the logits of real text in float64, from the weights as rounded for the export. They differ by less
than the classes' own rounding in float32; a switch that is ignored changes them by many thousand times that.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mptfoundry.checkpoints.hf_folder import FolderWeights
from mptfoundry.checkpoints.reading import network_of
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.weights import EMBEDDING, PROJECTION, Rows, TensorOutline, Weights
from mptfoundry.checkpoints.weights import cut as cut_rows
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
# A prime, so that its multiples spread over the vocabulary.
_STEP = 7919
# No trained model has logits this large.
_LARGEST_LOGIT = 1e4
# Bytes of float64 weights: in memory at a time, and compared in total. One layer is always compared.
_PART_BYTES = 1 << 29
_COMPARED_BYTES = 3 << 30
_LAYER = re.compile(r"(\.blocks\.)(\d+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Logits of an exported folder compared with those of its checkpoint, over the tokens of one text.

    Attributes:
        tokens: Tokens of the text.
        layers: Layers compared, from the first.
        all_layers: Layers of the model.
        difference: Largest difference in float64, both sides from the exported weights.
        float32_rounding: Root mean square of the change in the folder's logits in float32.
        export_rounding: Largest change of a logit by rounding the weights to the exported dtype.
        agrees: Whether the difference is only rounding, in every part.
        largest: The largest absolute logit of both.
    """

    tokens: int
    layers: int
    all_layers: int
    difference: float
    float32_rounding: float
    export_rounding: float
    agrees: bool = True
    largest: float = 0.0

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

    A larger model is compared in parts, so that few of its layers are in memory at a time: each part computes
    logits from the output of the layers before it, with the text's part of the vocabulary. Of a very large
    model only the first layers are compared, which tests every switch of the architecture.

    Raises:
        CheckpointError: The logits differ or, unless `allow_absurd`, are not those of a trained model.
    """
    ids = _ids_of_text(tokenizer, source.config)
    if tokenizer is not None:
        _load_tokenizer(folder)
    config, words = source.config, None
    layers = step = config.n_layers
    if 8 * count_parameters(config) > _PART_BYTES:
        words, ids = ids.unique(return_inverse=True)
        config = replace(config, vocab_size=len(words))
        layers, step = (_layers_within(config, limit) for limit in (_COMPARED_BYTES, _PART_BYTES))
    ours, theirs = _Excerpt.of(source.weights, words), _Excerpt.of(FolderWeights(folder), words)
    comparison = Comparison(ids.shape[1], 0, config.n_layers, 0.0, 0.0, 0.0)
    exact: _Pass | None = None  # output of the layers so far
    rounded: _Pass | None = None
    for first in range(0, layers, step):
        cut = replace(config, n_layers=min(step, layers - first))
        if first:  # position embeddings were added before the first layer
            cut = replace(cut, learned_pos_emb=False)
        part = replace(source, config=cut, weights=replace(ours, first=first))
        before = rounded
        exact, rounded = _our_logits(part, ids, dtype, exact, rounded)
        model = _their_model(folder, cut, None if words is None else replace(theirs, first=first))
        comparison = _joined(comparison, cut.n_layers, exact, rounded, *_their_logits(model, ids, before))
        del model
        if not comparison.agrees:
            raise CheckpointError(
                f"{folder.name}: the export does not give the checkpoint's logits. {comparison}"
            )
    _judge(comparison.largest, source.path, allow_absurd=allow_absurd)
    return comparison


def _ids_of_text(tokenizer: Any, config: MPTConfig) -> torch.Tensor:
    """(1, tokens): ids of a text; without a tokenizer, ids from all over the vocabulary."""
    longest = min(_LONGEST, config.max_seq_len)
    if tokenizer is None:
        return (torch.arange(longest) * _STEP % config.vocab_size)[None]
    return torch.tensor([tokenizer(_TEXT, truncation=True, max_length=longest)["input_ids"]])


def _judge(largest: float, path: Path, *, allow_absurd: bool) -> None:
    """Raise CheckpointError, or warn, if the largest logit is not that of a trained model."""
    if largest <= _LARGEST_LOGIT:
        return
    absurd = (
        f"{path}: its logits reach {largest:.1e}, and those of trained models stay below "
        f"{_LARGEST_LOGIT:.0e}: its weights are damaged, or its training diverged."
    )
    if not allow_absurd:
        raise CheckpointError(
            f"{absurd} Export an earlier checkpoint, or set verify=false to export this one."
        )
    log.warning("%s It is exported all the same.", absurd)


def check_bytes(folder: Path) -> None:
    """Read an exported folder's tensors back; raise CheckpointError if one differs from what was written."""
    written = FolderWeights(folder)
    for name in written.outlines:
        try:
            written.read(name)
        except CheckpointError as error:
            text = f"{folder.name}: {name} reads back otherwise than it was written."
            raise CheckpointError(text) from error


def _layers_within(config: MPTConfig, memory_bytes: int) -> int:
    """Return how many layers' float64 weights fit into so many bytes; at least one."""
    one = count_parameters(replace(config, n_layers=1))
    block = count_parameters(replace(config, n_layers=2)) - one
    return max(1, min(config.n_layers, 1 + (memory_bytes // 8 - one) // block))


@dataclass(frozen=True)
class _Pass:
    """Output of some layers of a network: logits, and the input of the last norm, (1, tokens, d_model)."""

    logits: torch.Tensor
    hidden: torch.Tensor


def _joined(
    before: Comparison,
    layers: int,
    exact: _Pass,
    rounded: _Pass,
    theirs_float32: torch.Tensor,
    theirs: torch.Tensor,
) -> Comparison:
    """Return the comparison with one more part; it keeps the largest number of all parts.

    transformers' softmax is float32 even in float64, so we compare with its own rounding there too.
    """
    largest = torch.stack([exact.logits, theirs_float32]).abs().max().item()
    if not math.isfinite(largest):
        largest = math.inf
        exact, rounded = (replace(each, logits=each.logits.nan_to_num()) for each in (exact, rounded))
        theirs_float32, theirs = theirs_float32.nan_to_num(), theirs.nan_to_num()
    float32_rounding = _rms(theirs_float32 - theirs)
    return replace(
        before,
        layers=before.layers + layers,
        difference=max((rounded.logits - theirs).abs().max().item(), before.difference),
        float32_rounding=max(float32_rounding, before.float32_rounding),
        export_rounding=(exact.logits - rounded.logits).abs().max().item(),
        agrees=before.agrees and _rms(rounded.logits - theirs) <= 2 * float32_rounding,
        largest=max(before.largest, largest),
    )


@dataclass(frozen=True)
class _Excerpt:
    """Weights of some layers and some words; layer 0 here is layer `first` of the model.

    Attributes:
        weights: All weights.
        rows: The words' rows, by the name of their matrix; empty without words.
        first: The first layer.
    """

    weights: Weights
    rows: Mapping[str, torch.Tensor]
    first: int = 0

    @classmethod
    def of(cls, weights: Weights, words: torch.Tensor | None) -> _Excerpt:
        """Read the words' rows at once, so that their matrices are in memory while nothing else is."""
        names = () if words is None else [n for n in (EMBEDDING, PROJECTION) if n in weights.outlines]
        return cls(weights, {name: weights.read(name)[words] for name in names})

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        return self.weights.outlines

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        if name in self.rows:
            tensor = cut_rows(self.rows[name], rows)
            return tensor.to(dtype or tensor.dtype, copy=True)
        there = _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + self.first}", name)
        return self.weights.read(there, dtype, rows)


@torch.inference_mode()
def _our_logits(
    source: ModelSource, ids: torch.Tensor, dtype: torch.dtype, exact: _Pass | None, rounded: _Pass | None
) -> tuple[_Pass, _Pass]:
    """Compute the layers' output in float64, from the weights as they are and as rounded to `dtype`.

    `exact` and `rounded` are the outputs of the layers before them.
    """
    network = network_of(source, dtype=torch.float64)
    exact = _pass(network, ids, exact)
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))
    return exact, _pass(network, ids, rounded)


@torch.inference_mode()
def _their_logits(model: Any, ids: torch.Tensor, before: _Pass | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of the folder's classes in float32 and in float64."""
    in_float32 = _pass(model, ids, before).logits.double()
    with _MasksInFloat64():
        return in_float32, _pass(model.double(), ids, before).logits


def _pass(model: Any, ids: torch.Tensor, before: _Pass | None) -> _Pass:
    """Run a model on ids, or on the output of the layers before it."""
    hidden: list[torch.Tensor] = []

    def keep(norm: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden.append(arguments[0])

    def put(embedding: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if before is None else before.hidden[:, : output.shape[1]].to(output.dtype)

    trunk = model.transformer
    hooks = [trunk.norm_f.register_forward_pre_hook(keep), trunk.wte.register_forward_hook(put)]
    try:
        return _Pass(_logits(model, ids), hidden[0])
    finally:
        for hook in hooks:
            hook.remove()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits for a text; if it has one result per text, those for prefixes of the text."""
    output = model(ids)
    if "start_logits" in getattr(output, "keys", list)():
        return torch.stack([output.start_logits, output.end_logits], -1)
    if output.logits.ndim == 2:
        return torch.stack([model(ids[:, : i + 1]).logits for i in range(0, ids.shape[1], 8)], 1)
    return output.logits


def _load_tokenizer(folder: Path) -> None:
    """Load a folder's tokenizer with transformers; raises whatever transformers raises."""
    from transformers import AutoTokenizer

    with _said_nothing():
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _their_model(folder: Path, cut: MPTConfig, excerpt: _Excerpt | None) -> Any:
    """Load the folder's model in float32, whole or an excerpt: `from_pretrained` can't leave out words."""
    kind = class_of(folder)
    with _said_nothing():
        if excerpt is None:
            return kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
        sizes = {key: getattr(cut, key) for key in ("n_layers", "vocab_size", "learned_pos_emb")}
        model = kind(kind.config_class.from_pretrained(folder, **sizes))
        for name, parameter in model.named_parameters():
            parameter.data = excerpt.read(name, torch.float32)
        return model.eval()


@contextmanager
def _said_nothing() -> Iterator[None]:
    """Silence transformers' warnings."""
    from transformers.utils import logging as their_logging

    before = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    try:
        yield
    finally:
        their_logging.set_verbosity(before)


def class_of(folder: Path) -> Any:
    """Return the class of an exported folder's model: transformers' own, or ours for a custom folder.

    The code in a custom folder is a copy of `mptfoundry.mpt`, so we take its class from there.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values["model_type"] != "mpt":
        module, _, name = values["auto_map"]["AutoModelForCausalLM"].rpartition(".")
        return getattr(importlib.import_module(f"mptfoundry.mpt.{module}"), name)
    import transformers

    return getattr(transformers, values["architectures"][0].replace("MPT", "Mpt"))


class _MasksInFloat64(TorchFunctionMode):
    """Make float64 masks: transformers 4 makes a mask of the default dtype, whatever the model's dtype.

    A mode applies only to its own thread, so it does not affect training in another thread.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.full:
            kwargs.setdefault("dtype", torch.float64)
        return func(*args, **kwargs)


def _rms(difference: torch.Tensor) -> float:
    return difference.pow(2).mean().sqrt().item()
