"""Fit the constants of the model of a step again to llm-foundry's published throughput, and write them.

    python scripts/fit_constants.py

It reads mptfoundry/forecast/llmfoundry_throughput.csv, writes mptfoundry/forecast/constants.json, and prints
the mean error of each GPU's rows, also on each model with constants fitted to the other models.
"""

from __future__ import annotations

import sys

from mptfoundry.forecast.constants import write_constants


def main(words: list[str]) -> int:
    for gpu, entry in write_constants().items():
        print(
            f"{gpu:10} {entry['rows']} steps: mean error {entry['error']:.2%}, "
            f"of models that were left out {entry['left_out_error']:.2%}"
        )
    return 0


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
