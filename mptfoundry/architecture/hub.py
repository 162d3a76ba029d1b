"""Find a model by name: a local folder, or a revision on the Hugging Face Hub, stored in the Hub's cache.

Only weights, configs and tokenizers are downloaded, never code. This module does not need torch.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mptfoundry.errors import CheckpointError, first_line

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TEXTS = ["*.json", "merges.txt", "vocab.txt"]


def locate(name: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The local path of the model `name`; downloads it if needed.

    Args:
        name: A local path, or `organisation/model` on the Hub.
        revision: Branch, tag or commit, for a Hub name. Default: the main branch.
        config_only: Download only `config.json`.

    Returns:
        The given local path, or a snapshot's folder, which is named after its commit.

    Raises:
        CheckpointError: The path does not exist, or the Hub does not provide the model.
    """
    local = Path(name).expanduser()
    if local.exists():
        if revision is not None:
            raise CheckpointError(f"{name}: a local folder has no revision {revision}. Remove the revision.")
        return local
    if not takes_a_hub_name(name):
        raise CheckpointError(f"{name}: no such file or folder.")
    return _snapshot(name, revision, config_only)


def takes_a_hub_name(name: str) -> bool:
    """Whether a name that is not a path of this machine can be one on the Hub."""
    return not name.startswith(("/", "./", "../", "~")) and _NAME.fullmatch(name) is not None


def why_out_of_reach() -> str | None:
    """Do one DNS lookup first, because the Hub's client retries for most of a minute."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "0").upper() in ("1", "TRUE", "YES", "ON"):
            return f"{variable} is set"
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"this machine is offline ({host} is not known)"
    return None


def _snapshot(name: str, revision: str | None, config_only: bool) -> Path:
    """A snapshot in the cache: from the Hub if it is reachable, otherwise an earlier download."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    offline = why_out_of_reach()
    try:
        if config_only:
            file = hf_hub_download(name, "config.json", revision=revision, local_files_only=bool(offline))
            return Path(file).parent
        if offline:
            return _cached_snapshot(name, revision)
        files = HfApi().list_repo_files(name, revision=revision)
        kind = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        patterns = [*_TEXTS, kind]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        )
    except Exception as error:  # the client's errors have no common base class
        why = offline or first_line(error)
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}{at}: is neither a folder nor in the Hugging Face cache, and can't be fetched: {why}. "
            "Name a local folder, or fetch it once while online."
        ) from error


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """A snapshot in the cache; huggingface_hub 2 returns it only if it holds all files that are asked for."""
    from huggingface_hub import snapshot_download

    def cached(weights: str) -> Path:
        patterns = [*_TEXTS, weights]
        options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": "*/*"}
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))

    try:
        return cached("*.safetensors")
    except Exception:  # whatever it is, the other kind fails in the same way, or is there
        return cached("*.bin")
