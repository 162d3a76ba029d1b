"""What each verb of the command line does with its words.

A verb takes positional arguments first, then `key=value`. Each verb imports what it needs when it runs, so
that `--help` and `check` start fast.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptfoundry.errors import ConfigError, MPTFoundryError, RunStopped
from mptfoundry.ranks import local_rank, rank
from mptfoundry.run.signals import heeded, importing

if TYPE_CHECKING:
    from mptfoundry.config.run import TrainConfig
    from mptfoundry.config.tasks import TaskConfig
    from mptfoundry.config.verbs import EvalConfig, TextConfig

STOPPED_WHILE_STARTING = "{name}: stopped while starting; nothing had to be saved."
STOPPED_BY_CTRL_C = "stopped by Ctrl-C"
CTRL_C_EXIT_CODE = 130
OF_OWN_CODE = ("code_paths", "allow_code")
KEY = re.compile(r"[A-Za-z_][\w.\[\]-]*=")


def _importing() -> AbstractContextManager[None]:
    """Let Ctrl-C end the process at once while heavy libraries are imported."""
    return importing([signal.SIGINT], STOPPED_BY_CTRL_C, CTRL_C_EXIT_CODE)


def _train(words: list[str]) -> None:
    for number in heeded():
        signal.signal(number, _stop_while_starting)
    stopped = STOPPED_WHILE_STARTING if rank() == 0 else ""
    with importing(heeded(), stopped, RunStopped.exit_code):  # the user's files may import torch
        config = _load_config(words)
    plan = None
    if local_rank() == 0:
        from mptfoundry.check import refuse_here

        plan = refuse_here(config)
    with importing(heeded(), stopped, RunStopped.exit_code):
        from mptfoundry.train import train

    train(config, plan)


def _stop_while_starting(number: int, frame: Any) -> None:
    raise RunStopped(STOPPED_WHILE_STARTING.format(name=signal.Signals(number).name))


def _check(words: list[str]) -> None:
    from mptfoundry.config.load import kind_of, parse_words, tasks_of
    from mptfoundry.config.tasks import TaskFileConfig
    from mptfoundry.config.verbs import CheckConfig

    absent: dict[str, str] = {}
    kind = kind_of(words[0]) if words else "run"
    if kind == "tasks":
        print(_tasks_line(parse_words(words[1:], TaskFileConfig, words[0]).icl_tasks))
        return
    if kind == "evaluation":
        for name, each in _load_evaluations(words, absent).items():
            public = f"; {', '.join(each.public_tasks)} of lm-eval" if each.tasks else ""
            print(f"{name}: {each.model}; {_tasks_line(tasks_of(each)[0])}{public}")
        for key, text in absent.items():
            print(f"here: {key}: {text.rstrip('.')}; eval refuses this here")
        return
    own, words = _own_words(words, CheckConfig)
    options = _options(own, "CheckConfig")
    config = _load_config(words, absent)
    from mptfoundry.check import check_on
    from mptfoundry.plan.devices import cluster_device

    device = options.gpu and cluster_device(options.gpu, options.gpus, options.gpus_per_node)
    checked = check_on(config, device or None, absent)
    print(checked.text)
    if options.here and checked.lacking:
        raise MPTFoundryError("here=true: train can't start here; see the lines that begin with here.")


def _plan(words: list[str]) -> None:
    from mptfoundry.config.verbs import PlanConfig

    own, words = _own_words(words, PlanConfig)
    lists = [re.sub(r"^(gpus?|dollars_per_gpu_hour)=([^\[].*)$", r"\1=[\2]", word) for word in own]
    options = _options(lists, "PlanConfig")
    absent: dict[str, str] = {}
    config = _load_config(words, absent)
    from mptfoundry.cluster_plan import plan_clusters

    print(plan_clusters(config, options, absent))


def _launch(words: list[str]) -> None:
    from mptfoundry.config.verbs import LaunchConfig

    lists = [re.sub(r"^(mounts|modules|sbatch)=([^\[].*)$", r"\1=[\2]", word) for word in words[1:]]
    own, of_config = _own_words(lists, LaunchConfig)
    options = _options([*words[:1], *own], "LaunchConfig", "scheduler")
    config = _load_config(of_config, {})
    from mptfoundry.launch import launch

    print(launch(config, of_config, options))


def _tasks_line(tasks: Sequence[TaskConfig]) -> str:
    labels = (f"{task.label} {list(task.shots)}" for task in tasks)
    return f"{len(tasks)} tasks with their numbers of examples: {', '.join(labels)}" if tasks else "no tasks"


def _eval(words: list[str]) -> None:
    from mptfoundry.config.load import CONFIG_SUFFIXES

    if words and words[0].endswith(CONFIG_SUFFIXES):
        evaluations = _load_evaluations(words)
    else:
        evaluations = {"": _options(words, "EvalConfig", "model")}
        _refuse_missing_packages(evaluations.values())
    _refuse_unsupported_gpu()
    with _importing():
        from mptfoundry.evaluate import evaluate, results_table

    for name, options in evaluations.items():
        results = evaluate(options)
        if rank() == 0:
            print(f"{name}\n{results_table(results)}\n" if name else results_table(results))


def _own_words(words: list[str], options: type) -> tuple[list[str], list[str]]:
    """Separate the `key=value` of a verb's own options from the config's."""
    from mptfoundry.config.engine.schema import field_types

    known = field_types(options)
    own = [word for word in words if KEY.match(word) and re.split(r"[=.\[]", word)[0] in known]
    return own, [word for word in words if word not in own]


def _load_evaluations(words: list[str], absent: dict[str, str] | None = None) -> dict[str, EvalConfig]:
    """Read an evaluation file; its notes are printed."""
    from mptfoundry.config.load import load_evaluations

    evaluations, notes = load_evaluations(words[0], words[1:], absent)
    if rank() == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    _refuse_missing_packages(evaluations.values())
    return evaluations


def _refuse_missing_packages(evaluations: Iterable[EvalConfig]) -> None:
    from mptfoundry.plan.packages import refuse_missing_packages

    for options in evaluations:
        refuse_missing_packages(options)


def _prepare(words: list[str]) -> None:
    options = _options(words, "PrepareConfig", rest="inputs")
    with _importing():
        from mptfoundry.data.prepare.prepare import prepare_shards

    print(prepare_shards(options))


def _tokenizer(words: list[str]) -> None:
    action, *words = words or [""]
    if action == "train":
        options = _options(words, "TokenizerTrainConfig", rest="inputs")
    elif action == "compare":
        options = _options(words, "TokenizerCompareConfig", "first", "second", rest="text")
    else:
        raise ConfigError("tokenizer: say train or compare, as `mptfoundry tokenizer --help` shows.")
    with _importing():
        from mptfoundry.vocabulary import compare_tokenizers, train_tokenizer

    print(train_tokenizer(options) if action == "train" else compare_tokenizers(options))


def _preview(words: list[str]) -> None:
    from mptfoundry.config.engine.schema import field_types
    from mptfoundry.config.load import CONFIG_SUFFIXES
    from mptfoundry.config.verbs import PreviewConfig

    known = field_types(PreviewConfig)
    own = [word for word in words if not KEY.match(word) or word.partition("=")[0] in known]
    options = _options(own, "PreviewConfig", "data")
    overrides = [word for word in words if word not in own]
    if overrides and not options.data.endswith(CONFIG_SUFFIXES):
        _options(words, "PreviewConfig", "data")
    with _importing():
        from mptfoundry.preview import RunWouldEnd, preview

    try:
        print(preview(options, overrides))
    except RunWouldEnd as error:
        print(error.text)
        raise


def _compare(words: list[str]) -> None:
    from mptfoundry.compare.compare import compare
    from mptfoundry.errors import Worse

    options = _options(words, "CompareConfig", rest="places")
    comparison = compare(options)
    print(comparison.text)
    if options.fail_if == "worse" and comparison.worse:
        raise Worse(f"significantly worse than {options.places[0]}: {'; '.join(comparison.worse)}.")


def _export(words: list[str]) -> None:
    options = _options(words, "ExportConfig", "model", "out")
    with _importing():
        from mptfoundry.export.folder import export

    print(export(**{key: value for key, value in vars(options).items() if key not in OF_OWN_CODE}))


def _import(words: list[str]) -> None:
    options = _options(words, "ImportConfig", "source", "out")
    with _importing():
        from mptfoundry.export.importing import import_model

    print(import_model(**vars(options)))


def _generate(words: list[str]) -> None:
    options = _options(words, "GenerateConfig", "model", rest="prompts")
    if not options.prompts:
        raise ConfigError(
            'prompts: none is given. Say what to continue: mptfoundry generate MODEL "Once upon".'
        )
    _refuse_unsupported_gpu()
    with _importing():
        from mptfoundry.generation import generate_text

    prompts = [_text_of(prompt) for prompt in options.prompts]
    network, tokenizer = _load_network(options)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        generate_text(network, tokenizer, prompts, **_how(options), stream=_print_piece)
        print()
        return
    texts = generate_text(network, tokenizer, prompts, **_how(options))
    print("\n\n".join(f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)))


def _text_of(prompt: str) -> str:
    """Return the prompt, or the content of the file that it names."""
    if not prompt.startswith("file::"):
        return prompt
    try:
        return Path(prompt.removeprefix("file::")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {prompt} can't be read ({error}).") from error


def _print_piece(row: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _chat(words: list[str]) -> None:
    options = _options(words, "ChatConfig", "model")
    _refuse_unsupported_gpu()
    with _importing():
        from mptfoundry.generation import chat

    network, tokenizer = _load_network(options)
    chat(network, tokenizer, system=options.system, **_how(options))


def _explain(words: list[str]) -> None:
    from mptfoundry.explain import explain

    if len(words) > 1:
        raise ConfigError(f"explain: takes one key, but was given {len(words)}.")
    print(explain(words[0] if words else None))


def _completion(words: list[str]) -> None:
    from mptfoundry.completion import SHELLS, completion
    from mptfoundry.config import verbs
    from mptfoundry.config.run import TrainConfig

    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"completion: name one shell of {', '.join(SHELLS)}.")
    options: dict[str, list[type]] = {}
    for name, verb in VERBS.items():
        options[name] = [getattr(verbs, each) for each in verb.options]
        options[name] += [TrainConfig] if "CONFIG" in verb.words else []
    print(completion(words[0], options), end="")


def _doctor(words: list[str]) -> None:
    options = _options(words, "DoctorConfig")
    if options.cluster:
        with _importing():
            from mptfoundry.cluster_health import cluster_health

        table = cluster_health()
        if rank() == 0:
            print(table)
        return
    with _importing():
        from mptfoundry.doctor import clean, doctor, environment, troubles
        from mptfoundry.plan.install_sets import install_command

    if options.clean:
        print(clean())
        return
    if options.install:
        print(install_command(options.install))
        return
    if options.env:
        print(environment())
        return
    print(doctor())
    if troubles():
        raise MPTFoundryError("something that training needs is missing here; see above.")


def _refuse_unsupported_gpu() -> None:
    """Refuse a GPU that the installed torch can't compute on, before torch is imported."""
    from mptfoundry.plan.devices import detect_device
    from mptfoundry.plan.gpu_support import refuse_unsupported

    if local_rank() == 0:
        refuse_unsupported(detect_device())


def _load_network(options: TextConfig) -> tuple[Any, Any]:
    """Load the network in the requested dtype, on the GPU if there is one, and its tokenizer."""
    with _importing():
        import torch

        from mptfoundry.checkpoints.reading import load_network
        from mptfoundry.export.shards import DTYPES
        from mptfoundry.tokenizer import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = DTYPES.get(options.dtype, torch.bfloat16 if has_bf16 else torch.float32)
    network, tokenizer = load_network(
        options.model,
        base=options.base,
        device=device,
        dtype=dtype,
        attn_impl=options.attn_impl,
        verify=options.verify,
    )
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {options.model} has none. Name the one it was trained with.")
    return network, tokenizer


def _how(options: TextConfig) -> dict[str, Any]:
    return {"max_new_tokens": options.max_new_tokens, "sampling": options, "stop": options.stop}


def _load_config(words: list[str], absent: dict[str, str] | None = None) -> TrainConfig:
    from mptfoundry.config.load import load_train_config

    if not words or "=" in words[0]:
        raise ConfigError("no config named. Say which YAML file describes the run, before any key=value.")
    config, notes = load_train_config(words[0], words[1:], absent)
    if rank() == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return config


def _options(words: list[str], schema: str, *names: str, rest: str | None = None) -> Any:
    """Parse a verb's arguments: leading ones without `key=` are assigned to `names`, further ones to `rest`.

    With the names `model` and `out`, `runs/a hf/a dtype=fp32` means `model=runs/a out=hf/a dtype=fp32`.
    """
    from mptfoundry.config import verbs
    from mptfoundry.config.load import parse_words

    bare = [word for word in words if not KEY.match(word)]
    named = [f"{name}={json.dumps(word)}" for name, word in zip(names, bare, strict=False)]
    left = bare[len(names) :]
    if left and rest:
        named.append(f"{rest}={json.dumps(left)}")
    elif left:
        raise ConfigError(f"{left[0]}: is not key=value. Put = between a key and its value.")
    return parse_words([*named, *(word for word in words if KEY.match(word))], getattr(verbs, schema))


@dataclass(frozen=True)
class Verb:
    """What a verb does, its arguments, an example, and the classes of its options in config/verbs.py."""

    run: Callable[[list[str]], None]
    does: str
    words: str
    example: str
    options: tuple[str, ...] = ()


VERBS = {
    "train": Verb(
        _train,
        "train a model",
        "CONFIG [key=value ...]",
        "composer scripts/train.py configs/mpt-125m.yaml max_duration=100ba",
    ),
    "check": Verb(
        _check,
        "check a config and show what its run would be, without starting it",
        "CONFIG [gpu=NAME gpus=N] [here=true] [key=value ...]",
        "mptfoundry check configs/mpt-7b.yaml gpu=h100 gpus=64 optimizer.lr=1e-4",
        ("CheckConfig",),
    ),
    "plan": Verb(
        _plan,
        "estimate time, memory and cost of a run on clusters",
        "CONFIG gpus=N,... gpu=NAME,... [key=value ...]",
        "mptfoundry plan configs/mpt-7b.yaml gpus=8,55,440 gpu=a100-40gb,h100 dollars_per_gpu_hour=1.5,2.5",
        ("PlanConfig",),
    ),
    "launch": Verb(
        _launch,
        "write a script or manifest that starts a run on a cluster",
        "slurm|kubernetes|skypilot CONFIG nodes=N gpu=NAME [key=value ...]",
        "mptfoundry launch slurm configs/mpt-7b.yaml nodes=55 gpu=a100-40gb partition=gpu",
        ("LaunchConfig",),
    ),
    "explain": Verb(
        _explain,
        "say what a key of a config means",
        "[KEY]",
        "mptfoundry explain model.attn_config.alibi",
    ),
    "prepare": Verb(
        _prepare,
        "turn text into shards of tokens",
        "INPUT ... out=FOLDER tokenizer=NAME max_seq_len=N [key=value ...]",
        "mptfoundry prepare my-text/ out=shards tokenizer=EleutherAI/gpt-neox-20b max_seq_len=2048",
        ("PrepareConfig",),
    ),
    "tokenizer": Verb(
        _tokenizer,
        "train a tokenizer on your text, or compare two by bytes per token",
        "train INPUT ... out=FOLDER vocab_size=N [key=value ...] | compare A B TEXT ... [key=value ...]",
        "mptfoundry tokenizer train my-text/ out=tokenizers/mine vocab_size=32000",
        ("TokenizerTrainConfig", "TokenizerCompareConfig"),
    ),
    "preview": Verb(
        _preview,
        "show samples of a data set as text, and which tokens count in the loss",
        "SHARDS_OR_CONFIG [key=value ...]",
        "mptfoundry preview shards samples=5",
        ("PreviewConfig",),
    ),
    "eval": Verb(
        _eval,
        "evaluate a run, a checkpoint or an exported folder on held-out text",
        "MODEL_OR_YAML [key=value ...]",
        "composer scripts/eval.py runs/mpt-125m",
        ("EvalConfig",),
    ),
    "compare": Verb(
        _compare,
        "compare runs, or evaluations document by document",
        "A B ... [key=value ...]",
        "mptfoundry compare runs/lr-1e-3 runs/lr-2e-3 picture=losses.png",
        ("CompareConfig",),
    ),
    "export": Verb(
        _export,
        "write a model as a Hugging Face folder",
        "RUN_OR_CHECKPOINT OUT [key=value ...]",
        "mptfoundry export runs/mpt-125m hf/mpt-125m dtype=bf16",
        ("ExportConfig",),
    ),
    "import": Verb(
        _import,
        "write another project's model, or llm-foundry's checkpoint, as a Hugging Face folder to start from",
        "SOURCE OUT [key=value ...]",
        "mptfoundry import mosaicml/mpt-7b hf/mpt-7b",
        ("ImportConfig",),
    ),
    "generate": Verb(
        _generate,
        "continue a text",
        "MODEL PROMPT ... [key=value ...]",
        "mptfoundry generate hf/mpt-125m 'Once upon a time' temperature=0.7",
        ("GenerateConfig",),
    ),
    "chat": Verb(
        _chat,
        "talk with a model",
        "MODEL [key=value ...]",
        "mptfoundry chat hf/mpt-7b-chat",
        ("ChatConfig",),
    ),
    "doctor": Verb(
        _doctor,
        "show what works on this machine, and why the rest does not",
        "[clean=true | install=SET | env=true | cluster=true]",
        "mptfoundry doctor",
        ("DoctorConfig",),
    ),
    "completion": Verb(
        _completion,
        "print a script that completes verbs, keys and choices in your shell",
        "bash | zsh | fish",
        'eval "$(mptfoundry completion bash)"',
    ),
}
