"""Other people's software on an exported folder; what isn't installed is left out with that reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mptfoundry.export.folder import export
from tests.conftest import TINY
from tests.mpt.reference import livelier

TEXT = "def rows(table):"
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
OLD = VERSION < (5, 0)


@pytest.fixture
def folder(write_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A native folder whose greedy choices depend on what was said."""
    wide = replace(TINY, d_model=64)
    export(write_run(wide, livelier(wide)), tmp_path / "out", dtype="fp32", progress=False)
    return tmp_path / "out"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def encode(folder: Path) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, tokenizer(TEXT, return_tensors="pt")


def test_ctranslate2_generates_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    if OLD and tuple(map(int, ctranslate2.__version__.split(".")[:2])) > (4, 6):
        pytest.skip("ctranslate2 4.7 and later needs a newer transformers")
    converter = ctranslate2.converters.TransformersConverter(str(folder), trust_remote_code=True)
    converter.convert(str(tmp_path / "ctranslate2"))
    tokenizer, batch = encode(folder)
    expected = load(folder).generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=None)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    generator = ctranslate2.Generator(str(tmp_path / "ctranslate2"), compute_type="float32")
    result = generator.generate_batch(
        [tokens], max_length=len(tokens) + 19, sampling_topk=1, include_prompt_in_result=True, end_token=[]
    )
    assert result[0].sequences_ids[0] == expected[0].tolist()


def test_onnx_generates_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    reason = "optimum-onnx is not installed"
    exporters = pytest.importorskip("optimum.exporters.onnx", reason=reason)
    runtime = pytest.importorskip("optimum.onnxruntime", reason=reason)
    exporters.main_export(
        str(folder), tmp_path / "onnx", task="text-generation-with-past", no_post_process=True
    )
    model, exported = load(folder), runtime.ORTModelForCausalLM.from_pretrained(tmp_path / "onnx")
    tokenizer, _ = encode(folder)
    for text in (TEXT, "x", 3 * TEXT):
        batch = tokenizer(text, return_tensors="pt")
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(exported.generate(**batch, **options), model.generate(**batch, **options))


def test_openvino_generates_the_same_tokens(folder: Path) -> None:
    openvino = pytest.importorskip("optimum.intel.openvino", reason="optimum-intel is not installed")
    if VERSION < (4, 57):
        pytest.skip("optimum-intel exports MPT from transformers 4.57 on")
    model = load(folder)
    exported = openvino.OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    tokenizer, _ = encode(folder)
    for text in (TEXT, "x", 3 * TEXT):
        batch = tokenizer(text, return_tensors="pt")
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(exported.generate(**batch, **options), model.generate(**batch, **options))


def test_peft_finds_the_layers_by_itself(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"Wqkv"}
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()


# How far apart the logits of two models are that have nothing in common, in the lengths of either.
UNRELATED = 2**0.5


def change(folder: Path, quantized: Any) -> float:
    """How far quantization moves the logits, in their length."""
    _, batch = encode(folder)
    with torch.inference_mode():
        whole, rounded = load(folder)(**batch).logits, quantized(**batch).logits
    return ((rounded - whole).norm() / whole.norm()).item()


def test_torchao_takes_the_linear_layers_to_8_bits(folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = load(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weight = model.transformer.blocks[0].attn.Wqkv.weight
    assert type(weight) not in (torch.Tensor, torch.nn.Parameter), type(weight)
    assert 0 < change(folder, model) < UNRELATED / 10


def test_bitsandbytes_takes_them_at_load(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    on_gpu = torch.cuda.is_available()
    if OLD and not on_gpu:
        pytest.skip("transformers 4 has no bitsandbytes on a CPU")
    changes = []
    for options in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        config = transformers.BitsAndBytesConfig(**options)
        model = load(folder, quantization_config=config, device_map="cuda" if on_gpu else "cpu")
        assert type(model.transformer.blocks[0].attn.Wqkv).__name__ in ("Linear8bitLt", "Linear4bit")
        changes.append(change(folder, model))
    assert 0 < changes[0] < changes[1] < UNRELATED / 2
