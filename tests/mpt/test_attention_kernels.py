"""The forward and backward kernels against the plain formula."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mptfoundry.mpt.attention_tiles import Tile
from mptfoundry.mpt.attention_triton import attend
from scripts.skipped_blocks import reach_of

from .cases import (
    DEVICE,
    FEATURES,
    HALVES,
    SMALL_TILES,
    Calls,
    Case,
    assert_kernels_as_exact,
    by_kernels,
    make_case,
    on_device,
    plainly,
    use_tiles,
)
from .reference import assert_as_exact, assert_attention_as_exact

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("triton_runs")]

IS_SOAK = os.environ.get("MPTFOUNDRY_SOAK") == "1"
ALONE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "window 0": {"window": 0},
    "a window beyond the row": {"window": 1000},
    "steep alibi": {"bias_max": 2},
    **{
        f"{n} tokens": {"seq": n, "bias_max": 8}
        for n in ((1, 2, 15, 16, 17, 63, 64, 65) if IS_SOAK else (1, 16, 17, 63))
    },
    **{
        f"{n} tokens after {past}": {"seq": n, "past": past, "bias_max": 8}
        for n, past in (((1, 40), (15, 1), (16, 16), (17, 64)) if IS_SOAK else ((1, 40), (17, 64)))
    },
}
# With the tiles that ship.
SHIPPED: dict[str, dict[str, Any]] = {
    "127 tokens": {"seq": 127, "bias_max": 8},
    **{
        f"{n} heads": {"n_heads": n, "seq": 20, "bias_max": 8}
        for n in ((12, 32, 56, 64) if IS_SOAK else (12,))
    },
    **{
        f"head_dim {n}": {"head_dim": n, "bias_max": 8}
        for n in ((8, 32, 48, 64, 80, 96, 112, 128, 160, 256) if IS_SOAK else (8, 80, 128))
    },
}


def random_mix(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    mix = {
        "seq": draw.choice([31, 32, 33, 47, 48, 49, 65]),
        "past": draw.choice([0, 0, 1, 16, 45]),
    }
    for name, feature in FEATURES.items():
        if draw.random() < 0.4 and name not in ("past", "window 1"):
            mix |= feature
    if "window" in mix:
        mix["window"] = draw.choice([0, 1, 10, 30, 200])
    return mix | {"head_dim": draw.choice([16, 16, 24, 32])}


def mix_of(name: str) -> dict[str, Any]:
    first, *others = name.split(" + ")
    if first == "random":
        return random_mix(int(others[0]))
    mix = {**ALONE, **SHIPPED, **FEATURES}[first]
    for other in others:
        mix = mix | FEATURES[other] | {"batch": 1}
    return mix


def compatible(one: str, other: str) -> bool:
    return not set(FEATURES[one]) & set(FEATURES[other])


def covering_mixes(pairs: list[tuple[str, str]], size: int) -> list[str]:
    """Mixes of at most `size` features in which every pair occurs at least once."""
    uncovered, mixes = dict.fromkeys(pairs), []
    while uncovered:
        mix = list(next(iter(uncovered)))
        while len(mix) < size:
            gains = {
                name: sum((one, name) in uncovered or (name, one) in uncovered for one in mix)
                for name in FEATURES
                if all(compatible(name, one) for one in mix)
            }
            best = max(gains, key=lambda name: gains[name], default=None)
            if best is None or gains[best] == 0:
                break
            mix.append(best)
        for pair in itertools.permutations(mix, 2):
            uncovered.pop(pair, None)
        mixes.append(" + ".join(mix))
    return mixes


COMPATIBLE = [pair for pair in itertools.combinations(FEATURES, 2) if compatible(*pair)]
# Each pair of features alone, or in an ordinary run of the tests several pairs in one mix.
PAIRS = [" + ".join(pair) for pair in COMPATIBLE] if IS_SOAK else covering_mixes(COMPATIBLE, size=5)
RANDOM = [f"random + {number}" for number in range(96 if IS_SOAK else 3)]
GRID = [*ALONE, *SHIPPED, *FEATURES, *PAIRS, *RANDOM]


@pytest.mark.parametrize("name", GRID)
def test_every_mix_of_features_is_as_exact_as_the_plain_formula(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in SHIPPED:
        use_tiles(monkeypatch, SMALL_TILES[GRID.index(name) % len(SMALL_TILES)])
    assert_kernels_as_exact(make_case(**mix_of(name)))


HALF_MIXES = [
    "nothing", "alibi", "steep alibi", "alibi + documents", "alibi + left padding", "alibi + window 10",
    "alibi + grouped queries", "alibi + prefix", "alibi + softcap", "alibi + past", "right padding + softcap",
    "alibi + head_dim 24", *(f"random + {number}" for number in range(100, 104)),
]  # fmt: skip


# Each mix in one of the two, or in both.
IN_HALVES = [
    pytest.param(name, dtype, marks=[] if (number + HALVES.index(dtype)) % 2 else pytest.mark.soak)
    for number, name in enumerate(HALF_MIXES)
    for dtype in HALVES
]


@pytest.mark.parametrize(("name", "dtype"), IN_HALVES, ids=str)
def test_half_precision_is_as_exact_as_the_plain_formula(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, SMALL_TILES[HALF_MIXES.index(name) % len(SMALL_TILES)])
    assert_kernels_as_exact(make_case(**mix_of(name)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("bounded_by", ["window", "document", "alibi"])
def test_positions_far_along_a_row_cost_no_precision(
    bounded_by: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few blocks of queries, and in backward few, long blocks of keys.
    use_tiles(monkeypatch, {"forward": (16, 16), "backward_query": (16, 16), "backward_key": (16, 8192)})
    options = {
        "window": {"window": 40},
        "document": {"documents": ((65_500,),)},
        "alibi": {"bias_max": 1},
    }[bounded_by]
    case = make_case(**{"seq": 9, "past": 65_527, "n_heads": 1, "bias_max": 2, **options})
    assert_kernels_as_exact(case, dtype)


@pytest.mark.parametrize("options", [{"past": 23}, {"right": 19, "window": 10}, {"kv_heads": 1}], ids=str)
def test_packed_rows_are_computed_without_the_numbers_of_documents(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, SMALL_TILES[1])
    inputs, grad, packed = make_case(**{**FEATURES["packed documents"], "bias_max": 8, **options})
    numbered = dataclasses.replace(packed, max_documents=None, _made={})
    with Calls() as calls:
        by_starts = by_kernels(inputs, grad, packed, torch.float32)
        assert calls.arguments["attention"][3] is None
    for one, other in zip(by_starts, by_kernels(inputs, grad, numbered, torch.float32), strict=True):
        assert torch.equal(one, other)


def skipping_case(**options: Any) -> Case:
    return make_case(**{"seq": 96, "slopes": (4.0, 1.0), **options})


def first_visited(case: Case) -> torch.Tensor:
    """The first key that each block of queries visits, (batch, n_heads, blocks)."""
    inputs, _, context = case
    with Calls() as calls:
        attend(*(x.to(DEVICE) for x in inputs), on_device(context))
    return calls.results["attention"][2].cpu()


def test_keys_too_far_to_count_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, SMALL_TILES[0])
    inputs, grad, context = make_case(seq=192, n_heads=3, slopes=(1.0, 0.3, 1e-6))
    steep, less_steep, flat = first_visited((inputs, grad, context))[0]
    begins = torch.arange(12) * 16
    assert (begins - steep).max() <= 48 < (begins - less_steep).max() <= 144 and not flat.any()
    assert not first_visited((inputs, grad, dataclasses.replace(context, skips=False))).any()


@pytest.mark.parametrize("seq", [192, 150])
@pytest.mark.parametrize("tiles", SMALL_TILES, ids=str)
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_skipped_blocks_are_counted_as_the_kernel_skips_them(
    kv_heads: int, tiles: dict[str, tuple[int, int]], seq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, tiles)
    inputs, grad, context = make_case(seq=seq, n_heads=3, kv_heads=kv_heads, slopes=(1.0, 0.3, 1e-6))
    inputs = [x.half() for x in inputs]  # in float32 the kernel measures distances, and skips a bit less
    query, key = inputs[0][0].float(), inputs[1][0].float()
    tile = Tile(*tiles["forward"], 4, 1)
    counted, largest = reach_of(query, key, context.slopes, context.scale, tile)
    assert torch.equal(counted, first_visited((inputs, grad, context))[0].long())
    longest = query.norm(dim=-1).amax(0) * key.norm(dim=-1).amax(0)
    assert largest == pytest.approx((context.scale * longest.max()).item(), rel=0.01)


def towards(near: float, far: float, inputs: list[torch.Tensor]) -> None:
    """Queries of one direction, keys along it: by ``far`` in the first quarter of a row, else by ``near``."""
    query, key, _ = inputs
    direction = torch.nn.functional.normalize(query[:, :1, :1], dim=-1)
    query[:] = 0.01 * query + 4 * direction
    key[:] = 0.01 * key + near * direction
    key[:, : key.shape[1] // 4] += (far - near) * direction


def scale_randomly(seed: int, inputs: list[torch.Tensor]) -> None:
    """Give each token and head a length of its own."""
    draw = torch.Generator().manual_seed(seed)
    for x in inputs:
        x *= 10 ** (1.5 * torch.rand(*x.shape[:3], 1, generator=draw) - 1)


GENTLE = {"slopes": (0.9, 0.7)}
# Options of a case, and what is done to its queries, keys and values.
ADVERSE: dict[str, tuple[dict[str, Any], Callable[[list[torch.Tensor]], object]]] = {
    "nothing adverse": ({}, lambda x: None),
    "a bound that is met": (GENTLE, lambda x: x[0].mul_(1e-3)),
    "a far key that outweighs its distance": ({}, lambda x: (x[0][:, 90].fill_(15), x[1][:, 3].fill_(15))),
    "far keys that nearly outweigh it": (GENTLE, partial(towards, 0.0, 70.0)),
    "long queries": ({}, lambda x: x[0].mul_(5)),
    "near keys against the queries": (GENTLE, partial(towards, -35.0, 35.0)),
    "near keys of no length": ({}, lambda x: (x[1][:, 30:].mul_(1e-4), x[1][:, :30].mul_(5))),
    "a long key in padding": ({"right": 30}, lambda x: x[1][:, -1].fill_(5)),
    "large far values": ({}, lambda x: x[2][:, :9].mul_(1e4)),
    "softcap": (GENTLE | {"softcap": 60.0}, partial(towards, -35.0, 35.0)),
    "one key head": ({"kv_heads": 1}, lambda x: x[1][:, :20].mul_(5)),
    "documents": ({"documents": ((3, 70),)}, lambda x: x[1][:, :20].mul_(5)),
    "prefix": ({"prefix": ((0, 60),)}, lambda x: x[1][:, 50:60].mul_(5)),
    "window": ({"window": 60}, lambda x: x[1][:, :20].mul_(5)),
    "past": ({"seq": 20, "past": 76}, lambda x: x[1][:, :20].mul_(5)),
    **{f"random lengths {seed}": ({}, partial(scale_randomly, seed)) for seed in range(4 if IS_SOAK else 1)},
}


# What an ordinary run of the tests tries.
WORST = (
    *("a bound that is met", "far keys that nearly outweigh it", "near keys against the queries"),
    *("softcap", "one key head", "documents", "past"),
)


@pytest.mark.parametrize(
    "adversity", [pytest.param(each, marks=[] if each in WORST else pytest.mark.soak) for each in ADVERSE]
)
def test_skipping_is_exact_whatever_the_inputs(adversity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, SMALL_TILES[list(ADVERSE).index(adversity) % len(SMALL_TILES)])
    options, change = ADVERSE[adversity]
    inputs, grad, context = case = skipping_case(**options)
    change(inputs)
    everything = dataclasses.replace(context, skips=False)
    truth = plainly(*case, torch.float64)
    skipping, visiting = (by_kernels(inputs, grad, c, torch.float32) for c in (context, everything))
    assert_as_exact(skipping, visiting, truth)
    assert_as_exact(skipping[:1], plainly(*case, torch.float32)[:1], truth[:1])


def test_what_is_not_a_number_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, SMALL_TILES[0])
    inputs, _, context = skipping_case()
    inputs[1][0, 5, 0, 0] = torch.nan
    is_nan = attend(*(x.to(DEVICE) for x in inputs), on_device(context)).isnan().any(-1)
    assert is_nan[0, 5:, 0].all() and not is_nan[0, :5].any() and not is_nan[..., 1].any()


DROPOUT_MIXES = ["nothing", "alibi", "alibi + documents", "alibi + grouped queries", "past + window 10"]


def kept_weights(case: Case, seed: int) -> torch.Tensor:
    """(batch, n_heads, seq, keys) bool: values that are an identity show which weights dropout leaves."""
    (query, key, value), _, context = case
    torch.manual_seed(seed)
    identity = torch.eye(key.shape[1], value.shape[-1])[None, :, None].expand_as(value)
    return (
        attend(*(x.to(DEVICE) for x in (query, key, identity)), on_device(context)).cpu().transpose(1, 2) > 0
    )


@pytest.mark.parametrize("name", DROPOUT_MIXES)
def test_dropout_drops_the_same_weights_in_forward_and_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, SMALL_TILES[DROPOUT_MIXES.index(name) % len(SMALL_TILES)])
    case = make_case(**{**mix_of(name), "head_dim": 64}, dropout=0.3)
    kept = kept_weights(case, seed=5)[..., : case[0][1].shape[1]]
    torch.manual_seed(5)
    fast = by_kernels(*case, torch.float32)
    plain, truth = (plainly(*case, dtype, kept=kept) for dtype in (torch.float32, torch.float64))
    assert_attention_as_exact(fast, plain, truth, case[2])


def test_dropout_drops_its_share_and_other_weights_in_each_row_and_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(seq=64, head_dim=64, dropout=0.3, prefix=((0, 64), (0, 64)))
    kept = kept_weights(case, seed=5)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    others = [kept.flip(0), kept.flip(1), kept.mT, kept_weights(case, 6)]
    others += [kept.roll(by, dim) for by in (1, 8) for dim in (2, 3)]
    for other in others:
        assert (kept == other).float().mean().item() == pytest.approx(0.7**2 + 0.3**2, abs=0.03)
    use_tiles(monkeypatch, SMALL_TILES[1])
    assert torch.equal(kept, kept_weights(case, seed=5))
