"""Two launchers, each a node with a memory, a cache and a network of its own, are one run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.run.metrics_file import read_rows

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("two nodes share only a network", "2 launchers in network namespaces", "the same"),
]

# Private shared memory, as on a machine of its own: it also takes the cache of the shards.
OWN_MEMORY = ("sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")
PLAIN = (
    "model.resid_pdrop=0",
    "max_duration=20ba",
    "save_interval=20ba",
    "train_loader.dataset.streams.a.local=/dev/shm/cache/a",
    "train_loader.dataset.streams.b.local=/dev/shm/cache/b",
)
Node = tuple[tuple[str, ...], dict[str, str]]


def is_allowed(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def network(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def two_networks() -> Iterator[tuple[str, list[Node]]]:
    """The address of the first node, and how to run something on each of the two, which lie in network
    namespaces that a pair of veth devices joins."""
    names = [f"mpt{os.getpid()}{end}" for end in "ab"]
    if not is_allowed("ip", "netns", "add", names[0]):
        pytest.skip("needs `ip` and the right to make network namespaces")
    try:
        network("netns", "add", names[1])
        network(
            "link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1]
        )
        for host, name in enumerate(names, 1):
            network("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", name)
            network("-n", name, "link", "set", name, "up")
            network("-n", name, "link", "set", "lo", "up")
        nodes = [(("ip", "netns", "exec", n, *OWN_MEMORY), {"GLOO_SOCKET_IFNAME": n}) for n in names]
        yield "10.77.0.1", nodes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_nodes_train_the_model_that_one_trains(
    two_networks: tuple[str, list[Node]],
    shards: Path,
    tiny_run: Path,
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    address, (first, second) = two_networks
    remote = [f"train_loader.dataset.streams.{name}.remote={shards / name}" for name in "ab"]
    alone = launch(tiny_run, "run_name=alone", *PLAIN, *remote, within=first[0])
    assert alone.wait() == 0, alone.printed
    port, runs = str(free_port()), []
    for rank, (within, environment) in enumerate((first, second)):
        temporary = tmp_path / f"node{rank}"
        temporary.mkdir()
        place = ["--world_size", "2", "--node_rank", str(rank), "--base_rank", str(rank)]
        runs.append(
            launch(
                tiny_run,
                "run_name=two",
                *PLAIN,
                *remote,
                "fsdp_config={state_dict_type: sharded}",
                options=[*place, "--master_addr", address, "--master_port", port],
                within=within,
                TMPDIR=str(temporary),
                **environment,
            )
        )
    for run in runs:
        assert run.wait() == 0, runs[0].printed + runs[1].printed
    losses = {
        name: [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("alone", "two")
    }
    assert len(losses["alone"]) == 20
    assert losses["two"] == pytest.approx(losses["alone"], rel=1e-6)
