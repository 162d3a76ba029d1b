"""What one process of each node does while all others wait, for as long as it takes.

They wait by asking the store at which the ranks met, not in a collective: no timeout of a backend runs
meanwhile, and an error reaches all. Nobody goes on before every node is ready.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import torch
from composer.utils import dist

from mptfoundry import errors
from mptfoundry.errors import DataError, MPTFoundryError

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_WORDS = 30

# Every rank calls in the same order, so that all count alike.
_calls = count()


def once_per_node(work: Callable[[], T], *, what: str, say: Callable[[str], None] = print) -> T:
    """The result of `work`, which the first process of each node computes.

    Args:
        work: Gives what JSON can hold.
        what: What is waited for, in words.
        say: Is told, on the first rank, which nodes are waited for.

    Raises:
        DataError, ConfigError: What `work` raised, on all ranks.
    """
    call, ranks = next(_calls), dist.get_world_size()
    if ranks == 1:
        return work()
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    per_node, node = dist.get_local_world_size(), dist.get_node_rank()
    keys = [f"mptfoundry/once/{call}/{number}" for number in range(ranks // per_node)]
    if dist.get_local_rank() == 0:
        try:
            store.set(keys[node], json.dumps({"result": work()}))
        except MPTFoundryError as error:
            store.set(keys[node], json.dumps({"error": str(error), "kind": type(error).__name__}))
        except BaseException as error:
            text = f"{what}: rank {dist.get_global_rank()} failed ({type(error).__name__}: {error})."
            store.set(keys[node], json.dumps({"error": text, "kind": "DataError"}))
            raise
    spoke_at = time.monotonic()
    for number, key in enumerate(keys):
        while not store.check([key]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if dist.get_global_rank() == 0 and time.monotonic() - spoke_at > SECONDS_BETWEEN_WORDS:
                spoke_at = time.monotonic()
                say(f"{what}: waiting for node {number}")
    answers = [json.loads(store.get(key)) for key in keys]
    for answer in answers:
        if "error" in answer:
            raise getattr(errors, answer["kind"], DataError)(answer["error"])
    return answers[node]["result"]
