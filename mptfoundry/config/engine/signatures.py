"""Describe classes that a configuration names as dataclasses, like our own sections.

The signatures of other libraries are read from the sources of the installed packages; nothing is imported.
Those of the user's own classes and functions are read from the objects, which the user's file has made. Only
plain annotations (`int`, `Optional[str]`, `list[str]`, ...) are checked; other arguments accept anything.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache, partial, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from mptfoundry.config.engine.forms import Form
from mptfoundry.config.engine.schema import default_of
from mptfoundry.config.engine.section_rules import Section

CALLBACKS: dict[str, str] = {
    "activation_monitor": "composer.callbacks.activation_monitor:ActivationMonitor",
    "early_stopper": "composer.callbacks.early_stopper:EarlyStopper",
    "generate_callback": "mptfoundry.callbacks.samples:Generate",
    "hf_checkpointer": "mptfoundry.callbacks.hf_export:HFExport",
    "kill_loss_spike": "mptfoundry.callbacks.loss_spikes:LossSpikes",
    "lr_monitor": "composer.callbacks.lr_monitor:LRMonitor",
    "memory_monitor": "composer.callbacks.memory_monitor:MemoryMonitor",
    "memory_snapshot": "composer.callbacks.memory_snapshot:MemorySnapshot",
    "nan_monitor": "composer.callbacks.nan_monitor:NaNMonitor",
    "oom_observer": "composer.callbacks.oom_observer:OOMObserver",
    "optimizer_monitor": "composer.callbacks.optimizer_monitor:OptimizerMonitor",
    "runtime_estimator": "composer.callbacks.runtime_estimator:RuntimeEstimator",
    "speed_monitor": "composer.callbacks.speed_monitor:SpeedMonitor",
    "system_metrics_monitor": "composer.callbacks.system_metrics_monitor:SystemMetricsMonitor",
    "threshold_stopper": "composer.callbacks.threshold_stopper:ThresholdStopper",
}
LOGGERS: dict[str, str] = {
    "cometml": "composer.loggers.cometml_logger:CometMLLogger",
    "file_logger": "composer.loggers.file_logger:FileLogger",
    "in_memory_logger": "composer.loggers.in_memory_logger:InMemoryLogger",
    "inmemory": "composer.loggers.in_memory_logger:InMemoryLogger",
    "mlflow": "composer.loggers.mlflow_logger:MLFlowLogger",
    "slack": "composer.loggers.slack_logger:SlackLogger",
    "tensorboard": "mptfoundry.callbacks.tensorboard:TensorBoardFile",
    "wandb": "composer.loggers.wandb_logger:WandBLogger",
}
_MIX = "a run has one data mix. Start a second run from load_path."
_REMOVE = "nothing here does what it does. Remove it."
# llm-foundry's callbacks and loggers that are not supported, and why or what to use instead.
REFUSED_CALLBACKS: dict[str, str] = {
    "async_eval": "runs evaluate as they go. Use eval_interval.",
    "curriculum_learning": _MIX,
    "dataset_swap": _MIX,
    "env_logging": "`mptfoundry doctor` prints the versions. Remove it.",
    "eval_output_logging": _REMOVE,
    "fdiff_metrics": "metrics.jsonl has every value to take differences of. Remove it.",
    "global_lr_scaling": "give the learning rate itself.",
    "layer_freezing": "patterns in optimizer.disable_grad say which parameters stay as they are.",
    "load_checkpoint": "give load_path.",
    "loss_perp_v_len": _REMOVE,
    "mbmoe_tok_per_expert": "MPTs have no experts. Remove it.",
    "mono_checkpoint_saver": "fsdp_config.state_dict_type: full saves whole checkpoints.",
    "run_timeout": "let the cluster end the run; it saves, and resumes when started again.",
    "scheduled_gc": _REMOVE,
}
REFUSED_LOGGERS: dict[str, str] = {
    "mosaicml": "it belongs to a vendor's platform. Remove it; metrics.jsonl is always written.",
}
# Arguments that the builder supplies, by class.
GIVEN: dict[str, tuple[str, ...]] = {
    "mptfoundry.callbacks.samples:Generate": ("generate",),
    "mptfoundry.callbacks.hf_export:HFExport": ("write", "run_folder", "names"),
    "mptfoundry.callbacks.tensorboard:TensorBoardFile": ("run_folder",),
}
# Additional optional arguments that the builder accepts, by class, with their types.
EXTRA: dict[str, dict[str, type]] = {
    "mptfoundry.callbacks.samples:Generate": {
        "max_new_tokens": int,
        "temperature": float,
        "top_k": int,
        "top_p": float,
        "seed": int,
    },
}
# Types that are narrower than their annotations, by class.
NARROWED: dict[str, dict[str, Any]] = {
    CALLBACKS["hf_checkpointer"]: {"precision": Literal["float32", "float16", "bfloat16"]},
}


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The classes that a section such as `callbacks` can name.

    Attributes:
        words: The section's contents, in words.
        known: Each class's import path, or one of the user's own, by its name in the configuration.
        refused: llm-foundry's names that are not supported here, and why.
        supplied: How many first arguments of a user's own function the caller supplies.
    """

    words: str
    known: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    supplied: int = 0

    def section(self, name: str) -> type:
        """A dataclass with the arguments of the class of this name. LookupError as for `described`."""
        where = self.known[name]
        if isinstance(where, str):
            return described(name, where)
        return own_section(name, where, supplied=0 if inspect.isclass(where) else self.supplied)


class OfSignature(Section):
    """The base of sections that are made of a signature, not written as a dataclass."""


@dataclass(frozen=True, eq=False)
class Own:
    """The user's own classes and functions as alternatives of a section, each selected by its `name`.

    Attributes:
        words: The alternatives, in words.
        table: The classes and functions by name; the user's files write into it.
        base: The section with the keys that all of them have.
        supplied: How many first arguments the builder supplies, or the names of those that it supplies.
    """

    words: str
    table: Mapping[str, Any]
    base: type
    supplied: int | tuple[str, ...] = 0

    def alternatives(self) -> list[type]:
        """A section for each name."""
        return [own_section(*item, self.base, self.supplied) for item in self.table.items()]

    def unchecked(self, value: Mapping[str, Any]) -> type:
        """A section that takes all keys of `value`, for a name that only code knows which was not run."""
        keys = {key for key in value if not belongs_to(self.base, key)}
        types = [("name", Literal[value["name"]]), *((key, Any) for key in sorted(keys))]
        bases = (self.base, OfSignature)
        return make_dataclass(value["name"], types, bases=bases, kw_only=True, frozen=True)


@cache
def described(name: str, where: str) -> type:
    """A dataclass `name` with the arguments that `module:Class` takes from a configuration.

    A field's default is the argument's default as source text.

    Raises:
        LookupError: The package is not installed, or has no such class.
    """
    arguments = []
    for argument, annotation, default in _constructor_arguments(_class_of(where)):
        if argument not in GIVEN.get(where, ()):
            type_ = NARROWED.get(where, {}).get(argument) or _type_of(annotation)
            with_default = () if default is None else (field(default=ast.unparse(default)),)
            arguments.append((argument, type_, *with_default))
    arguments += [(key, type_, field(default="None")) for key, type_ in EXTRA.get(where, {}).items()]
    return make_dataclass(name, arguments, bases=(OfSignature,), kw_only=True)


@cache
def own_section(
    name: str, own: Callable[..., Any], base: type | None = None, supplied: int | tuple[str, ...] = 0
) -> type:
    """A dataclass `name` with the arguments of a user's own class or function, and the keys of `base`.

    A field's default is the argument's own if YAML can write it, else None.
    """
    arguments: list[Any] = [] if base is None else [("name", Literal[name])]
    for each in own_parameters(own, supplied):
        if base is not None and belongs_to(base, each.name):
            continue
        text = (
            each.annotation if isinstance(each.annotation, str) else inspect.formatannotation(each.annotation)
        )
        annotation = None if each.annotation is each.empty else ast.parse(text, mode="eval").body
        type_, default = _type_of(annotation), each.default
        if default is each.empty:
            arguments.append((each.name, type_))
        else:
            plain = default if _is_plain(default) else None
            plain = list(plain) if isinstance(plain, tuple) else plain
            arguments.append((each.name, type_, field(default_factory=partial(deepcopy, plain))))
    bases = (OfSignature,) if base is None else (base, OfSignature)
    return make_dataclass(name, arguments, bases=bases, kw_only=True, frozen=True)


def belongs_to(base: type, key: str) -> bool:
    """Whether a key of an own section is one that all of them have, or a name that their code uses."""
    return key in {f.name for f in fields(base)} or hasattr(base, key)


def with_own_keys(section: type, table: Mapping[str, Any]) -> type:
    """A section with a further key for each of the user's own classes: its arguments as a section."""
    return _with_keys(section, tuple(table.items())) if table else section


@cache
def _with_keys(section: type, own: tuple[tuple[str, Any], ...]) -> type:
    keys = [(name, own_section(name, each) | None, field(default=None)) for name, each in own]
    return make_dataclass(section.__name__, keys, bases=(section,), kw_only=True, frozen=True)


def own_arguments(section: Any, base: type | None = None) -> dict[str, Any]:
    """The arguments that a section of `own_section` passes on: those that differ from their defaults."""
    known = {f.name for f in fields(base)} if base is not None else set()
    return {
        f.name: getattr(section, f.name)
        for f in fields(section)
        if f.name not in known and getattr(section, f.name) != default_of(f)
    }


def own_parameters(own: Any, supplied: int | tuple[str, ...] = 0) -> Iterator[inspect.Parameter]:
    """The arguments of a class or function without those that the builder supplies; `**kwargs` of a class
    stands for those of its base class.
    """
    first, said = (supplied, set()) if isinstance(supplied, int) else (0, set(supplied))
    makers = (
        [vars(cls)["__init__"] for cls in own.__mro__ if "__init__" in vars(cls)]
        if inspect.isclass(own)
        else [own]
    )
    for maker in makers:
        parameters = list(inspect.signature(maker).parameters.values())[first + inspect.isclass(own) :]
        for each in parameters:
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in said:
                said.add(each.name)
                yield each
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            return


def _is_plain(value: Any) -> bool:
    """Whether YAML can write a value so that it is read as the same one."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value is None or (type(value) in (bool, int, float, str) and is_finite)


@cache
def sentence_of(where: str) -> str:
    """The first sentence of a class's docstring, as plain text.

    Raises:
        LookupError: The package is not installed, or has no such class.
    """
    said = ast.get_docstring(_class_of(where))
    if said is None:  # it may be built at import time; its module's docstring says the same
        said = ast.get_docstring(ast.parse(_source_of(where.partition(":")[0]).read_text(encoding="utf-8")))
    text = (said or "").split("\n\n")[0]
    text = re.sub(r"`([^`<]+?)\s*<[^>]*>`_*", r"\1", " ".join(text.split()))
    text = re.sub(r":\w+:`[~.]?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "`")
    return re.split(r"(?<=[.!?])\s", text)[0]


def _class_of(where: str) -> ast.ClassDef:
    module, _, name = where.partition(":")
    for node in ast.parse(_source_of(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no class {name}")


def _source_of(module: str) -> Path:
    package, *parts = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"the package {package} is not installed")
    file = Path(spec.submodule_search_locations[0], *parts).with_suffix(".py")
    if not file.exists():
        raise LookupError(f"the installed {package} has no {module}")
    return file


def _constructor_arguments(node: ast.ClassDef) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of each argument."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments, positional = item.args, item.args.args[1:]
            required = [None] * (len(positional) - len(arguments.defaults))
            defaults = [*required, *arguments.defaults, *arguments.kw_defaults]
            pairs = zip([*positional, *arguments.kwonlyargs], defaults, strict=True)
            return [(each.arg, each.annotation, default) for each, default in pairs]
    return []


def _in_words(words: str, type_: Any) -> Any:
    """A type with its own description in errors."""
    return Annotated[type_, Form(words, lambda value: None)]


_PLAIN: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "Path": str,
    "None": type(None),
    **dict.fromkeys(("list", "List", "Sequence", "tuple", "Tuple"), list[Any]),
    **dict.fromkeys(("dict", "Dict"), dict[str, Any]),
    "Time": _in_words("a duration", int | str),
}


def _type_of(annotation: ast.expr | None) -> Any:
    """The type of an annotation, without alternatives that a configuration can't express."""
    if annotation is None:
        return Any
    name = _name(annotation)
    if isinstance(annotation, ast.BinOp) or name in ("Optional", "Union"):
        types = [
            _type_of(each) for each in _alternatives(annotation) if _name(each) not in ("Callable", "Tensor")
        ]
        if set(types) <= {type(None)}:
            return Literal[None]
        # Text also accepts numbers, as written.
        return reduce(or_, sorted(types, key=lambda type_: type_ not in (int, float, bool)))
    if isinstance(annotation, ast.Subscript) and name == "Literal":
        return Literal[ast.literal_eval(annotation.slice)]
    if isinstance(annotation, ast.Subscript) and name in ("list", "List", "Sequence"):
        return list[_type_of(annotation.slice)]  # type: ignore[misc]
    return _PLAIN.get(name, Any if name == "Any" else _in_words(name, Any))


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _alternatives(annotation.left) + _alternatives(annotation.right)
    if isinstance(annotation, ast.Subscript) and _name(annotation) in ("Optional", "Union"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        none: list[ast.expr] = [ast.Constant(None)] if _name(annotation) == "Optional" else []
        return [*(each for item in inner for each in _alternatives(item)), *none]
    return [annotation]


def _name(annotation: ast.expr) -> str:
    node = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return ast.unparse(node).rpartition(".")[2]
