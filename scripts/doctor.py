"""Check a machine, or each rank of a cluster: `composer scripts/doctor.py cluster=true`."""

import sys

from mptfoundry.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
