"""Matrix products of the blocks in float8 during training, by torchao.

Both operands of a product are scaled to the range of float8 and cast, and the result has autocast's dtype.
Parameters keep their names and dtype, so optimizer, checkpoints, evaluation and export don't change. The
embedding, the output, norms and attention itself stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mptfoundry.errors import ConfigError


def use_float8(network: Any, recipe: str) -> None:
    """Compute the products of the blocks' matrices in float8, in place; without a GPU they are emulated.

    Args:
        network: With its blocks in `transformer.blocks`, before adapters or sharding.
        recipe: A name of torchao's: `tensorwise`, `rowwise` or `rowwise_with_gw_hp`.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "model.float8_recipe: needs the package torchao. Install it: pip install 'mptfoundry[float8]'."
        ) from error
    config = Float8LinearConfig.from_recipe_name(recipe)
    if not torch.cuda.is_available():
        config = replace(config, emulate=True)
    convert_to_float8_training(network.transformer.blocks, config=config)
