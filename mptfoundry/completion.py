"""Completion of the `mptfoundry` command in a shell: verbs, then keys, choices and files.

`mptfoundry completion bash` prints a script. It is written from the classes of the options and of a run's
config, so it knows what this version knows; nothing is started while somebody types.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args, get_origin

from mptfoundry.config.engine.schema import choice, field_types, members, walk_keys
from mptfoundry.config.run import TrainConfig

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# Load with: eval "$(mptfoundry completion bash)"
_mptfoundry() {{
    local before="${{COMP_LINE:0:COMP_POINT}}" verb="${{COMP_WORDS[1]}}" word words
    word="${{before##* }}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {verbs} -- "$word"))
        return
    fi
    case "$verb" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "$word" in  # bash completes only what follows the =
        *=*) COMPREPLY=("${{COMPREPLY[@]#*=}}") ;;
        *) COMPREPLY+=($(compgen -f -- "$word")) ;;
    esac
    case "${{COMPREPLY[0]}}" in
        *=) compopt -o nospace ;;
    esac
}}
complete -o filenames -F _mptfoundry mptfoundry
"""

_ZSH = """\
#compdef mptfoundry
# Load with: eval "$(mptfoundry completion zsh)"
_mptfoundry() {{
    local -a words_of
    if (( CURRENT == 2 )); then
        compadd -- {verbs}
        return
    fi
    case "$words[2]" in
{cases}
    esac
    compadd -S '' -M 'r:|[._]=*' -- $words_of
    _files
}}
compdef _mptfoundry mptfoundry
"""

_FISH = """\
# Load with: mptfoundry completion fish | source
complete -c mptfoundry -n __fish_use_subcommand -f -a {verbs}
{cases}
"""


def completion(shell: str, verbs: Mapping[str, Sequence[type]]) -> str:
    """Return the script for a shell, one of SHELLS.

    Args:
        shell: The shell.
        verbs: Each verb with the classes of its options; TrainConfig if it takes a run's config.
    """
    names = shlex.quote(" ".join(verbs))
    of_options: dict[tuple[type, ...], list[str]] = {}
    for verb, options in verbs.items():
        of_options.setdefault(tuple(options), []).append(verb)
    words = {tuple(some): " ".join(_words(options)) for options, some in of_options.items()}
    if shell == "bash":
        cases = [f"        {'|'.join(some)}) words={shlex.quote(each)} ;;" for some, each in words.items()]
        return _BASH.format(verbs=names, cases="\n".join(cases))
    if shell == "zsh":
        cases = [f"        {'|'.join(some)}) words_of=({each}) ;;" for some, each in words.items()]
        return _ZSH.format(verbs=" ".join(verbs), cases="\n".join(cases))
    cases = [
        f"complete -c mptfoundry -n '__fish_seen_subcommand_from {' '.join(some)}' -a {shlex.quote(each)}"
        for some, each in words.items()
    ]
    return _FISH.format(verbs=names, cases="\n".join(cases))


def _words(options: Sequence[type]) -> list[str]:
    """`key=` for each key that can be typed, or `key=value` for each choice."""
    words: dict[str, None] = {}
    for schema in options:
        for path, cls, name in walk_keys(schema):
            if "[N]" in path or "*" in path or (schema is not TrainConfig and "." in path):
                continue
            values = sorted(set(_choices(field_types(cls)[name])))
            words |= dict.fromkeys(f"{path}={value}" for value in values or [""])
    return list(words)


def _choices(annotation: object) -> Iterator[str]:
    for member in members(annotation):
        if get_origin(member) is Literal:
            yield from map(choice, get_args(member))
        elif member is bool:
            yield from ("true", "false")
