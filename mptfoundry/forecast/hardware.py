"""What is published about the memory and the links of GPUs, which bound a step next to arithmetic.

Rates are in bytes per second. The network is that of a whole machine, which its GPUs share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mptfoundry.plan.devices import Device
from mptfoundry.plan.gpus import short_name

GB = 10**9
# The rate of large transfers relative to the published one.
REACHED = 0.8


class Published(NamedTuple):
    """Published rates of a GPU in GB/s, in one direction.

    Attributes:
        memory: Of its own memory.
        link: To the other GPUs of its machine: NVLink, or PCIe.
        network: Of a machine of eight to the others, as the vendor's or the usual machines have it.
    """

    memory: float
    link: float
    network: float


# NVIDIA's data sheets of each GPU, and for the network those of DGX and HGX machines: eight ports of 200
# Gbit/s (A100), of 400 (Hopper, Blackwell) or of 800 (Blackwell Ultra). Other machines: one port of 200
# Gbit/s, assumed.
PUBLISHED = {
    "gb300": Published(8000, 900, 800),
    "b300": Published(8000, 900, 800),
    "gb200": Published(8000, 900, 400),
    "b200": Published(8000, 900, 400),
    "gh200": Published(4000, 450, 400),
    "h200": Published(4800, 450, 400),
    "h200-nvl": Published(4800, 64, 400),
    "h100": Published(3350, 450, 400),
    "h100-nvl": Published(3938, 64, 400),
    "h100-pcie": Published(2000, 64, 400),
    "a100-40gb": Published(1555, 300, 200),
    "a100-80gb": Published(2039, 300, 200),
    "a30": Published(933, 32, 25),
    "a10": Published(600, 32, 25),
    "l40s": Published(864, 32, 25),
    "l4": Published(300, 32, 25),
    "rtx-3090": Published(936, 32, 25),
    "rtx-4090": Published(1008, 32, 25),
    "rtx-5090": Published(1792, 64, 25),
    "rtx-6000-ada": Published(960, 32, 25),
    "rtx-pro-6000": Published(1792, 64, 25),
}


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a cluster, as the model of a step sees them.

    Attributes:
        flops: Dense bf16 FLOP/s of one GPU.
        memory: Bytes per second of its memory.
        link: To the other GPUs of its machine.
        network: Of a machine to the others.
        per_node: GPUs of a machine.
    """

    flops: float
    memory: float
    link: float
    network: float
    per_node: int

    def bus(self, nodes: int) -> float:
        """The rate at which a gather over so many machines fills a GPU; a machine's ports work together."""
        published = self.link if nodes == 1 else min(self.link, self.network)
        return REACHED * published


def hardware_of(device: Device, network_gbps: float | None = None) -> Hardware | None:
    """What the model of a step needs to know about a device; None if it is not published.

    Args:
        device: The devices of a run.
        network_gbps: Gbit/s of one machine's network. Default: as usual for the GPU.
    """
    rates = PUBLISHED.get(short_name(device.name) or "")
    if rates is None or device.peak_flops is None:
        return None
    network = rates.network * GB if network_gbps is None else network_gbps * GB / 8
    return Hardware(device.peak_flops, rates.memory * GB, rates.link * GB, network, device.per_node)
