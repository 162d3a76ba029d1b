"""Train a model: `composer scripts/train.py CONFIG [key=value ...]`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
