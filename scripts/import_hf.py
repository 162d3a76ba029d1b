"""Start from existing weights: `python scripts/import_hf.py SOURCE OUT`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
