"""The operators of training steps on the pretended GPU: `step.py '[{"config": YAML, "words": [...]}, ...]'`.

For each case it prints the step's rows and tokens, its parameters, FLOPs per token, and a list of operators,
each once with its part of the step, launches, bytes and FLOPs. A case may have a `residual` stream of another
dtype than autocast's, such as `float32`. With `compile_config` a block is compiled as far as the kernels that
the compiler makes of it; these are what is counted.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import torch
from torch.utils._pytree import tree_leaves

machine.pretend()
sys.path.insert(0, str(machine.ROOT / "scripts"))

from bench_step import clip, make_optimizer  # noqa: E402
from operators import COPIES, Operator, Recorder, flops_of, part_of  # noqa: E402

from mptfoundry.config.load import load_train_config  # noqa: E402
from mptfoundry.config.parallel import recomputed_parts  # noqa: E402
from mptfoundry.config.run import TrainConfig  # noqa: E402
from mptfoundry.models.activation_checkpointing import checkpoint_activations  # noqa: E402
from mptfoundry.mpt import network as networks  # noqa: E402
from mptfoundry.mpt.flops import count_parameters, flops_per_token  # noqa: E402
from mptfoundry.plan.devices import cluster_device  # noqa: E402
from mptfoundry.plan.plan import make_plan  # noqa: E402

H200 = cluster_device("h200", 1, 1)


def trace(config: TrainConfig, residual: str | None) -> Recorder:
    """A step as Composer makes it, with the state of the optimizer from an earlier one."""
    recorder = Recorder()
    plan = make_plan(config, H200)
    microbatch = plan.device_train_microbatch_size
    is_wide = residual is not None and (lambda x: getattr(torch, residual))
    with machine.FakeTensorMode(allow_non_fake_inputs=True), launches(recorder):
        net = make_network(config, recorder)
        net.fuses_loss = plan.loss_fn == "fused_crossentropy"
        optimizer = make_optimizer(config, net, plan.fused, plan.bf16_weights)
        ids = torch.zeros(microbatch, config.max_seq_len, dtype=torch.int64, device="cuda")
        with patch.object(networks, "compute_dtype", is_wide or networks.compute_dtype):
            if config.compile_config is not None or plan.bf16_weights:
                forward_and_backward(net, ids, recorder)
            else:
                for parameter in net.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            recorder.operators.clear()
            with recorder:
                for _ in range(config.global_train_batch_size // microbatch):
                    forward_and_backward(net, ids, recorder)
                recorder.phase = "clipping"
                clip(config, net, optimizer)
                recorder.phase = "optimizer"
                optimizer.step()
                optimizer.zero_grad()
    return recorder


def make_network(config: TrainConfig, recorder: Recorder) -> Any:
    model, fsdp = config.model, config.fsdp_config
    net = machine.move(networks.MPT(model.network(), device="meta").train())
    if fsdp is not None and fsdp.saves_activations:
        parts = recomputed_parts(model.activation_checkpointing_target, model.n_layers)
        checkpoint_activations(net, parts, recompute=fsdp.activation_checkpointing)
    if config.compile_config is not None:
        from mptfoundry.models.compiling import compile_blocks

        compile_blocks(net, fullgraph=True, backend=compiler(recorder))
    return net


def forward_and_backward(net: Any, ids: torch.Tensor, recorder: Recorder) -> None:
    recorder.phase = "forward"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = net(ids, labels=ids).loss
    recorder.phase = "backward"
    loss.backward()


def launches(recorder: Recorder) -> Any:
    """Triton kernels that are launched outside of an operator are counted, and not run."""
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorder.launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | options)

    return patch.object(JITFunction, "run", launch)


def compiler(recorder: Recorder) -> Callable[..., Any]:
    """Inductor up to the kernels that it would write; a call of a graph counts them."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def stop_at_kernels(graph: Any, inputs: Any, **options: Any) -> Any:
        kernels = kernels_of(graph, inputs)

        def run(*args: Any) -> Any:
            recorder.operators += kernels
            with recorder.paused():
                return graph.forward(*args)

        return make_boxed_func(run)

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=stop_at_kernels)


def kernels_of(graph: Any, inputs: Any) -> list[Operator]:
    """The kernels of a graph, after the compiler has fused its operators."""
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(inputs)
    record_original_output_strides(graph)
    lowered = GraphLowering(graph, shape_env=mode.shape_env)
    kernels = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(V.set_graph_handler(lowered))
        stack.enter_context(V.set_real_inputs(inputs))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        lowered.run(*inputs)
        lowered._update_scheduler()
        for node in lowered.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
                continue
            sources = {source.name: source for each in node.get_nodes() for source in each.node.origins}
            kernels.append(kernel_of(node, [sources[name] for name in sorted(sources)]))
    return kernels


def kernel_of(node: Any, sources: list[Any]) -> Operator:
    """A kernel, named for the operators that it was made of."""
    sources = [source for source in sources if hasattr(source.target, "name")]
    names = [source.target.name() for source in sources]
    size = node.get_read_write_buffers_sizes()
    for source, name in zip(sources, names, strict=True) if node.is_extern() else ():
        values = [
            *(argument.meta["val"] for argument in source.all_input_nodes),
            *tree_leaves(source.meta["val"]),
        ]
        flops = flops_of(name, [tuple(map(int, value.shape)) for value in values])
        if flops or "attention" in name:
            return Operator(part_of(name, "forward"), name, size, flops)
    only_casts = all(name in COPIES or "view" in name or "permute" in name for name in names)
    part = "casts and copies" if only_casts else "elementwise and norms"
    made_of = sorted({name.split("::")[-1].partition(".")[0] for name in names})
    return Operator(part, f"compiled {' '.join(made_of)}", size)


def summary(config: TrainConfig, recorder: Recorder) -> dict[str, Any]:
    totals: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for operator in recorder.operators:
        total = totals[operator.part, operator.name]
        for number, value in enumerate((1, operator.bytes, operator.flops)):
            total[number] += value
    network, rows = config.model.network(), config.global_train_batch_size
    return {
        "rows": rows,
        "tokens": rows * config.max_seq_len,
        "parameters": count_parameters(network),
        "flops_per_token": flops_per_token(network, config.max_seq_len, causal=False),
        "causal_flops_per_token": flops_per_token(network, config.max_seq_len, causal=True),
        "operators": [
            {"part": part, "name": name, "launches": total[0], "bytes": total[1], "flops": total[2]}
            for (part, name), total in totals.items()
        ],
    }


def main(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        torch._dynamo.reset()
        config, _ = load_train_config(Path(machine.ROOT, case["config"]), case.get("words", []))
        results.append(summary(config, trace(config, case.get("residual"))))
    return results


print(json.dumps(main(json.loads(sys.argv[1]))))
