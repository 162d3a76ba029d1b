"""The most memory of a training step on the pretended GPU: `memory.py '[{"config": YAML, ...}, ...]'`.

For each case it prints the bytes at the peak of a step, and what the plan estimates. A case has a `config`,
its `words`, and the rows of a `microbatch`.
"""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any

import machine
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

machine.pretend()
sys.path.insert(0, str(machine.ROOT / "scripts"))

from bench_step import clip, make_optimizer  # noqa: E402

from mptfoundry.config.load import load_train_config  # noqa: E402
from mptfoundry.config.parallel import recomputed_parts  # noqa: E402
from mptfoundry.config.run import TrainConfig  # noqa: E402
from mptfoundry.models.activation_checkpointing import checkpoint_activations  # noqa: E402
from mptfoundry.mpt.network import MPT  # noqa: E402
from mptfoundry.optim.momentum import new_state  # noqa: E402
from mptfoundry.plan.devices import cluster_device  # noqa: E402
from mptfoundry.plan.memory import OVERHEAD  # noqa: E402
from mptfoundry.plan.plan import Plan, make_plan  # noqa: E402

H200 = cluster_device("h200", 1, 1)


class Memory(TorchDispatchMode):
    """Bytes of all tensors on the GPU, now and at most, and the part of the step in which that was."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.part = self.at = ""
        self._known = WeakIdKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._free, size)
        if self.now > self.peak:
            self.peak, self.at = self.now, self.part

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def measure(config: TrainConfig, plan: Plan, microbatch: int) -> Memory:
    """A step as Composer makes it, with the state of the optimizer from an earlier one."""
    model, fsdp = config.model, config.fsdp_config
    with machine.FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        net = machine.move(MPT(model.network(), device="meta").train())
        if fsdp is not None and fsdp.saves_activations:
            parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
            checkpoint_activations(net, parts, recompute=fsdp.activation_checkpointing)
        optimizer = make_optimizer(config, net, plan.fused, plan.bf16_weights)
        for parameter in net.parameters():
            optimizer.state[parameter] = new_state(parameter, optimizer.momentum_dtype or parameter.dtype)
        ids = torch.zeros(microbatch, config.max_seq_len, dtype=torch.int64, device="cuda")
        for _ in range(config.global_train_batch_size // microbatch):
            memory.part = "forward"
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = net(ids, labels=ids).loss
            memory.part = "backward"
            loss.backward()
            del loss
        memory.part = "optimizer"
        clip(config, net, optimizer)
        optimizer.step()
    return memory


def main(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        words = [*case["words"], f"device_train_microbatch_size={case['microbatch']}"]
        config, _ = load_train_config(machine.ROOT / case["config"], words)
        plan = make_plan(config, H200)
        memory = measure(config, plan, case["microbatch"])
        estimated = plan.memory.total - OVERHEAD["gpu"]
        parts = dict(vars(plan.memory))
        results.append({"peak": memory.peak, "at": memory.at, "estimated": estimated, "parts": parts})
    return results


print(json.dumps(main(json.loads(sys.argv[1]))))
