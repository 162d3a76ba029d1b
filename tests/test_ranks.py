"""Ranks that are one process: what each tells is put into a store by hand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from mptfoundry import ranks
from mptfoundry.errors import TrainingError
from mptfoundry.ranks import BEAT, RankWatch, announce_failure, failure_text

pytestmark = pytest.mark.serial


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store of three ranks, of which this process is the first."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    monkeypatch.setattr(ranks, "connect", lambda: store)
    yield store


@pytest.fixture
def others(store: Any) -> Iterator[dict[int, dict[str, Any]]]:
    """What the other ranks tell, again and again; those that are taken out are silent."""
    told: dict[int, dict[str, Any]] = {
        number: {"batch": 6, "where": "trainer.py:1, step", "waits": True} for number in (1, 2)
    }
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.02):
            count += 1
            for number, each in list(told.items()):
                store.set(f"{BEAT}/{number}", json.dumps({"count": count, **each}))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    time.sleep(0.2)
    yield told
    ended.set()
    thread.join()


def watch() -> RankWatch:
    found = RankWatch(timeout=1)
    found.batch = lambda: 6
    return found


def broken_collective(watching: RankWatch) -> str:
    with pytest.raises(TrainingError) as error, watching, watching.explained():
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv")
    return str(error.value)


def test_a_rank_that_is_elsewhere_than_in_a_collective_is_late(others: dict[int, dict[str, Any]]) -> None:
    others[2] |= {"waits": False, "where": "data/slow.py:12, read"}
    said = broken_collective(watch())
    assert said.startswith(
        "rank 2 did not arrive: it is in batch 7 at data/slow.py:12, read. The others have"
    )
    assert "1 s" in said and "rank 1" not in said and "rank 0" not in said


def test_a_rank_whose_beats_stop_is_lost(others: dict[int, dict[str, Any]]) -> None:
    del others[1]
    assert broken_collective(watch()).startswith("rank 1 gives no sign of life in batch 7.")


def test_ranks_that_all_wait_are_said_to(others: dict[int, dict[str, Any]]) -> None:
    assert "ranks wait for one another in batch 7 at " in broken_collective(watch())


def test_another_error_stays_what_it_is(others: dict[int, dict[str, Any]]) -> None:
    watching = watch()
    with pytest.raises(RuntimeError, match="shapes"), watching, watching.explained():
        raise RuntimeError("shapes cannot be multiplied")


def test_the_failure_of_another_rank_is_known_and_ones_own_is_not_meant(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watch() as watching:
        announce_failure(store, "mine", 1)
        assert watching.failure() is None and failure_text(store, 0) == "mine"
        monkeypatch.setenv("RANK", "1")
        announce_failure(store, "shard 7 is gone", 2)
        monkeypatch.setenv("RANK", "0")
        assert watching.failure() == 2 and failure_text(store, 1) == "shard 7 is gone"


def test_alone_there_is_nobody_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watch() as watching, pytest.raises(RuntimeError, match="gloo"), watching.explained():
        raise RuntimeError("gloo")
