"""Folders that bring the network's own code, loaded where mptfoundry, triton and flash-attn don't exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.export.custom import copy_code, custom_config
from mptfoundry.export.shards import write_shards
from mptfoundry.mpt.config import ActivationConfig, AttnConfig, FFNConfig, MPTConfig
from mptfoundry.mpt.hf import MPTFoundryForCausalLM
from mptfoundry.mpt.network import MPT
from tests.mpt.reference import in_float64, livelier, rms

pytestmark = pytest.mark.long

TINY = MPTConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=384)
ARCHITECTURES = {
    "steep_slopes": replace(
        TINY, no_bias=True, attn_config=AttnConfig(alibi=True, alibi_bias_max=16, clip_qkv=6.0)
    ),
    "biases_and_learned_positions": TINY,
    "qk_ln_and_rms_norm": replace(
        TINY, norm_type="rmsnorm", norm_eps=1e-3, attn_config=AttnConfig(alibi=True, qk_ln=True)
    ),
    "grouped_queries_and_qk_gn": replace(
        TINY,
        attn_config=AttnConfig(alibi=True, qk_gn=True, attn_type="grouped_query_attention", kv_n_heads=2),
    ),
    "one_key_head_rotary_window": replace(
        TINY, attn_config=AttnConfig(rope=True, attn_type="multiquery_attention", sliding_window_size=4)
    ),
    "gated_untied_softcaps": replace(
        TINY,
        ffn_config=FFNConfig(ffn_type="mptglu", ffn_hidden_size=48, ffn_act_fn=ActivationConfig("silu")),
        tie_word_embeddings=False,
        final_logit_softcapping=4.0,
        logit_scale=0.7,
        attn_config=AttnConfig(rope=True, attn_logit_softcapping=5.0, softmax_scale=0.3),
    ),
    "prefix_and_wide_heads": replace(
        TINY, head_dim=12, expansion_ratio=2, attn_config=AttnConfig(alibi=True, prefix_lm=True)
    ),
}
EACH = pytest.mark.parametrize("name", ARCHITECTURES)

# Loads every folder below the first argument; what it finds goes to the second.
ELSEWHERE = """
import json, sys
from pathlib import Path

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("mptfoundry", "triton", "flash_attn")
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from safetensors.torch import load_file, save_file
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, pipeline

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
STOCK = ("Model", *("For" + head for head in ("CausalLM", *HEADS)))
torch.set_num_threads(1)
folders, out = Path(sys.argv[1]), Path(sys.argv[2])
batch = load_file(folders / "batch.safetensors")
tensors, words = {}, {}
for folder in sorted(path for path in folders.iterdir() if path.is_dir()):
    refusals = []
    for options in ({}, {"trust_remote_code": False}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **options)
        except ValueError as error:
            refusals.append(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        tensors[folder.name] = model(**batch).logits
    model.save_pretrained(out / "again" / folder.name)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out / "again" / folder.name)
    stock = []
    for place in (folder, out / "again" / folder.name):
        for name in STOCK:
            try:
                getattr(transformers, "Mpt" + name).from_pretrained(place)
                stock.append(f"Mpt{name} has loaded {place}")
            except Exception as error:
                stock.append(str(error))
    # Trainer reads a checkpoint's config like this, and some versions of AutoTokenizer do.
    plain = PretrainedConfig.from_json_file(out / "again" / folder.name / "config.json")
    again, found = AutoModelForCausalLM.from_pretrained(
        out / "again" / folder.name, trust_remote_code=True, output_loading_info=True
    )
    with torch.no_grad():
        is_same = torch.equal(again(**batch).logits, tensors[folder.name])
    words[folder.name] = {
        "refusals": refusals,
        "stock": stock,
        "problem_type": plain.problem_type,
        "module": type(model).__module__,
        "again": is_same and not any(found[key] for key in ("missing_keys", "unexpected_keys")),
        "files": sorted(path.name for path in (out / "again" / folder.name).iterdir()),
    }
write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
written = write("def rows(", max_new_tokens=5, do_sample=False, return_tensors=True)
words["written"] = [folder.name, written[0]["generated_token_ids"]]
words["modules"] = sorted({name.split(".")[0] for name in sys.modules})
save_file(tensors, out / "logits.safetensors")
(out / "words.json").write_text(json.dumps(words))
"""


def network(name: str) -> MPT:
    return livelier(ARCHITECTURES[name])


def write_folder(folder: Path, made: MPT, tokenizer: Any) -> Path:
    folder.mkdir(parents=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}
    write_shards(folder, shapes, iter(made.state_dict().items()), torch.float32, 20_000, lambda _: None)
    config = custom_config(made.config, tokenizer, torch.float32)
    config["attn_config"]["attn_pdrop"] = (
        0  # transformers 5 takes no other number, and would refuse 0.0 first
    )
    (folder / "config.json").write_text(json.dumps(config))
    copy_code(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder for each architecture, and a batch of two rows, the second padded on the left."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("custom") / "folders"
    for name in ARCHITECTURES:
        write_folder(root / name, network(name), tiny_tokenizer)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    ids = torch.randint(384, (2, 20), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids, "attention_mask": mask}, root / "batch.safetensors")
    return root


@pytest.fixture(scope="module")
def elsewhere(folders: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits and findings of a fresh process in which the folders are all there is."""
    out = folders.parent / "out"
    out.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_MODULES_CACHE": str(folders.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folders), str(out)],
        cwd=folders,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "logits.safetensors"), json.loads((out / "words.json").read_text())


@EACH
def test_logits_are_the_networks(
    folders: Path, elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]], name: str
) -> None:
    batch = load_file(folders / "batch.safetensors")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    made = network(name)
    with torch.no_grad():
        truth = in_float64(made)(ids, attention_mask=mask).logits[mask]
        plain, given = made(ids, attention_mask=mask).logits[mask], elsewhere[0][name][mask]
    assert rms(given - truth) <= 2 * rms(plain - truth)


@EACH
def test_a_load_without_the_folders_code_is_refused(
    elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]], name: str
) -> None:
    refusals = elsewhere[1][name]["refusals"]
    assert len(refusals) == 2
    assert all("trust_remote_code=True" in refusal for refusal in refusals)


@EACH
def test_transformers_own_classes_reject_the_kind_of_attention(
    elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]], name: str
) -> None:
    """In the folder and in its copy; they would compute something else."""
    rejections = elsewhere[1][name]["stock"]
    assert len(rejections) == 2 * 5
    for text in rejections:
        assert re.search(r"attn_type.*(Received:|got) grouped_query_attention", text, re.DOTALL), text
    assert elsewhere[1][name]["problem_type"] is None


@EACH
def test_the_heads_are_written_as_numbers(folders: Path, name: str) -> None:
    values, config = json.loads((folders / name / "config.json").read_text()), ARCHITECTURES[name]
    assert values["attn_config"]["kv_n_heads"] == config.kv_heads
    assert values["head_dim"] == config.d_head


@EACH
def test_a_folder_of_an_earlier_version_loads(folders: Path, tmp_path: Path, name: str) -> None:
    """It refused transformers' own classes by a value under `problem_type`."""
    shutil.copytree(folders / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    heads = {"head_dim": ARCHITECTURES[name].head_dim}
    before = {"problem_type": "none of these: it needs AutoModelForCausalLM and trust_remote_code=True"}
    attention = {"attn_config": ARCHITECTURES[name].to_dict()["attn_config"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **heads, **before, **attention}))
    assert open_model(tmp_path / name).config == ARCHITECTURES[name]
    model = MPTFoundryForCausalLM.from_pretrained(tmp_path / name)
    assert model.config.network_config() == ARCHITECTURES[name] and model.config.problem_type is None


@EACH
def test_a_saved_copy_is_whole_with_its_code(
    folders: Path, elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]], name: str
) -> None:
    found = elsewhere[1][name]
    assert found["again"]
    assert {file.name for file in (folders / name).glob("*.py")} <= set(found["files"])


def test_the_pipeline_writes_what_the_network_would(
    elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]], tiny_tokenizer: Any
) -> None:
    name, written = elsewhere[1]["written"]
    ids = tiny_tokenizer("def rows(")["input_ids"]
    made = network(name)
    for _ in range(5):
        ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
    assert written == ids


def test_nothing_else_was_imported(elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    modules = set(elsewhere[1]["modules"])
    assert not modules & {"mptfoundry", "triton", "flash_attn"}
    assert all(elsewhere[1][name]["module"].startswith("transformers_modules.") for name in ARCHITECTURES)


@pytest.fixture
def load_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Load a folder's own code into this process; its modules are forgotten afterwards, others' before."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Once it has loaded code from another cache, Python would look there first.
    elsewhere = [entry for entry in sys.path if not Path(entry, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    yield lambda folder, **options: AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    forget()


def test_several_folders_and_the_package_live_in_one_process(
    folders: Path, load_here: Callable[..., Any]
) -> None:
    ids = torch.arange(9)[None]
    for name in ("steep_slopes", "gated_untied_softcaps"):
        model = load_here(folders / name)
        assert type(model).__module__.startswith("transformers_modules.")
        torch.testing.assert_close(model(ids).logits, network(name)(ids).logits)


@pytest.mark.parametrize("blocks", ["cpu", "disk"])
def test_a_model_may_lie_in_several_places(
    folders: Path, load_here: Callable[..., Any], tmp_path: Path, blocks: str
) -> None:
    pytest.importorskip("accelerate", reason="transformers' device_map needs it")
    places = {"transformer": "cpu", "lm_head": "cpu"}
    if blocks == "disk":
        parts = ("wte", "emb_drop", "norm_f", "blocks.0")
        places = {"lm_head": "cpu", **{f"transformer.{part}": "cpu" for part in parts}}
        places["transformer.blocks.1"] = "disk"
    model = load_here(folders / "steep_slopes", device_map=places, offload_folder=tmp_path / "disk")
    assert model.transformer.blocks[1].ffn.up_proj.weight.is_meta == (blocks == "disk")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, network("steep_slopes")(ids).logits)


def test_a_loss_is_computed_where_the_last_matrix_lies(
    folders: Path, load_here: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers' device_map needs it")
    places = {"transformer": "cpu", "lm_head": "disk"}
    name, ids = "gated_untied_softcaps", torch.arange(9)[None]
    model = load_here(folders / name, device_map=places, offload_folder=tmp_path / "disk")
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, network(name)(ids, labels=ids).loss)


@EACH
def test_a_custom_folder_is_read_back_as_the_model_it_was(folders: Path, name: str) -> None:
    assert open_model(folders / name).config == ARCHITECTURES[name]


def test_the_backend_is_chosen_by_who_loads_it(tiny_tokenizer: Any) -> None:
    trained = replace(TINY, attn_config=AttnConfig(alibi=True, attn_impl="flash"))
    config = custom_config(trained, tiny_tokenizer, torch.bfloat16)
    assert config["attn_config"]["attn_impl"] == "auto"
    assert config["torch_dtype"] == "bfloat16"
    assert config["model_type"] == "mptfoundry"


def test_the_code_is_flat_and_as_it_is(tmp_path: Path) -> None:
    files = copy_code(tmp_path)
    assert {"hf.py", "network.py", "config.py"} <= {file.name for file in files}
    assert sorted(tmp_path.iterdir()) == sorted(files)
    import mptfoundry.mpt.hf

    assert (tmp_path / "hf.py").read_bytes() == Path(mptfoundry.mpt.hf.__file__).read_bytes()
