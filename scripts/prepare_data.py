"""Turn text into shards: `python scripts/prepare_data.py INPUT ... out=FOLDER tokenizer=NAME`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
