"""Export a run or a checkpoint as a Hugging Face folder, in one of two formats.

`native`: stock transformers loads it without custom code, for models that its own MPT classes express.
`custom`: the folder contains our network's code, for every model. Weights go from the checkpoint into the
folder one by one; the optimizer's state is never read. After writing, we load the folder and compare its
logits with the checkpoint's; a folder that fails never gets its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mptfoundry import mpt
from mptfoundry.checkpoints.checksums import CHECKSUMS, write_tensor_checksums
from mptfoundry.checkpoints.reading import open_model, tokenizer_of
from mptfoundry.checkpoints.source import ModelSource, expected_shapes
from mptfoundry.checkpoints.staging import check_space, staged
from mptfoundry.checkpoints.weights import EMBEDDING, Rows, TensorOutline
from mptfoundry.errors import CheckpointError
from mptfoundry.export.adapter import AdapterSummary, export_adapter
from mptfoundry.export.card import PICTURE, model_card
from mptfoundry.export.comparison import Comparison, check_bytes, compare_logits
from mptfoundry.export.native import NATIVE_CODE, NATIVE_CODE_TEXT, native_config, token_ids, why_not_native
from mptfoundry.export.shards import DTYPES, write_shards
from mptfoundry.files import refuse_what_is_there, whole_or_absent
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import count_parameters
from mptfoundry.mpt.head_config import HeadConfig
from mptfoundry.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer

Format = Literal["auto", "native", "custom"]

SHARD_BYTES = 5_000_000_000
# What an exported folder may hold; `overwrite` replaces a folder only if it holds nothing else.
NAMES = (
    *("README.md", PICTURE, "*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", CHECKSUMS),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *(NATIVE_CODE, *(file.name for file in Path(mpt.__file__).parent.glob("*.py"))),
)


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        folder: The folder written.
        format: `native` or `custom`, and why.
        parameters: Number of the model's parameters.
        dtype: The dtype of the weights.
        weight_bytes: Bytes in all weight files together.
        weight_files: Number of weight files.
        seconds: Time for writing, without the comparison.
        comparison: The comparison of the logits.
    """

    folder: Path
    format: str
    parameters: int
    dtype: torch.dtype
    weight_bytes: int
    weight_files: int
    seconds: float
    comparison: Comparison

    def __str__(self) -> str:
        speed = self.weight_bytes / 2**20 / max(self.seconds, 1e-9)
        return (
            f"{self.folder}: {self.parameters:,} parameters as {str(self.dtype).removeprefix('torch.')} in "
            f"{self.weight_files} file{'s' * (self.weight_files > 1)}, {self.weight_bytes:,} bytes, "
            f"{speed:,.0f} MiB/s.\nFormat: {self.format}.\n{self.comparison}"
        )


def export(
    model: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str = "bf16",
    format: Format = "auto",
    adapter: Literal["merged", "separate"] = "merged",
    tokenizer: str | None = None,
    run_folder: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    license: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportSummary | AdapterSummary:
    """Write a model as a Hugging Face folder; arguments are ExportConfig's, and `progress` shows a bar.

    Raises:
        CheckpointError: The model can't be read, `native` can't express it (all reasons are listed), or the
            written folder doesn't give the checkpoint's logits.
    """
    out = Path(out)
    refuse_what_is_there(out, overwrite=overwrite, names=NAMES, source=model)
    with staged(model, out, run_folder, progress=progress) as path:
        source = open_model(path, base=base, verify=verify)
        text = _tokenizer_for(source, tokenizer)
        if adapter == "separate":
            return export_adapter(source, out, DTYPES[dtype], text, overwrite=overwrite)
        return write_folder(
            source, out, text, DTYPES[dtype], format=format, shard_bytes=shard_bytes, license=license,
            allow_absurd=not verify, overwrite=overwrite, progress=progress,
        )  # fmt: skip


def export_weights(
    weights: Mapping[str, torch.Tensor],
    checkpoint: str,
    out: Path,
    *,
    config: MPTConfig,
    run_folder: Path,
    overwrite: bool,
) -> ExportSummary:
    """Write the weights of a run in progress, which are in memory, as a Hugging Face folder.

    Args:
        weights: On the CPU, by name, in the dtype of the folder.
        checkpoint: The name that a checkpoint would have at that point.
        out: The folder to write.
        config: The architecture.
        run_folder: The run's folder, with its tokenizer and its metrics.
        overwrite: Replace an existing folder.
    """
    refuse_what_is_there(out, overwrite=overwrite, names=NAMES)
    source = ModelSource(
        run_folder / checkpoint, config, _WeightsInMemory(weights), run_folder / "tokenizer", run_folder
    )
    text = _tokenizer_for(source, None)
    return write_folder(source, out, text, weights[EMBEDDING].dtype, overwrite=overwrite, progress=False)


def write_folder(
    source: ModelSource,
    out: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    *,
    format: Format = "auto",
    shard_bytes: int = SHARD_BYTES,
    license: str | None = None,
    origin: str | None = None,
    allow_absurd: bool = True,
    overwrite: bool,
    progress: bool,
) -> ExportSummary:
    """Write an opened model atomically as a folder, and compare its logits.

    Args:
        source: The model.
        out: The folder to write.
        tokenizer: Its tokenizer; None: the folder gets none.
        dtype: The dtype of the weights.
        format, shard_bytes, license: As for `export`.
        origin: A paragraph of the card on where the model comes from.
        allow_absurd: Only warn about logits that no trained model gives.
        overwrite: Replace an existing folder.
        progress: Show a progress bar in bytes.
    """
    chosen, why = choose_format(source.config, format)
    parameters = count_parameters(source.config)
    check_space(out, parameters * dtype.itemsize, "the weights take")
    started_at = time.perf_counter()
    with whole_or_absent(out, overwrite=overwrite) as folder:
        folder.mkdir()
        files, checksums = _write_weights(source, folder, dtype, shard_bytes, progress)
        seconds = time.perf_counter() - started_at
        _write_the_rest(source, folder, tokenizer, dtype, chosen)
        card = model_card(out.name, source, folder, dtype, license, origin)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_tensor_checksums(folder, checksums)
        check_bytes(folder)
        comparison = compare_logits(source, folder, tokenizer, dtype, allow_absurd=allow_absurd)
        sizes = [file.stat().st_size for file in files]
    return ExportSummary(
        folder=out,
        format=f"{chosen}, {why}",
        parameters=parameters,
        dtype=dtype,
        weight_bytes=sum(sizes),
        weight_files=len(files),
        seconds=seconds,
        comparison=comparison,
    )


@dataclass(frozen=True)
class _WeightsInMemory:
    tensors: Mapping[str, torch.Tensor]

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        return {name: TensorOutline(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        tensor = self.tensors[name] if rows is None else self.tensors[name][slice(*rows)]
        return tensor.to(dtype or tensor.dtype, copy=True)


def choose_format(config: MPTConfig, format: Format) -> tuple[str, str]:
    """Return the requested format, or with `auto` the one that fits, and the reason for it.

    Raises:
        CheckpointError: `native` is requested but can't express the model.
    """
    reasons = "; ".join(why_not_native(config))
    if isinstance(config, HeadConfig) and (reasons or format == "custom"):
        raise CheckpointError(
            f"format: {config.architecture} is transformers' own class alone, without code in the folder"
            + (f", and would compute something else: {reasons}." if reasons else ". Use format=native.")
        )
    if format == "native" and reasons:
        raise CheckpointError(
            "format: native can't express this model, since transformers' own MPT classes would compute "
            f"something else: {reasons}. Use format=custom."
        )
    if format != "auto":
        return format, "asked for"
    if not reasons:
        return "native", "stock transformers loads it"
    return "custom", f"it needs trust_remote_code=True, since native can't express it: {reasons}"


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    """Set `use_cache`: its default in MPT's config is false, which means generation without a cache."""
    ids = token_ids(tokenizer)
    pad = ids["pad_token_id"] if ids["pad_token_id"] is not None else ids["eos_token_id"]
    return {**ids, "pad_token_id": pad, "use_cache": True}


def _write_weights(
    source: ModelSource, folder: Path, dtype: torch.dtype, shard_bytes: int, progress: bool
) -> tuple[list[Path], dict[str, int]]:
    shapes = expected_shapes(source.config)
    total = count_parameters(source.config) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        return write_shards(folder, shapes, source.tensors(dtype), dtype, shard_bytes, bar.update)


def _write_the_rest(
    source: ModelSource, folder: Path, tokenizer: Any, dtype: torch.dtype, format: str
) -> None:
    if format == "native":
        config = native_config(source.config, tokenizer, dtype)
        if "auto_map" in config:
            (folder / NATIVE_CODE).write_text(NATIVE_CODE_TEXT, encoding="utf-8")
    else:
        from mptfoundry.export.custom import copy_code, custom_config

        config = custom_config(source.config, tokenizer, dtype)
        copy_code(folder)
    _write_json(folder / "config.json", config)
    if not isinstance(source.config, HeadConfig):
        _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer, source.config.max_seq_len)


def _write_tokenizer(folder: Path, tokenizer: Any, max_seq_len: int) -> None:
    """Write the tokenizer's files so that `generate(**tokenizer(text))` works in every version."""
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["model_input_names"] = ["input_ids", "attention_mask"]
    values["model_max_length"] = max_seq_len
    for key in ("auto_map", "name_or_path", "backend"):
        values.pop(key, None)
    _write_json(file, values)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_for(source: ModelSource, name: str | None) -> Any:
    """Load the named tokenizer, or the model's own; raise if there is none or it doesn't fit."""
    named = load_tokenizer(name, max_seq_len=source.config.max_seq_len) if name else None
    tokenizer = named if named is not None else tokenizer_of(source)
    if tokenizer is None:
        raise CheckpointError(f"{source.path}: no tokenizer next to it. Name one: tokenizer=FOLDER.")
    check_tokenizer(tokenizer, source.config.vocab_size)
    return tokenizer
