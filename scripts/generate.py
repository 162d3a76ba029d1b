"""Continue a prompt: `python scripts/generate.py MODEL PROMPT ... [key=value ...]`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
