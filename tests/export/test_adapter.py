"""Adapters in peft's format: what such a folder tells, and how it is read with its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mptfoundry.architecture.trainable import LoRAConfig
from mptfoundry.checkpoints.adapters import AdaptedWeights
from mptfoundry.checkpoints.reading import load_network, open_model
from mptfoundry.checkpoints.source import ModelSource
from mptfoundry.checkpoints.weights import TensorOutline
from mptfoundry.cli import main
from mptfoundry.errors import CheckpointError
from mptfoundry.export.adapter import AdapterSummary, export_adapter
from mptfoundry.export.folder import export
from mptfoundry.mpt.config import AttnConfig
from tests.conftest import TINY

LORA = LoRAConfig(r=2, lora_alpha=6, target_modules=("Wqkv", "down_proj"))
STEEP = replace(TINY, attn_config=AttnConfig(alibi=True, alibi_bias_max=16))


@dataclass(frozen=True)
class InMemory:
    """Weights that are tensors."""

    tensors: dict[str, torch.Tensor]

    @property
    def outlines(self) -> dict[str, TensorOutline]:
        return {name: TensorOutline(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Any = None) -> torch.Tensor:
        return self.tensors[name].to(dtype or torch.float32)


def adapted(base: ModelSource) -> ModelSource:
    """A run's adapters on a base, drawn at random."""
    draw = torch.Generator().manual_seed(3)
    shapes = LORA.adapter_shapes(base.config)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return replace(base, weights=AdaptedWeights(base, InMemory(tensors), LORA))


@pytest.fixture
def bases(write_run: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """A run, folders in both formats, and a folder as the hub's cache keeps it."""
    run, steep = write_run(), write_run(STEEP, name="steep")
    snapshot = tmp_path / "models--org--mpt" / "snapshots" / "abc"
    export(run, tmp_path / "native", dtype="fp32", progress=False)
    export(steep, tmp_path / "custom", dtype="fp32", progress=False)
    shutil.copytree(tmp_path / "native", snapshot)
    folders = {"native": tmp_path / "native", "custom": tmp_path / "custom", "hub": snapshot}
    return {"run": run, "steep run": steep, **folders}


def write(base: Path, out: Path, tokenizer: Any) -> AdapterSummary:
    return export_adapter(adapted(open_model(base)), out, torch.float32, tokenizer, overwrite=True)


def test_an_adapter_names_its_base_and_says_how_to_load_both(
    bases: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    for kind, base in bases.items():
        summary = write(base, tmp_path / "adapter", tiny_tokenizer)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        name = {"hub": "org/mpt", "run": f"{base}/ep0-ba10-rank0.pt"}.get(kind.split()[-1], str(base))
        assert config["base_model_name_or_path"] == name
        assert config["revision"] == ("abc" if kind == "hub" else None)
        options = {"hub": ', revision="abc"'}.get(kind, "")
        options += ", trust_remote_code=True" * (kind in ("custom", "steep run"))
        folder = "HF_FOLDER" if "run" in kind else name
        for text in (str(summary), (tmp_path / "adapter" / "README.md").read_text()):
            assert f'AutoModelForCausalLM.from_pretrained("{folder}"{options})\n' in text
            assert (f"mptfoundry export {name} HF_FOLDER\n" in text) == ("run" in kind)


@pytest.mark.parametrize("kind", ["native", "custom"])
def test_the_readme_of_an_adapter_loads_it(
    bases: dict[str, Path],
    tmp_path: Path,
    tiny_tokenizer: Any,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'mptfoundry[peft]'")
    write(bases[kind], tmp_path / "adapter", tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    code = Path("adapter/README.md").read_text().split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(code, made)
    ids = made["tokenizer"]("def rows(table):", return_tensors="pt")["input_ids"]
    network, _ = load_network(tmp_path / "adapter", base=str(bases[kind]))
    with torch.no_grad():
        # peft adds the adapter's product to the base's; here the matrices are added, with other rounding.
        expected = network(ids).logits
        limit = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(made["model"](ids).logits, expected, rtol=0, atol=limit)


def test_an_adapter_is_read_with_the_base_that_is_named(
    bases: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    write(bases["run"], tmp_path / "adapter", tiny_tokenizer)
    expected = dict(adapted(open_model(bases["run"])).tensors())
    for base in ("run", "native"):
        source = open_model(tmp_path / "adapter", base=str(bases[base]))
        assert source.tokenizer_folder == tmp_path / "adapter"
        for name, tensor in source.tensors():
            assert torch.equal(tensor, expected[name])


def test_an_adapter_alone_is_called_that_and_the_advice_works(
    bases: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = str(tmp_path / "adapter"), f"base={bases['native']}"
    write(bases["native"], tmp_path / "adapter", tiny_tokenizer)
    for words in (["generate", adapter, "def"], ["export", adapter, adapter + "-out"]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"adapter: is an adapter of {bases['native']}, not a whole model." in said
        assert "base=MODEL" in said
    assert main(["generate", adapter, "def", base, "max_new_tokens=2"]) == 0
    assert main(["export", adapter, f"{adapter}-out", base, "dtype=fp32"]) == 0
    expected = dict(adapted(open_model(bases["native"])).tensors())
    assert all(torch.equal(t, expected[name]) for name, t in open_model(f"{adapter}-out").tensors())
    assert main(["generate", str(bases["native"]), "def", base]) == 1
    assert "is not an adapter in peft's format, so it has none. Remove it." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"use_dora": True}, "use_dora is True, which is not read here. Merge it into its base"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0, which is not read here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not read here"),
        ({"bias": "all"}, "bias is 'all', which is not read here"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'. Only LORA is read."),
        ({"target_modules": ["q_proj"]}, "'q_proj' is not a matrix of a block"),
        ({"target_modules": 3}, "adapter_config.json: "),
        ({"r": "eight"}, "adapter_config.json: "),
        ({"r": 4}, r"doesn't fit .*lora_A.weight has the shape \(2, 32\), its config says \(4, 32\)"),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_refused(
    write_run: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any, change: dict[str, Any], text: str
) -> None:
    base, file = write_run(), tmp_path / "adapter" / "adapter_config.json"
    write(base, tmp_path / "adapter", tiny_tokenizer)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=text):
        open_model(tmp_path / "adapter", base=str(base))


def test_adapters_that_nothing_asks_for_are_refused(
    write_run: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    base, file = write_run(), tmp_path / "adapter" / "adapter_model.safetensors"
    write(base, tmp_path / "adapter", tiny_tokenizer)
    save_file(load_file(file) | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"lm_head.lora_A.weight is not of this architecture"):
        open_model(tmp_path / "adapter", base=str(base))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_adapters_that_are_stored_in_another_format_are_refused(
    write_run: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any, dtype: torch.dtype
) -> None:
    base, file = write_run(), tmp_path / "adapter" / "adapter_model.safetensors"
    write(base, tmp_path / "adapter", tiny_tokenizer)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"lora_\w.weight is stored as {kind}. Weights are read as"):
        open_model(tmp_path / "adapter", base=str(base))


def test_adapters_that_are_not_finite_are_not_written(
    write_run: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    source = adapted(open_model(write_run()))
    assert isinstance(source.weights, AdaptedWeights)
    for tensor in list(source.weights.adapters.tensors.values())[:1]:  # type: ignore[attr-defined]
        tensor.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="holds NaN or infinity as float32"):
        export_adapter(source, tmp_path / "adapter", torch.float32, tiny_tokenizer, overwrite=True)
    assert not (tmp_path / "adapter").exists()
