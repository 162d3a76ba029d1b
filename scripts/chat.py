"""Talk with a model: `python scripts/chat.py MODEL`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
