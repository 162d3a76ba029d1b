"""`mptfoundry VERB ...`: the command line, which `scripts/` also uses for the `composer` launcher.

A verb takes positional arguments first, then `key=value`. Each verb imports what it needs when it runs,
so that `--help` and `check` start fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptfoundry import __version__
from mptfoundry.errors import ConfigError, MPTFoundryError, RunStopped
from mptfoundry.ranks import announce_failure, connect, local_rank, rank, report, world_size
from mptfoundry.run.signals import ending_at_once, heeded, lasting_output

if TYPE_CHECKING:
    from mptfoundry.config.run import TrainConfig
    from mptfoundry.config.tasks import TaskConfig
    from mptfoundry.config.verbs import EvalConfig, TextConfig

STOPPED_WHILE_STARTING = "{name}: stopped while starting; nothing had to be saved."
STOPPED_BY_CTRL_C = "stopped by Ctrl-C"
CTRL_C_EXIT_CODE = 130
# Modules that all installations have; if one is missing, the error has the command that installs them.
REQUIRED = {"omegaconf", "yaml", "torch", "composer", "streaming", "transformers", "tokenizers", "datasets"}
KEY = re.compile(r"[A-Za-z_][\w.\[\]-]*=")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (data, checkpoint ...), 2 (config), 3 (a comparison found a
    model worse), 130 (Ctrl-C), or 143 if training was asked to stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Accept the usual form of the flag; a verb's own parser only knows `key=value`.
    words = ["clean=true" if word == "--clean" and words[0] == "doctor" else word for word in words]
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        return _unknown_verb(words[0])
    arguments = _parser(words).parse_args(words)
    if "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])  # torchrun calls it GROUP_RANK
    # Training continues when its terminal, or the reader of its output, goes away.
    with lasting_output() if arguments.verb == "train" else nullcontext():
        return _run(VERBS[arguments.verb], arguments.words)


def _unknown_verb(word: str) -> int:
    from mptfoundry.config.engine.schema import did_you_mean

    hint = did_you_mean(word, VERBS)
    report(ConfigError(f"{word}: there is no such verb.{hint} `mptfoundry --help` lists them."))
    return ConfigError.exit_code


def _run(verb: Verb, words: list[str]) -> int:
    try:
        verb.run(words)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        return _exit_code(error)
    _leave_signals()
    return 0


def _exit_code(error: BaseException) -> int:
    """Print an error that is written for the user, and return its exit code; raise any other again."""
    if isinstance(error, KeyboardInterrupt):
        print(STOPPED_BY_CTRL_C, file=sys.stderr)
        return CTRL_C_EXIT_CODE
    _leave_signals()
    if isinstance(error, RunStopped):
        if rank() == 0:
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    if isinstance(error, ImportError) and os.environ.get("MPTFOUNDRY_DEBUG") != "1":
        error = _explained(error) or error
    if not isinstance(error, MPTFoundryError):
        announce_failure(connect(), repr(error), MPTFoundryError.exit_code)
        raise error
    if os.environ.get("MPTFOUNDRY_DEBUG") == "1":
        raise error
    report(error)
    return error.exit_code


def _explained(error: ImportError) -> MPTFoundryError | None:
    """The sentence for a package that is missing or can't be imported; None if the fault is in our files."""
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        trouble = f"{error.name} is not installed. Install all that mptfoundry needs"
    else:
        innermost: BaseException = error
        while (cause := innermost.__cause__ or innermost.__context__) is not None:
            innermost = cause
        package = Path(__file__).parent
        ours = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).is_relative_to(package)
        ]
        if (getattr(innermost, "name", None) or "").startswith("mptfoundry") or not ours:
            return None
        trouble = f"`{ours[-1].line}` fails here: {innermost}. Install packages that fit together"
    from mptfoundry.plan.install_sets import install_command, usual_set

    return MPTFoundryError(f"{trouble}: {install_command(usual_set())}")


def _leave_signals() -> None:
    """Ignore signals from here on: the launcher ends all ranks when one ends, and the exit code must stay."""
    if world_size() > 1:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _importing() -> AbstractContextManager[None]:
    """Let Ctrl-C end the process at once while heavy libraries are imported."""
    return ending_at_once([signal.SIGINT], STOPPED_BY_CTRL_C, CTRL_C_EXIT_CODE)


def _train(words: list[str]) -> None:
    for number in heeded():
        signal.signal(number, _stop_while_starting)
    config = _load_config(words)
    plan = None
    if local_rank() == 0:
        from mptfoundry.check import refuse_here

        plan = refuse_here(config)
    with ending_at_once(heeded(), STOPPED_WHILE_STARTING if rank() == 0 else "", RunStopped.exit_code):
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
        _refuse_missing_harness(evaluations.values())
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
    _refuse_missing_harness(evaluations.values())
    return evaluations


def _refuse_missing_harness(evaluations: Iterable[EvalConfig]) -> None:
    from mptfoundry.plan.packages import refuse_missing_harness

    for options in evaluations:
        refuse_missing_harness(options)


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

    print(export(**vars(options)))


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
    from mptfoundry.config.explain import explain

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


def _parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser of all verbs; it looks up a verb's options only if `words` ask for its help."""
    wants_help = {"-h", "--help"} & set(words)
    parser = argparse.ArgumentParser(
        prog="mptfoundry",
        description="Pretrain, finetune, evaluate and export MPT models.",
        epilog="A wrong key or value is reported with its line; MPTFOUNDRY_DEBUG=1 adds a traceback.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mptfoundry {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        options = _options_text(verb) if wants_help and name in words else ""
        sub = verbs.add_parser(
            name,
            help=verb.does,
            description=f"{verb.does[0].upper()}{verb.does[1:]}.",
            usage=f"mptfoundry {name} {verb.words}".rstrip(),
            epilog=f"Example:\n  {verb.example}{options}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser


def _options_text(verb: Verb) -> str:
    if not verb.options:
        return ""
    from mptfoundry.config import verbs
    from mptfoundry.config.explain import options_of

    classes = [getattr(verbs, name) for name in verb.options]
    heads = [f" ({cls.__doc__.splitlines()[0]})" if len(classes) > 1 else "" for cls in classes]
    return "".join(
        f"\n\nOptions{head}, each as key=value:\n{options_of(cls)}"
        for head, cls in zip(heads, classes, strict=True)
    )


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


if __name__ == "__main__":
    sys.exit(main())
