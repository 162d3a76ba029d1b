"""Runs programs of this folder, each in a fork of one process that has imported what they need once.

A line of its input is JSON: a program's path, its words, and the file that it prints to. When the program has
ended, the exit code is printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

import machine

machine.pretend()

import composer  # noqa: E402, F401

import mptfoundry.train  # noqa: E402, F401


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(program: str, words: list[str], output: str) -> None:
    """Become what `python program words` would be."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = [program, *words]
    code = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


main()
