"""`mptfoundry VERB ...`: the command line, which `scripts/` also uses for the `composer` launcher."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mptfoundry import __version__
from mptfoundry.commands import CTRL_C_EXIT_CODE, STOPPED_BY_CTRL_C, VERBS, Verb
from mptfoundry.errors import ConfigError, MPTFoundryError, RunStopped
from mptfoundry.ranks import announce_failure, connect, rank, report, world_size
from mptfoundry.run.signals import lasting_output

# Modules that all installations have; if one is missing, the error has the command that installs them.
REQUIRED = {"omegaconf", "yaml", "torch", "composer", "streaming", "transformers", "tokenizers", "datasets"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (data, checkpoint ...), 2 (config), 3 (a comparison found a
    model worse), 130 (Ctrl-C), or 143 if training was asked to stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        return _unknown_verb(words[0])
    if not words or any(word.startswith("-") for word in words):  # options such as --help
        words = _parsed(words)
    if "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])  # torchrun calls it GROUP_RANK
    # Training continues when its terminal, or the reader of its output, goes away.
    with lasting_output() if words[0] == "train" else nullcontext():
        return _run(VERBS[words[0]], words[1:])


def _parsed(words: list[str]) -> list[str]:
    """The verb and its words, after options such as `--help`, which end the process."""
    # Accept the usual form of the flag; a verb's own parser only knows `key=value`.
    words = ["clean=true" if word == "--clean" and words[0] == "doctor" else word for word in words]
    arguments = _parser(words).parse_args(words)
    return [arguments.verb, *arguments.words]


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
    if world_size() > 1:
        _leave_signals()
    return 0


def _exit_code(error: BaseException) -> int:
    """Print an error that is written for the user, and return its exit code; raise any other again."""
    if isinstance(error, KeyboardInterrupt):
        print(STOPPED_BY_CTRL_C, file=sys.stderr)
        return CTRL_C_EXIT_CODE
    if world_size() > 1:
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
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


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
    from mptfoundry.explain import options_of

    classes = [getattr(verbs, name) for name in verb.options]
    heads = [f" ({cls.__doc__.splitlines()[0]})" if len(classes) > 1 else "" for cls in classes]
    return "".join(
        f"\n\nOptions{head}, each as key=value:\n{options_of(cls)}"
        for head, cls in zip(heads, classes, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
