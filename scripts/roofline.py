"""Estimate a training step on one H200 by part, from the operators that it runs: not run on a GPU.

    python scripts/roofline.py [config=configs/mpt-7b.yaml] [batch=8] [variants=NAME,...] [layers=2,4]
        [sharper=1] [key=value ...] [out=FILE.json] [picture=FILE.png]

It traces the step of `config` with `batch` rows on a pretended GPU (tests/pretended: real shapes, dtypes and
operators, no data), counts the bytes and FLOPs of each operator, and takes for each kind of operator the
slower of both on an H200. It needs Linux, a C compiler, PyTorch's CUDA build, and a minute for each variant
of a 7B. With `layers=2,4` it needs seconds: it traces networks of two and of four layers of that width, and
adds what a layer takes as often as there are more. The variants, from left to right in the table:

* `float32-residual`: the residual stream in float32, the optimizer and the loss operator by operator.
* `plain`: the residual stream in autocast's dtype, the optimizer and the loss operator by operator.
* `as-configured`: what the config says. With FSDP, weights are cast in each microbatch.
* `bf16-weights`: the same without FSDP, so that matrices stay in bfloat16 (`optimizer.bf16_weights`).
* `compiled`: the same again with compiled blocks (`compile_config`).
* `skipping`: `bf16-weights`, and attention skips the blocks that ALiBi lets it skip with fresh weights;
  `sharper` multiplies the scores, which grow in training (scripts/skipped_blocks.py).

Matrix products and attention count at the rates that kernels of their kind reach; what the GPU waits for,
such as Python or launches, is not in the estimate.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Rates of one H200, assumed and not measured here. Bytes per second: 90 % of the 4.3e12 that a large copy
# reaches of the vendor's 4.8e12. FLOP/s of bf16: large matrix products, and FlashAttention's forward and
# backward with head_dim 128, counted as causal. The peak is the vendor's, for MFU.
BYTES_PER_SECOND = 4.3e12 * 0.9
PRODUCTS = 720e12
ATTENTION_FORWARD, ATTENTION_BACKWARD = 340e12, 230e12
PEAK = 989.4e12
BF16 = 2  # bytes

OWN = {"config": "configs/mpt-7b.yaml", "batch": "8", "variants": "", "layers": ""}
OWN |= {"sharper": "1", "out": "", "picture": ""}
NOTE = "Estimate for one H200 from bytes and FLOPs of the traced step; not run on a GPU."


def main(words: list[str]) -> int:
    from tests.pretended.starting import run_program, why_not

    options = dict(word.split("=", 1) for word in words)
    if reason := why_not():
        print(f"error: no step can be traced here: it {reason}.", file=sys.stderr)
        return 1
    own = OWN | options
    overrides = [f"{key}={value}" for key, value in options.items() if key not in OWN]
    depths = [f"model.n_layers={number}" for number in own["layers"].split(",") if number]
    if len(depths) not in (0, 2):
        print("error: layers takes two numbers, such as 2,4.", file=sys.stderr)
        return 2
    names = chosen(own["variants"])
    cases = [
        case(own, [*overrides, *depth], name) for name in names for depth in ([[d] for d in depths] or [[]])
    ]
    with tempfile.TemporaryDirectory() as folder:
        traced = run_program(Path(folder), "step.py", json.dumps(cases))
    if depths:
        total = n_layers_of(own["config"], overrides)
        small, large = (int(number) for number in own["layers"].split(","))
        times = (total - large) / (large - small)
        traced = [deeper(*pair, times) for pair in zip(traced[::2], traced[1::2], strict=True)]
    if "skipping" in names:
        skip_blocks_of(traced[names.index("skipping")], own, overrides)
    steps = {name: estimate(step) for name, step in zip(names, traced, strict=True)}
    print("\n".join(table(steps)))
    if own["out"]:
        Path(own["out"]).write_text(json.dumps({"note": NOTE, "steps": steps}, indent=1) + "\n")
    if own["picture"]:
        draw(steps, Path(own["picture"]))
    return 0


PLAIN = ["optimizer.fused=false", "model.loss_fn=torch_crossentropy"]
# The residual stream's dtype where it is not autocast's, and words for the config.
VARIANTS: dict[str, tuple[str | None, list[str]]] = {
    "float32-residual": ("float32", PLAIN),
    "plain": (None, PLAIN),
    "as-configured": (None, []),
    "bf16-weights": (None, ["fsdp_config.state_dict_type=full"]),
    "compiled": (None, ["fsdp_config.state_dict_type=full", "compile_config={}"]),
    "skipping": (None, ["fsdp_config.state_dict_type=full"]),
}


def chosen(names: str) -> list[str]:
    """The variants that are asked for, or all."""
    asked = names.split(",") if names else list(VARIANTS)
    for name in asked:
        if name not in VARIANTS:
            raise SystemExit(f"error: variants: {name!r} is not one. Use some of {', '.join(VARIANTS)}.")
    return asked


def case(own: dict[str, str], overrides: list[str], name: str) -> dict[str, Any]:
    """What the tracing program is told of a variant."""
    residual, words = VARIANTS[name]
    rows = [f"global_train_batch_size={own['batch']}", f"device_train_microbatch_size={own['batch']}"]
    config = str(Path(own["config"]).resolve())
    return {"config": config, "words": [*rows, *words, *overrides], "residual": residual}


def n_layers_of(config: str, overrides: list[str]) -> int:
    from mptfoundry.config.load import load_train_config

    return load_train_config(config, overrides)[0].model.n_layers


def deeper(small: dict[str, Any], large: dict[str, Any], times: float) -> dict[str, Any]:
    """A step of a deeper network: the larger step, and `times` its difference to the smaller."""
    step = {key: value for key, value in large.items() if key != "operators"}
    for key in ("parameters", "flops_per_token", "causal_flops_per_token"):
        step[key] = round(large[key] + times * (large[key] - small[key]))
    fewer = {(each["part"], each["name"]): each for each in small["operators"]}
    nothing = {"launches": 0, "bytes": 0, "flops": 0}
    step["operators"] = []
    for each in large["operators"]:
        before = fewer.get((each["part"], each["name"]), nothing)
        more = {key: round(each[key] + times * (each[key] - before[key])) for key in nothing}
        step["operators"].append(each | more)
    return step


def skip_blocks_of(step: dict[str, Any], own: dict[str, str], overrides: list[str]) -> None:
    """Take from attention the blocks that ALiBi lets the kernels skip."""
    from skipped_blocks import computed_shares, fresh_layer

    from mptfoundry.config.load import load_train_config

    config, _ = load_train_config(own["config"], overrides)
    network = config.model.network()
    _, share = computed_shares(fresh_layer(network, config.max_seq_len), [float(own["sharper"])])[0]
    forwards = 2 if config.fsdp_config is not None and config.fsdp_config.activation_checkpointing else 1
    skip_blocks(step, share, forwards * network.n_layers * network.kv_heads * network.d_head * BF16)


def skip_blocks(step: dict[str, Any], share: float, key_bytes: int) -> None:
    """Count a share of attention's FLOPs, and reading the keys, `key_bytes` per token, for their norms."""
    for operator in step["operators"]:
        if operator["part"] == "attention":
            operator["flops"] = round(operator["flops"] * share)
    norms = {"part": "attention", "name": "norms of keys", "launches": 0, "flops": 0}
    step["operators"].append({**norms, "bytes": step["tokens"] * key_bytes})


def estimate(step: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each operator and part, and from their sum tokens per second and MFU."""
    parts: dict[str, dict[str, Any]] = {}
    for operator in step["operators"]:
        operator["milliseconds"], operator["bound"] = cost(operator)
        total = parts.setdefault(
            operator["part"], {"launches": 0, "bytes": 0, "flops": 0, "milliseconds": 0.0, "bounds": {}}
        )
        for key in ("launches", "bytes", "flops", "milliseconds"):
            total[key] += operator[key]
        bounds = total["bounds"]
        bounds[operator["bound"]] = bounds.get(operator["bound"], 0.0) + operator["milliseconds"]
    for total in parts.values():
        bounds = total.pop("bounds")
        total["bound"] = max(bounds, key=bounds.__getitem__)
    seconds = sum(total["milliseconds"] for total in parts.values()) / 1000
    per_second = step["tokens"] / seconds
    return {
        **step,
        "parts": parts,
        "milliseconds": 1000 * seconds,
        "tokens_per_second": per_second,
        "mfu": per_second * step["flops_per_token"] / PEAK,
        "mfu_causal": per_second * step["causal_flops_per_token"] / PEAK,
        "launches": sum(total["launches"] for total in parts.values()),
    }


def cost(operator: dict[str, Any]) -> tuple[float, str]:
    """Milliseconds of all calls of an operator, and the resource that takes them."""
    moving = operator["bytes"] / BYTES_PER_SECOND
    if operator["part"] == "attention" and operator["flops"]:
        is_backward = operator["name"].endswith("backward")
        rate = ATTENTION_BACKWARD if is_backward else ATTENTION_FORWARD
        return 1000 * operator["flops"] / rate, "attention"
    computing = operator["flops"] / PRODUCTS
    return 1000 * max(moving, computing), "tensor cores" if computing > moving else "memory"


def table(steps: dict[str, dict[str, Any]]) -> list[str]:
    """The table by part with a column for each variant, and that of the last one by resource."""
    from operators import PARTS

    def row(title: str, *values: str) -> str:
        return f"| {title:34} | " + " | ".join(f"{value:>16}" for value in values) + " |"

    some = list(steps.values())
    first, last = some[0], some[-1]
    lines = [
        NOTE,
        f"{first['rows']} rows, {first['tokens']:,} tokens, {first['parameters']:,} parameters",
        "",
    ]
    lines += [row("milliseconds", *steps), row("---", *["---:"] * len(steps))]
    for part in PARTS:
        lines.append(row(part, *(f"{each['parts'].get(part, EMPTY)['milliseconds']:.1f}" for each in some)))
    lines += [
        row("step", *(f"{each['milliseconds']:.1f}" for each in some)),
        row("tokens per second", *(f"{each['tokens_per_second']:,.0f}" for each in some)),
        row("MFU", *(f"{each['mfu']:.1%}" for each in some)),
        row("MFU, causal", *(f"{each['mfu_causal']:.1%}" for each in some)),
        row("launches", *(f"{each['launches']:,}" for each in some)),
        row("optimizer, bytes per parameter", *(f"{bytes_per_parameter(each):.1f}" for each in some)),
        row("elementwise, KiB per token", *(f"{elementwise(each) / 1024:.0f}" for each in some)),
        "",
        row(list(steps)[-1], "TFLOP", "GB", "milliseconds", "bound by", "launches"),
        row("---", *["---:"] * 5),
    ]
    for part in PARTS:
        total = last["parts"].get(part, EMPTY)
        shown = f"{total['flops'] / 1e12:.1f}", f"{total['bytes'] / 1e9:.1f}", f"{total['milliseconds']:.1f}"
        lines.append(row(part, *shown, total["bound"], f"{total['launches']:,}"))
    return lines


EMPTY: dict[str, Any] = {"launches": 0, "bytes": 0, "flops": 0, "milliseconds": 0.0, "bound": ""}


def bytes_per_parameter(step: dict[str, Any]) -> float:
    """Bytes that the optimizer moves for each parameter, without clipping."""
    return (
        sum(each["bytes"] for each in step["operators"] if each["part"] == "optimizer") / step["parameters"]
    )


def elementwise(step: dict[str, Any]) -> float:
    """Bytes per token of elementwise operators, norms, casts and copies of the network."""
    parts = ("elementwise and norms", "casts and copies")
    return sum(each["bytes"] for each in step["operators"] if each["part"] in parts) / step["tokens"]


def draw(steps: dict[str, dict[str, Any]], path: Path) -> None:
    """A bar for each variant, made of its parts."""
    from matplotlib.figure import Figure
    from operators import PARTS

    figure = Figure(figsize=(8, 1.6 + 0.6 * len(steps)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(steps)
    for part in PARTS:
        widths = [step["parts"].get(part, EMPTY)["milliseconds"] for step in steps.values()]
        axes.barh(list(steps), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for number, step in enumerate(steps.values()):
        axes.text(left[number], number, f" {step['tokens_per_second']:,.0f} tokens/s", va="center")
    axes.set_xlim(0, max(left) * 1.25)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    axes.set_title(NOTE, fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
