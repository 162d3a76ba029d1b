"""Export to Hugging Face format: `python scripts/export_hf.py RUN_OR_CHECKPOINT OUT`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
