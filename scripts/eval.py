"""Evaluate a run, checkpoint or exported folder: `composer scripts/eval.py MODEL [key=value ...]`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
