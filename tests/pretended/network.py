"""Steps of small networks on the pretended GPU: `network.py all`, or `network.py some`.

It prints, for each network, what a step `waits` for, its tensors on a CPU, its float32 products and the
operators whose result CUDA leaves open; and how many `graphs` compiled blocks are, and their breaks.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from typing import Any

import machine
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

machine.pretend()

from mptfoundry.models.activation_checkpointing import checkpoint_activations  # noqa: E402
from mptfoundry.mpt.config import AttnConfig, FFNConfig, MPTConfig  # noqa: E402
from mptfoundry.mpt.network import MPT  # noqa: E402
from mptfoundry.optim.bf16_weights import use_bf16_weights  # noqa: E402
from mptfoundry.optim.lion import DecoupledLionW  # noqa: E402
from mptfoundry.optim.lion_fused import DecoupledLionW as FusedLionW  # noqa: E402

SEQ = 64
HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")
GROUPED: dict[str, Any] = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
ALL_DROPOUTS = {"resid_pdrop": 0.1, "emb_pdrop": 0.1}
# The network's keys, then those of its attention.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alibi": ({}, {}),
    "torch attention": ({}, {"attn_impl": "torch"}),
    "learned positions": ({}, {"alibi": False}),
    "rotary positions": ({"learned_pos_emb": False}, {"alibi": False, "rope": True}),
    "normalised queries": ({}, {"qk_ln": True}),
    "normalised heads": ({}, {"qk_gn": True}),
    "clipped": ({}, {"clip_qkv": 6.0}),
    "window": ({}, {"sliding_window_size": 16}),
    "capped": ({"final_logit_softcapping": 30.0}, {"attn_logit_softcapping": 20.0}),
    "dropout": (ALL_DROPOUTS, {"attn_pdrop": 0.1}),
    "torch dropout": (ALL_DROPOUTS, {"attn_pdrop": 0.1, "attn_impl": "torch"}),
    "grouped queries": ({}, GROUPED),
    "layernorm": ({"norm_type": "layernorm"}, {}),
    "rmsnorm": ({"norm_type": "low_precision_rmsnorm"}, {}),
    "biases": ({"no_bias": False}, {}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "gated": ({"ffn_config": FFNConfig(ffn_type="mptglu")}, {}),
    "everything": (
        {"ffn_config": FFNConfig(ffn_type="mptglu"), "tie_word_embeddings": False, "no_bias": False}
        | {"norm_type": "layernorm", "final_logit_softcapping": 30.0, "learned_pos_emb": False}
        | ALL_DROPOUTS,
        {"alibi": False, "rope": True, "qk_ln": True, "clip_qkv": 6.0, "sliding_window_size": 16}
        | {"attn_logit_softcapping": 20.0, "attn_pdrop": 0.1}
        | GROUPED,
    ),
}
# CUDA doesn't promise a result for the first, nor the order of additions for the others.
OPEN = ("aten::log_softmax.int_out", "aten::scatter_add_", "aten::scatter_.src", "aten::scatter_reduce.two")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


def network_of(name: str, n_layers: int = 2) -> MPT:
    keys, attention = NETWORKS[name]
    config = MPTConfig(
        d_model=256,
        n_heads=4,
        n_layers=n_layers,
        max_seq_len=128,
        vocab_size=512,
        attn_config=AttnConfig(**{"alibi": True, **attention}),
        **{"no_bias": True, **keys},
    )
    return MPT(config, device="meta").train()


def batch(packed: bool, seq: int = SEQ) -> dict[str, Any]:
    ids = torch.zeros(2, seq, dtype=torch.int64, device="cuda")
    mask = torch.ones(2, seq, dtype=torch.bool, device="cuda")
    return {"labels": ids, **({"sequence_id": ids, "attention_mask": mask} if packed else {})}


class Recorder(TorchDispatchMode):
    """What there is to complain about among the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        # Up to 2.7, PyTorch's checkpointing makes a tensor without elements.
        if any(tensor.device.type == "cpu" and tensor.dim() and tensor.numel() for tensor in tensors):
            self.found[f"a tensor on the CPU: {name}"] += 1
        if name in PRODUCTS and any(tensor.dtype == torch.float32 for tensor in tensors):
            self.found[f"a product in float32: {name}"] += 1
        if name in OPEN:
            self.found[f"a result that CUDA leaves open: {name}"] += 1
        return out


def step(net: MPT, optimizer: DecoupledLionW, inputs: dict[str, Any]) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = net(inputs["labels"], **inputs).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def seen() -> dict[str, int]:
    """What the machine notes of three things that wait: a copy, a number and a count."""
    with machine.Device() as device:
        ones = torch.tensor([1, 1], device="cuda")
        ones.sum().item()
        with contextlib.suppress(DynamicOutputShapeException):  # there is no data to count in
            ones.nonzero()
    return {what.partition(":")[0]: count for what, count in device.waits.items()}


def waits(*names: str) -> dict[str, dict[str, int]]:
    results = {"three waits": seen()}
    for name in names or NETWORKS:
        for kind in ("plain", "packed", "checkpointed", *HAS_GRAD_DTYPE * ["bf16 weights"]):
            device = machine.Device()
            with device:
                with device.mode:
                    net = machine.move(network_of(name))
                if kind == "checkpointed":
                    checkpoint_activations(net, {"block": range(2)})
                lion = FusedLionW if kind == "bf16 weights" else DecoupledLionW
                optimizer = lion(net.parameters(), lr=1e-4, weight_decay=1e-5)
                if kind == "bf16 weights":
                    use_bf16_weights(net, optimizer, bf16_gradients=True)
                inputs = batch(kind == "packed")
                step(net, optimizer, inputs)
                device.waits.clear()
                with Recorder() as recorder:
                    step(net, optimizer, inputs)
            results[f"{name}, {kind}"] = dict(device.waits + recorder.found)
    return results


def graphs(*names: str) -> dict[str, Any]:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    from mptfoundry.models.compiling import compile_blocks

    results = {}
    cases = {
        "plain": ("alibi", None, False, (64,)),
        "packed": ("alibi", None, True, (64,)),
        "checkpointed": ("alibi", "block", False, (64,)),
        "checkpointed and packed": ("alibi", "block", True, (64,)),
        "checkpointed in part": ("alibi", "mlp", False, (64,)),
        "two lengths": ("alibi", None, False, (64, 96)),
        "packed, two lengths": ("alibi", None, True, (64, 96)),
        "outputs recomputed": ("alibi", "act_fn", False, (64,)),
        "everything": ("everything", "mlp", True, (64,)),
        "dropout": ("dropout", None, True, (64,)),
        "rotary positions": ("rotary positions", None, True, (64,)),
        "grouped queries": ("grouped queries", "block", True, (64, 96)),
        "bf16 weights": ("alibi", None, True, (64, 96)),
        "bf16 weights, checkpointed": ("everything", "block", True, (64,)),
    }
    cases = {name: case for name, case in cases.items() if HAS_GRAD_DTYPE or "bf16" not in name}
    for name in names or cases:
        kind, recomputed, packed, lengths = cases[name]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        counter = CompileCounterWithBackend("eager")
        with machine.FakeTensorMode(allow_non_fake_inputs=True):
            net = machine.move(network_of(kind, 4))
            if recomputed:
                checkpoint_activations(net, {recomputed: range(4)})
            if "bf16" in name:
                use_bf16_weights(net, FusedLionW(net.parameters()), bf16_gradients=True)
            compile_blocks(net, fullgraph=True, backend=counter)
            for seq in lengths * 2:
                inputs = batch(packed, seq)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = net(inputs["labels"], **inputs).loss
                assert loss is not None
                loss.backward()
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        results[name] = {"graphs": counter.frame_count, "breaks": breaks}
    return results


if sys.argv[1] == "all":
    print(json.dumps({"waits": waits(), "graphs": graphs()}))
else:
    bf16 = ["bf16 weights"] if HAS_GRAD_DTYPE else []
    some = waits("alibi", "everything"), graphs("packed, two lengths", "checkpointed and packed", *bf16)
    print(json.dumps(dict(zip(("waits", "graphs"), some, strict=True))))
