"""Weight initialization: eight schemes; a weight depends only on the seed, its name and the config.

Every parameter has its own random stream, seeded by the seed and its name, in blocks of rows. So the weights
don't depend on the order of initialization, the device or the sharding, and a shard draws only its own rows.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .config import MPTConfig
from .head_config import HEADS

# Numbers per generator, at least one row. A change here changes every seed's weights.
_BLOCK_NUMBERS = 2**20
# Standard deviation of a head's weights in every scheme: transformers' `initializer_range`.
_HEAD_STD = 0.02


def materialise(
    network: nn.Module, config: MPTConfig, device: torch.device | str | None, seed: int | None, empty: bool
) -> None:
    """Allocate a network from ``meta`` on `device` (the CPU if None), and draw its weights.

    Without a `seed`, torch's random state gives one. With `empty` none are drawn; on ``meta`` there are none.
    """
    if not torch.cuda.is_available():
        torch.set_flush_denormal(True)  # before threads start, which inherit it; see attention_blocks.py
    device = torch.device(device or "cpu")
    if device.type == "meta":
        return
    network.to_empty(device=device)
    if empty:
        return
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    for name, parameter in network.named_parameters():
        initialize_parameter(parameter, name, config, seed)


@torch.no_grad()
def initialize_parameter(parameter: torch.Tensor, name: str, config: MPTConfig, seed: int) -> None:
    """Draw one weight in place; ``name`` is its name in the network, like ``transformer.wte.weight``."""
    parameter.copy_(draw(name, tuple(parameter.shape), config, seed))


def draw(
    name: str, shape: tuple[int, ...], config: MPTConfig, seed: int, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Draw the parameter with this full name and whole shape, or its rows from start to stop.

    Returns:
        (rows, ...) float32 on the CPU.
    """
    return draw_numbers(_distribution(name, shape, config), name, shape, seed, rows)


# A distribution and its parameters: constant (value), normal (standard deviation), uniform (low, high).
Distribution = tuple[str, tuple[float, ...]]


def draw_numbers(
    distribution: Distribution,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Draw the values of parameter `name` from a distribution; arguments and result are those of `draw`."""
    first, last = rows or (0, shape[0])
    kind, numbers = distribution
    if kind == "constant":
        return torch.full((last - first, *shape[1:]), numbers[0])
    per_block = max(1, _BLOCK_NUMBERS // math.prod(shape[1:]))

    def draw_block(block: int) -> torch.Tensor:
        start, stop = block * per_block, min((block + 1) * per_block, shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        values = torch.empty(stop - start, *shape[1:])
        if kind == "normal":
            values.normal_(0, numbers[0], generator=generator)
        else:
            values.uniform_(*numbers, generator=generator)
        return values[max(first - start, 0) : last - start]

    blocks = range(first // per_block, -(-last // per_block))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.cat(list(pool.map(draw_block, blocks)))


def _distribution(name: str, shape: tuple[int, ...], config: MPTConfig) -> Distribution:
    """The distribution of a parameter's initial values."""
    module, leaf = name.split(".")[-2:]
    init = config.init_config
    is_embedding = module in ("wte", "wpe")
    if module.startswith("norm_") or module in ("q_ln", "k_ln"):
        return "constant", (1.0 if leaf == "weight" else 0.0,)
    if any(module == kind.head for kind in HEADS):
        return ("normal", (_HEAD_STD,)) if leaf == "weight" else ("constant", (0.0,))
    if init.name == "default_":
        return ("normal", (1.0,)) if is_embedding else _default_distribution(module, config)
    if leaf == "bias":
        return "constant", (0.0,)
    if is_embedding and init.emb_init_std is not None:
        return "normal", (init.emb_init_std,)
    if is_embedding and init.emb_init_uniform_lim is not None:
        return _uniform_embedding(init.emb_init_uniform_lim)
    # In Wqkv, the queries, keys and values of each head count as separate matrices.
    std = _standard_deviation(shape[1], config.d_head if module == "Wqkv" else shape[0], config)
    if module in ("out_proj", "down_proj"):
        std /= _residual_divisor(config)
    if init.name.endswith("_uniform_"):
        return "uniform", (-math.sqrt(3) * std, math.sqrt(3) * std)
    return "normal", (std,)


def _standard_deviation(inputs: int, outputs: int, config: MPTConfig) -> float:
    """Standard deviation of a matrix's weights.

    kaiming: https://arxiv.org/abs/1502.01852, xavier: https://proceedings.mlr.press/v9/glorot10a.html,
    small: https://arxiv.org/abs/1910.05895, neox: https://arxiv.org/abs/2204.06745, section 2.3.1.
    """
    init = config.init_config
    if init.name == "baseline_":
        assert init.init_std is not None
        return init.init_std
    if init.name in ("small_init_", "neox_init_"):
        return math.sqrt(2 / (5 * config.d_model))
    if init.name.startswith("xavier_"):
        return init.init_gain * math.sqrt(2 / (inputs + outputs))
    gain = nn.init.calculate_gain(init.init_nonlinearity, init.init_gain)
    return gain / math.sqrt(inputs if init.fan_mode == "fan_in" else outputs)


def _residual_divisor(config: MPTConfig) -> float:
    """The divisor of the standard deviation of matrices that write into the residual stream."""
    if config.init_config.name == "neox_init_":
        return config.n_layers / math.sqrt(10)
    divisor = config.init_config.init_div_is_residual
    if isinstance(divisor, bool):
        return math.sqrt(2 * config.n_layers) if divisor else 1.0
    return divisor


def _default_distribution(module: str, config: MPTConfig) -> Distribution:
    """PyTorch's own distribution for a linear layer, from the number of its inputs."""
    inputs = {"out_proj": config.n_heads * config.d_head, "down_proj": config.d_ffn}
    bound = 1 / math.sqrt(inputs.get(module, config.d_model))
    return "uniform", (-bound, bound)


def _uniform_embedding(limit: float | tuple[float, float]) -> Distribution:
    return "uniform", limit if isinstance(limit, tuple) else (-limit, limit)
