"""Your own classes and functions, under names of their own.

A file that `code_paths` names runs before the config is checked, and writes into these tables:

    from mptfoundry import plugins
    plugins.optimizers["my_opt"] = MyOpt

A config then names them like those of mptfoundry: `optimizer: {name: my_opt, lr: 1e-3}`. Nothing here runs a
file unless the command line said `allow_code=true`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mptfoundry.errors import ConfigError, MPTFoundryError, RunStopped, first_line
from mptfoundry.mpt.config import OWN_BACKENDS as attention_backends

__all__ = ["algorithms", "attention_backends", "callbacks", "datasets", "loggers", "metrics", "optimizers"]
__all__ += ["record_formats", "schedulers"]

callbacks: dict[str, Any] = {}
loggers: dict[str, Any] = {}
algorithms: dict[str, Any] = {}
optimizers: dict[str, Any] = {}
schedulers: dict[str, Any] = {}
metrics: dict[str, Any] = {}
datasets: dict[str, Callable[..., Any]] = {}
record_formats: dict[str, Callable[[str], Iterable[Any]]] = {}

T = TypeVar("T")
# The sha256 of each file that ran in this process, by its path.
hashes: dict[str, str] = {}
_SHIM = "llmfoundry"


def run_code(paths: Iterable[str], say: Callable[[str], None]) -> dict[str, str]:
    """Run files that the command line allowed; return each one's sha256 by its path.

    A missing file is left out. `say` is called with each file and its hash before it runs.

    Raises:
        ConfigError: A file fails, with its line.
    """
    found = {path: Path(path).read_bytes() for path in paths if Path(path).is_file()}
    ran = {path: hashlib.sha256(content).hexdigest() for path, content in found.items()}
    for path, digest in ran.items():
        say(f"code_paths: running {path} (sha256 {digest})")
        with _explained(path), _llmfoundry():
            _run(path, _module_name(digest))
    hashes.update(ran)
    return ran


def record_format(path: str) -> Callable[[str], Iterable[Any]] | None:
    """The function of the user's own that reads a file of records, by the file's suffix, or None."""
    suffix = path.lower().rpartition(".")[2]
    return record_formats.get(suffix) or record_formats.get(f".{suffix}")


def call(key: str, own: Callable[..., T], *arguments: Any, **kwargs: Any) -> T:
    """Call a class or function of the user's own, which the config names at `key`.

    Raises:
        ConfigError: It fails.
    """
    try:
        return own(*arguments, **kwargs)
    except (MPTFoundryError, RunStopped):
        raise
    except Exception as error:
        text = f"{key}: {described(own)} fails: {type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{text}. MPTFOUNDRY_DEBUG=1 shows where.") from error


def described(own: Any) -> str:
    """A class or function of the user's own by its name, and the file of `code_paths` that it is from."""
    name, module = getattr(own, "__name__", type(own).__name__), getattr(own, "__module__", "")
    file = next((path for path, digest in hashes.items() if _module_name(digest) == module), None)
    return f"{name} ({file})" if file else name


def _module_name(digest: str) -> str:
    return f"code_{digest[:16]}"


def _run(path: str, name: str) -> None:
    """Run a file as a module that stays, so that its classes can be pickled and their hints resolved."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn an error of a user's file into one sentence with its line."""
    try:
        yield
    except RunStopped:
        raise
    except MPTFoundryError as error:
        error.of_this_machine = True
        raise
    except Exception as error:
        file, all_frames = Path(path).resolve(), traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in all_frames if Path(frame.filename).resolve() == file]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
        line = line or (frames[-1].lineno if frames else None)
        place = f"{path}:{line}" if line else path
        explained = ConfigError(f"code_paths: {place}: {type(error).__name__}: {error}")
        explained.of_this_machine = True  # the file may differ on another machine
        raise explained from error


@contextmanager
def _llmfoundry() -> Iterator[None]:
    """Let a file import `llmfoundry.registry` while it runs, if no such package is installed."""
    if _SHIM in sys.modules or importlib.util.find_spec(_SHIM) is not None:
        yield
        return
    package, registry = _Shim(_SHIM), _Registry(f"{_SHIM}.registry")
    package.registry = registry
    sys.modules |= {_SHIM: package, f"{_SHIM}.registry": registry}
    try:
        yield
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{_SHIM}."):
            raise
        raise ConfigError(f"code_paths: {error.name} is not here: {_ONLY}") from error
    finally:
        del sys.modules[_SHIM], sys.modules[f"{_SHIM}.registry"]


_ONLY = (
    "of llm-foundry a file can import `llmfoundry.registry` alone, for `registry.TABLE.register`. Write into "
    "mptfoundry.plugins.TABLE instead."
)


_ONLY_DATASETS = (
    "order, ranks, padding and the position in an epoch are mptfoundry's own, so that runs resume exactly. "
    'Register the dataset instead, plugins.datasets["NAME"] = MyDataset: a class with __len__, and with '
    "__getitem__ that returns a dict with input_ids."
)


class _Shim(ModuleType):
    """`llmfoundry`, with nothing but its `registry`."""

    registry: _Registry

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(f"code_paths: llmfoundry.{name} is not here: {_ONLY}")


class _Registry(ModuleType):
    """`llmfoundry.registry`: the tables that have one of ours."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in TABLES:
            return _Table(name)
        if name == "dataloaders":
            raise ConfigError(f"code_paths: llmfoundry.registry.{name} has no table here: {_ONLY_DATASETS}")
        raise ConfigError(
            f"code_paths: llmfoundry.registry.{name} has no table here. mptfoundry.plugins has "
            f"{', '.join(TABLES)}."
        )


class _Table:
    """`llmfoundry.registry.callbacks`, for its `register`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def register(self, name: str, *, func: Any = None) -> Any:
        """Write into our table: a call with `func`, or a decorator."""
        if func is not None:
            TABLES[self._name][name] = func
            return func
        return lambda decorated: self.register(name, func=decorated)

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"code_paths: llmfoundry.registry.{self._name}.{name} is not here. Use register, or "
            f"mptfoundry.plugins.{self._name}, a dict."
        )


TABLES: Mapping[str, dict[str, Any]] = {
    "callbacks": callbacks,
    "loggers": loggers,
    "algorithms": algorithms,
    "optimizers": optimizers,
    "schedulers": schedulers,
    "metrics": metrics,
    "datasets": datasets,
    "record_formats": record_formats,
    "attention_backends": attention_backends,
}
