"""Measure the perplexity of an exported folder in 8 and 4 bits, compared with the original, on a CPU.

    python scripts/bench_quantized.py FOLDER text=FILE [kinds=torchao-int8,torchao-int4,bnb-int8,bnb-nf4]
        [rows=24] [trust_remote_code=true] [out=FILE.json]

FILE is text, or JSONL with a field `text`; the end of it is used, as `rows` rows of the model's length.
torchao quantizes the linear layers after loading; bitsandbytes quantizes them while transformers loads, which
on a CPU needs transformers 5. The output projection is tied to the embedding: bitsandbytes skips it, torchao
uses a quantized copy for the logits. Missing packages are reported and skipped. A folder with the network's
own code needs `trust_remote_code=true`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

# Loads a folder by transformers: `load(torch_dtype=..., quantization_config=...)`.
Load = Callable[..., Any]


def main(words: list[str]) -> int:
    folder = words[0]
    options = {"kinds": ",".join(KINDS), "rows": "24", "trust_remote_code": "false", "out": ""}
    options |= dict(word.split("=", 1) for word in words[1:])
    rows = rows_of(Path(options["text"]), folder, int(options["rows"]))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {rows.numel():,} tokens")
    trusted = options["trust_remote_code"] == "true"

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, **options).eval()

    whole = perplexity(load(torch_dtype=torch.float32), rows)
    measured: list[dict[str, Any]] = [{"kind": "float32", "perplexity": whole, "ratio": 1.0}]
    for kind in options["kinds"].split(","):
        try:
            model = KINDS[kind](load)
        except (ImportError, RuntimeError) as error:
            print(f"{kind:<14} left out: {str(error).splitlines()[0][:90]}")
            continue
        found = perplexity(model, rows)
        measured.append({"kind": kind, "perplexity": found, "ratio": found / whole})
    for row in measured:
        print("{kind:<14} perplexity {perplexity:10.3f}   ratio {ratio:.4f}".format(**row))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(measured, indent=2) + "\n")
    return 0


def torchao_int8(load: Load) -> Any:
    """Weights in 8 bits, one scale a row; activations stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(torch_dtype=torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_int4(load: Load) -> Any:
    """Weights in 4 bits, one scale for 32 of them; the rest is bfloat16, as its kernel wants."""
    from torchao.dtypes import Int4CPULayout
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = load(torch_dtype=torch.bfloat16)
    quantize_(model, Int4WeightOnlyConfig(group_size=32, layout=Int4CPULayout()))
    return model


def bitsandbytes_int8(load: Load) -> Any:
    """LLM.int8 (https://arxiv.org/abs/2208.07339)."""
    return _by_bitsandbytes(load, load_in_8bit=True)


def bitsandbytes_nf4(load: Load) -> Any:
    """The 4-bit format of QLoRA (https://arxiv.org/abs/2305.14314)."""
    return _by_bitsandbytes(
        load, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def _by_bitsandbytes(load: Load, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**options)
    return load(quantization_config=config, torch_dtype=torch.float32, device_map="cpu")


KINDS: dict[str, Callable[[Load], Any]] = {
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
    "bnb-int8": bitsandbytes_int8,
    "bnb-nf4": bitsandbytes_nf4,
}


def rows_of(file: Path, folder: str, rows: int) -> torch.Tensor:
    """The end of a text as ids, (rows, max_seq_len)."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = tokenizer.model_max_length
    ids = tokenizer(text[-16 * rows * length :])["input_ids"]
    rows = min(rows, len(ids) // length)
    return torch.tensor(ids[len(ids) - rows * length :]).view(rows, length)


@torch.inference_mode()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of all tokens but each row's first."""
    losses = [float(model(row[None], labels=row[None]).loss) for row in rows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
