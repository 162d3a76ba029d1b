"""Other people's classes that a configuration names: where they live, and which arguments they take.

Signatures are read from the sources of the installed packages; nothing is imported. Types are checked as far
as their annotations are plain (`int`, `Optional[str]`, `list[str]`, ...); anything else is left to the class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mptfoundry.config.engine.schema import did_you_mean, show

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
ALGORITHMS: dict[str, str] = {
    "gradient_clipping": "composer.algorithms.gradient_clipping.gradient_clipping:GradientClipping",
}
_MIX = "a run has one data mix. Start a second run from load_path."
_REMOVE = "nothing here does what it does. Remove it."
# What llm-foundry has beyond Composer's, and why it is not here.
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
REFUSED_ALGORITHMS: dict[str, str] = {
    "alibi": "it does nothing to an MPT. Set model.attn_config.alibi: true.",
    "gated_linear_units": "it does nothing to an MPT. Set model.ffn_config.ffn_type: mptglu.",
    "low_precision_layernorm": "it changes the model. Set model.norm_type: low_precision_layernorm.",
}
# Arguments that the builder gives by itself, by class.
GIVEN: dict[str, tuple[str, ...]] = {
    "mptfoundry.callbacks.samples:Generate": ("generate",),
    "mptfoundry.callbacks.hf_export:HFExport": ("write", "run_folder", "names"),
    "mptfoundry.callbacks.tensorboard:TensorBoardFile": ("run_folder",),
}
# Arguments that the builder takes beside the class's own, by class, with their annotations.
EXTRA: dict[str, dict[str, str]] = {
    "mptfoundry.callbacks.samples:Generate": {
        "max_new_tokens": "int",
        "temperature": "float",
        "top_k": "int",
        "top_p": "float",
        "seed": "int",
    },
}
CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("gradient_clipping", "clipping_type"): ("norm", "value"),
    ("hf_checkpointer", "precision"): ("float32", "float16", "bfloat16"),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor.

    Attributes:
        name: The argument.
        annotation: Its type, as written in the source.
        default: Its default, as written; None if it has to be given.
    """

    name: str
    annotation: str
    default: str | None


@cache
def arguments_of(where: str) -> tuple[Argument, ...]:
    """The arguments that `module:Class` takes from a configuration, read from its source.

    Raises:
        LookupError: The package is not installed, or has no such class.
    """
    found = _constructor_arguments(_class_of(where))
    extra = [Argument(key, words, "None") for key, words in EXTRA.get(where, {}).items()]
    return tuple(a for a in found + extra if a.name not in GIVEN.get(where, ()))


@cache
def sentence_of(where: str) -> str:
    """The first sentence of what a class says of itself, as plain text.

    Raises:
        LookupError: The package is not installed, or has no such class.
    """
    said = ast.get_docstring(_class_of(where))
    if said is None:  # it may be put together when it is imported; its module says the same
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


def _constructor_arguments(node: ast.ClassDef) -> list[Argument]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            positional = item.args.args[1:]
            defaults = [None] * (len(positional) - len(item.args.defaults)) + list(item.args.defaults)
            pairs = [*zip(positional, defaults, strict=True)]
            pairs += zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True)
            return [
                Argument(
                    argument.arg,
                    ast.unparse(argument.annotation) if argument.annotation else "Any",
                    ast.unparse(default) if default is not None else None,
                )
                for argument, default in pairs
            ]
    return []


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A section that names such classes, such as `callbacks`.

    Attributes:
        words: What it holds, in words.
        known: Where each class lives, by the name in the configuration.
        refused: Names that llm-foundry knows and that are not supported here, and why.
    """

    words: str
    known: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)

    def problems(self, value: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with the section: the path below it, and the text."""
        for name, kwargs in value.items():
            if name in self.refused:
                yield (name,), f"is not supported: {self.refused[name]}"
            elif name not in self.known:
                allowed = ", ".join(sorted(self.known))
                yield (name,), f"is not known.{did_you_mean(name, self.known)} Allowed: {allowed}."
            elif not isinstance(kwargs, dict):
                text = "has no value" if kwargs is None else f"{show(kwargs)} is not allowed here"
                yield (name,), f"{text}. Expected its arguments as a section; {{}} for none."
            else:
                yield from _argument_problems(name, self.known[name], kwargs)


def _argument_problems(
    name: str, where: str, kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    try:
        arguments = {argument.name: argument for argument in arguments_of(where)}
    except LookupError as error:
        yield (name,), f"can't be checked: {error}."
        return
    for key, value in kwargs.items():
        if key not in arguments:
            allowed = ", ".join(arguments) or "no arguments"
            yield (name, key), f"unknown key.{did_you_mean(key, arguments)} {name} takes {allowed}."
        elif (choices := CHOICES.get((name, key))) and value not in choices:
            near = did_you_mean(value, choices)
            yield (name, key), f"{show(value)} is not allowed here.{near} Expected {' or '.join(choices)}."
        elif not fits(ast.parse(arguments[key].annotation, mode="eval").body, value):
            words = describe_annotation(arguments[key].annotation)
            yield (name, key), f"{show(value)} is not allowed here. Expected {words}."
    for argument in arguments.values():
        if argument.default is None and argument.name not in kwargs:
            words = describe_annotation(argument.annotation)
            yield (name, argument.name), f"is missing. Expected {words}."


_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "List": (list,),
    "Sequence": (list,),
    "tuple": (list,),
    "Tuple": (list,),
    "dict": (dict,),
    "Dict": (dict,),
    "Time": (str, int),
    "Path": (str,),
    "None": (type(None),),
}


def fits(annotation: ast.expr, value: Any) -> bool:
    """Whether a plain value can be what an annotation says; True where that can't be told."""
    if isinstance(annotation, ast.BinOp):
        return fits(annotation.left, value) or fits(annotation.right, value)
    if isinstance(annotation, ast.Constant):
        return value is None if annotation.value is None else True
    if isinstance(annotation, ast.Subscript):
        name = _name(annotation.value)
        inner = annotation.slice
        if name == "Optional":
            return value is None or fits(inner, value)
        if name == "Union" and isinstance(inner, ast.Tuple):
            return any(fits(item, value) for item in inner.elts if _name(item) != "Callable")
        if name == "Callable":
            return False
        if name in ("list", "List", "Sequence") and isinstance(value, list):
            return all(fits(inner, item) for item in value)
        return _is_plain(name, value)
    return _is_plain(_name(annotation), value)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    return ast.unparse(node).rpartition(".")[2]


def _is_plain(name: str, value: Any) -> bool:
    if name not in _PLAIN:
        return True
    if isinstance(value, bool) and name in ("int", "float", "Time"):
        return False
    return isinstance(value, _PLAIN[name])


def describe_annotation(annotation: str) -> str:
    """An annotation in words, without what a configuration can't say."""
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    words |= {"Time": "a duration", "None": "null", "Path": "text"}
    words |= dict.fromkeys(("list", "List", "Sequence", "tuple", "Tuple"), "a list")
    words |= dict.fromkeys(("dict", "Dict"), "a section of names")
    said: list[str] = []

    def collect(node: ast.expr) -> None:
        name = _name(node)
        if isinstance(node, ast.BinOp):
            collect(node.left)
            collect(node.right)
        elif isinstance(node, ast.Subscript) and name in ("Optional", "Union"):
            for item in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
                collect(item)
            if name == "Optional":
                said.append("null")
        elif name != "Callable":
            said.append(words.get(name, name))

    collect(ast.parse(annotation, mode="eval").body)
    unique = list(dict.fromkeys(said))
    return unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + " or " + unique[-1]
