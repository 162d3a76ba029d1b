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
    """Run one verb and return the exit code: 0, 1 (data, checkpoint ...), 2 (config), 130 (Ctrl-C), or 143
    if training was asked to stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Accept the usual form of the flag; a verb's own parser only knows `key=value`.
    words = ["clean=true" if word == "--clean" and words[0] == "doctor" else word for word in words]
    arguments = _parser(words).parse_args(words)
    if "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])  # torchrun calls it GROUP_RANK
    # Training continues when its terminal, or the reader of its output, goes away.
    with lasting_output() if arguments.verb == "train" else nullcontext():
        return _run(VERBS[arguments.verb], arguments.words)


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
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        from mptfoundry.plan.install_sets import install_command, usual_set

        command = install_command(usual_set())
        error = MPTFoundryError(
            f"{error.name} is not installed. Install all that mptfoundry needs: {command}"
        )
    if not isinstance(error, MPTFoundryError):
        announce_failure(connect(), repr(error), MPTFoundryError.exit_code)
        raise error
    if os.environ.get("MPTFOUNDRY_DEBUG") == "1":
        raise error
    report(error)
    return error.exit_code


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

    kind = kind_of(words[0]) if words else "run"
    if kind == "tasks":
        print(_tasks_line(parse_words(words[1:], TaskFileConfig, words[0]).icl_tasks))
        return
    if kind == "evaluation":
        for name, options in _load_evaluations(words).items():
            public = f"; {', '.join(options.public_tasks)} of lm-eval" if options.tasks else ""
            print(f"{name}: {options.model}; {_tasks_line(tasks_of(options)[0])}{public}")
        return
    config = _load_config(words)
    from mptfoundry.check import check

    print(check(config))


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


def _load_evaluations(words: list[str]) -> dict[str, EvalConfig]:
    """Read an evaluation file; its notes are printed."""
    from mptfoundry.config.load import load_evaluations

    evaluations, notes = load_evaluations(words[0], words[1:])
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


def _doctor(words: list[str]) -> None:
    options = _options(words, "DoctorConfig")
    with _importing():
        from mptfoundry.doctor import clean, doctor, troubles
        from mptfoundry.plan.install_sets import install_command

    if options.clean:
        print(clean())
        return
    if options.install:
        print(install_command(options.install))
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
    """What a verb does, its arguments, an example, and the class of its options in config/verbs.py."""

    run: Callable[[list[str]], None]
    does: str
    words: str
    example: str
    options: str | None = None


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
        "CONFIG [key=value ...]",
        "mptfoundry check configs/mpt-7b.yaml optimizer.lr=1e-4",
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
        "PrepareConfig",
    ),
    "preview": Verb(
        _preview,
        "show samples of a data set as text, and which tokens count in the loss",
        "SHARDS_OR_CONFIG [key=value ...]",
        "mptfoundry preview shards samples=5",
        "PreviewConfig",
    ),
    "eval": Verb(
        _eval,
        "evaluate a run, a checkpoint or an exported folder on held-out text",
        "MODEL_OR_YAML [key=value ...]",
        "composer scripts/eval.py runs/mpt-125m",
        "EvalConfig",
    ),
    "export": Verb(
        _export,
        "write a model as a Hugging Face folder",
        "RUN_OR_CHECKPOINT OUT [key=value ...]",
        "mptfoundry export runs/mpt-125m hf/mpt-125m dtype=bf16",
        "ExportConfig",
    ),
    "import": Verb(
        _import,
        "write another project's model, or llm-foundry's checkpoint, as a Hugging Face folder to start from",
        "SOURCE OUT [key=value ...]",
        "mptfoundry import mosaicml/mpt-7b hf/mpt-7b",
        "ImportConfig",
    ),
    "generate": Verb(
        _generate,
        "continue a text",
        "MODEL PROMPT ... [key=value ...]",
        "mptfoundry generate hf/mpt-125m 'Once upon a time' temperature=0.7",
        "GenerateConfig",
    ),
    "chat": Verb(
        _chat,
        "talk with a model",
        "MODEL [key=value ...]",
        "mptfoundry chat hf/mpt-7b-chat",
        "ChatConfig",
    ),
    "doctor": Verb(
        _doctor,
        "show what works on this machine, and why the rest does not",
        "[clean=true | install=SET]",
        "mptfoundry doctor",
        "DoctorConfig",
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
    if verb.options is None:
        return ""
    from mptfoundry.config import verbs
    from mptfoundry.config.explain import options_of

    return f"\n\nOptions, each as key=value:\n{options_of(getattr(verbs, verb.options))}"


def _load_config(words: list[str]) -> TrainConfig:
    from mptfoundry.config.load import load_train_config

    if not words or "=" in words[0]:
        raise ConfigError("no config named. Say which YAML file describes the run, before any key=value.")
    config, notes = load_train_config(words[0], words[1:])
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
