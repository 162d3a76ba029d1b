"""Read the architecture of a model on disk, override it, and compare two architectures.

This module does not need torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mptfoundry.architecture.dialects import config_from_dict, config_of_folder
from mptfoundry.config.engine import nested
from mptfoundry.config.engine.plain_yaml import from_text
from mptfoundry.errors import CheckpointError
from mptfoundry.mpt.backends import BACKENDS
from mptfoundry.mpt.config import OWN_BACKENDS, MPTConfig, from_values

RUN_CONFIG = "config.yaml"
# Runtime options and the init scheme, which don't affect a loaded model's results.
OWN = (("attn_config", "attn_impl"), ("init_config",))


def architecture_of(path: Path) -> MPTConfig:
    """The architecture of a Hugging Face folder, a run, or a checkpoint in its run's folder.

    Raises:
        CheckpointError: As for `config_of_folder`, or there is no config.
    """
    if (path / "config.json").exists():
        return config_of_folder(path)
    if (run := run_of(path)) is not None:
        return config_of_run(run)
    raise CheckpointError(
        f"{path}: neither a config.json in it nor a run's {RUN_CONFIG} describes its architecture. A "
        "checkpoint of another program becomes a Hugging Face folder with `mptfoundry import`."
    )


def run_of(path: Path) -> Path | None:
    """The run folder, with `config.yaml`, that contains a checkpoint; a run folder returns itself."""
    return next((f for f in (path, path.parent, path.parent.parent) if (f / RUN_CONFIG).is_file()), None)


def read_run(folder: Path) -> dict[str, Any]:
    """The config that a run saved in its folder, as plain values."""
    file = folder / RUN_CONFIG
    try:
        text = file.read_text(encoding="utf-8")
        run = from_text(text)
        if "${oc.env:" in text:
            run = _from_environment(run, file)
        return {**run, "model": dict(run["model"])}
    except (yaml.YAMLError, OSError, UnicodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no section `model` can be read from it.") from error


def _from_environment(run: Any, file: Path) -> Any:
    """The config with environment variables substituted if they are set; the rest as written."""
    from mptfoundry.config.engine.document import UNRESOLVED
    from mptfoundry.config.engine.read_document import read_document

    def filled(value: Any, written: Any) -> Any:
        if isinstance(written, dict):
            return {key: filled(value[str(key)], item) for key, item in written.items()}
        if isinstance(written, list):
            return [filled(*pair) for pair in zip(value, written, strict=True)]
        return written if value is UNRESOLVED else value

    return filled(read_document(file, ()).tree, run)


def config_of_run(folder: Path) -> MPTConfig:
    """The architecture in a run's resolved config."""
    run, file = read_run(folder), folder / RUN_CONFIG
    model = run["model"]
    if model.get("max_seq_len") is None and "max_seq_len" in run:
        model["max_seq_len"] = run["max_seq_len"]
    if "pretrained_model_name_or_path" in model and "d_model" not in model:
        raise CheckpointError(
            f"{file}: model does not list the architecture. Use the {RUN_CONFIG} that a run wrote."
        )
    attention = model.get("attn_config")
    if isinstance(attention, dict) and attention.get("attn_impl") not in ("auto", *BACKENDS, *OWN_BACKENDS):
        # It may be a backend of the run's own code, which did not run here; all backends compute the same.
        model["attn_config"] = {key: value for key, value in attention.items() if key != "attn_impl"}
    return config_from_dict(model, f"{file}: model")


def overridden(config: MPTConfig, overrides: Mapping[str, Any]) -> MPTConfig:
    """The architecture with some options changed, given as nested values.

    Raises:
        CheckpointError: MPT does not have this key or value.
    """
    try:
        return from_values(type(config), _merged(config.to_dict(), overrides))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config_overrides: {error}") from error


def takes_any_length(config: MPTConfig) -> bool:
    """Whether `max_seq_len` may change without an effect on the model's results."""
    attention = config.attn_config
    is_dynamic = attention.rope and attention.rope_hf_config.type == "dynamic"
    return not config.has_learned_positions and not is_dynamic


def differing(
    there: MPTConfig, here: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any] | None = None
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the differences between a model and the config's values: (path, model's value, config's value).

    Unknown keys and options that don't affect results are ignored.

    Args:
        there: The model.
        here: All or some of the options in the config.
        changes: Intended changes of the model, by path.
    """
    expected, explicit = (
        leaves(v) | dict(changes or {}) for v in (there.to_dict(), there.to_explicit_dict())
    )
    for path, value in leaves(here).items():
        is_own = any(path[: len(own)] == own for own in OWN)
        is_length = path == ("max_seq_len",) and takes_any_length(there)
        is_same = path not in expected or value in (expected[path], explicit[path])
        # With ALiBi or rotary positions, learned positions are off for any value.
        is_unused = path == ("learned_pos_emb",) and (there.attn_config.alibi or there.attn_config.rope)
        if not (is_own or is_length or is_unused or is_same):
            yield path, expected[path], value


def leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested values, flattened by path; lists become tuples."""
    pairs = ((at, value) for at, value in nested.leaves(values, path, lists=False) if value != {})
    return {at: tuple(value) if isinstance(value, list) else value for at, value in pairs}


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        inner = merged.get(key)
        is_section = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[key] = _merged(inner, value) if is_section else value  # type: ignore[arg-type]
    return merged
