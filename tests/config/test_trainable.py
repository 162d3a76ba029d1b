from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mptfoundry.architecture.trainable import LoRAConfig, count_trainable, names_in
from mptfoundry.config.run import TrainConfig
from mptfoundry.mpt.config import AttnConfig, FFNConfig, MPTConfig
from mptfoundry.plan.devices import Device
from mptfoundry.plan.plan import make_plan
from mptfoundry.plan.table import summary_table

Problems = Callable[..., tuple[str, ...]]
Load = Callable[..., TrainConfig]
TINY = MPTConfig(
    d_model=8, n_heads=2, n_layers=2, vocab_size=16, no_bias=True, attn_config=AttnConfig(alibi=True)
)
LORA = ("model.peft_config.r=4", "load_path=base", "load_weights_only=true")


def cpu() -> Device:
    return Device(
        kind="cpu", name="CPU", count=1, per_node=1, memory=2**34, cores=2, peak_flops=None, found=""
    )


def test_adapters_are_counted_by_hand() -> None:
    lora = LoRAConfig(r=2, target_modules=("Wqkv", "down_proj"))
    # each of two blocks: 2 x (8 + 24) beside Wqkv, 2 x (32 + 8) beside down_proj
    found = count_trainable(TINY, lora, ())
    assert found.parameters == found.adapters == 2 * (64 + 80)
    assert found.frozen == 16 * 8 + 2 * (2 * 8 + 8 * 24 + 8 * 8 + 2 * 8 * 32) + 8
    assert found.extra_flops_per_token == 6 * found.adapters - 2 * found.frozen


def test_all_linear_is_every_matrix_of_a_block() -> None:
    gated = MPTConfig(d_model=8, n_heads=2, n_layers=1, ffn_config=FFNConfig(ffn_type="mptglu"))
    every = LoRAConfig(target_modules=("all-linear",))
    assert every.targets(gated) == ("Wqkv", "out_proj", "up_proj", "down_proj", "gate_proj")
    assert every.targets(TINY) == LoRAConfig().targets(TINY) == ("Wqkv", "out_proj", "up_proj", "down_proj")


def test_the_scale_is_by_the_rank_or_by_its_root() -> None:
    assert LoRAConfig(r=4, lora_alpha=16).scaling == 4
    assert LoRAConfig(r=4, lora_alpha=16, use_rslora=True).scaling == 8


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.peft_config.r=0", "0 is too small. Use 1 or more."),
        ("model.peft_config.lora_alpha=0", "0.0 is not positive. Use r, or twice as much."),
        ("model.peft_config.lora_dropout=1", "1.0 is not a probability from 0 to below 1."),
        ("model.peft_config.target_modules=[]", "is empty. Name a matrix, or all-linear."),
        (
            "model.peft_config.target_modules=wqkv",
            "'wqkv' is not a matrix of a block. Did you mean Wqkv? Allowed: Wqkv, out_proj, up_proj, "
            "down_proj, or all-linear alone.",
        ),
        ("model.peft_config.peft_type=IA3", "'IA3' is not allowed here. Expected LORA."),
    ],
)
def test_adapters_that_can_not_be_are_refused(problems: Problems, word: str, said: str) -> None:
    assert problems(words=(*LORA[1:], word)) == (f"command line: {word}: {said}",)


def test_adapters_need_a_base_of_which_only_the_weights_are_taken(problems: Problems) -> None:
    (text,) = problems(words=LORA[:1])
    assert "model.peft_config: trains on top of the weights of a base model. Name it in" in text
    (text,) = problems(words=LORA[:2])
    assert text.endswith(
        "is the adapters' base, of which only the weights are taken. Set load_weights_only: true."
    )
    (text,) = problems(words=(LORA[0], "load_path=s3://a/b", "load_weights_only=true"))
    assert text.endswith("is the adapters' base, and is read from this machine. Name a local path.")


def test_what_would_leave_adapters_without_gradients_is_refused(problems: Problems) -> None:
    (text,) = problems(words=(*LORA, "fsdp_config.activation_checkpointing_reentrant=true"))
    assert "Remove it." in text


def test_few_bits_are_for_adapters_on_a_whole_base(problems: Problems, load: Load) -> None:
    (text,) = problems(words=("model.load_in_4bit=true",))
    assert text.endswith("model.load_in_4bit=true: can't be trained. Add adapters: peft_config.")
    (text,) = problems(words=(*LORA, "model.load_in_8bit=true", "model.load_in_4bit=true"))
    assert "load_in_8bit and load_in_4bit are both given. Use one of them." in text
    (text,) = problems(words=(*LORA, "model.load_in_8bit=true", "fsdp_config.version=2"))
    assert text.endswith("is for whole models: a quantized base can't be sharded. Remove fsdp_config.")
    whole, few = (load(words=(*LORA, *more)) for more in ((), ("model.load_in_4bit=true",)))
    matrices = 2 * 12 * 64 * 64
    saved = make_plan(whole, cpu()).memory.weights - make_plan(few, cpu()).memory.weights
    assert saved == matrices * 4 - matrices // 2


def test_a_pattern_that_names_nothing_or_everything_is_refused_before_the_run(problems: Problems) -> None:
    (text,) = problems(words=("optimizer.disable_grad=[wte,wpee]",))
    assert text.startswith("command line: optimizer.disable_grad=[wte,wpee]: wpee matches no parameter.")
    (text,) = problems(words=("optimizer.disable_grad=.",))
    assert (
        text
        == "command line: optimizer.disable_grad=.: every parameter is frozen. Leave at least one trainable."
    )
    (text,) = problems(words=("optimizer.param_groups=[{param_str_match: nrom_f, lr: 1}]",))
    assert "nrom_f matches no parameter. The nearest names are transformer.norm_f" in text
    groups = "optimizer.param_groups=[{param_str_match: norm}, {param_str_match: norm_f}]"
    (text,) = problems(words=(groups,))
    assert "norm_f matches only parameters that are frozen or in a group above. Move the group up" in text
    groups = "optimizer.param_groups=[{param_str_match: wte}]"
    (text,) = problems(words=("optimizer.disable_grad=wte", groups))
    assert "wte matches only parameters that are frozen" in text
    (text,) = problems(words=(*LORA, "optimizer.disable_grad=lora_"))
    assert text.endswith("every parameter is frozen. Leave at least one trainable.")


def test_check_shows_what_is_learned(load: Load) -> None:
    assert "  trainable " not in summary_table(load(), cpu())
    text = summary_table(load(words=("optimizer.disable_grad=[wte,blocks.0.]",)), cpu())
    assert "  trainable" in text and "; frozen: wte, blocks.0." in text
    text = summary_table(load(words=LORA), cpu())
    assert "LoRA of rank 4 on Wqkv, out_proj, up_proj, down_proj" in text


@pytest.mark.parametrize("words", [("optimizer.disable_grad=[wte,blocks.0.]",), LORA])
def test_what_is_frozen_needs_no_gradients_and_no_optimizer_state(load: Load, words: tuple[str, ...]) -> None:
    # Gradients exist at the peak of a step if they are accumulated.
    twice = ("global_train_batch_size=8", "device_train_microbatch_size=4")
    all_of_it, some = make_plan(load(words=twice), cpu()), make_plan(load(words=(*words, *twice)), cpu())
    assert some.trainable.parameters < all_of_it.trainable.parameters == all_of_it.parameters
    assert some.memory.gradients == some.memory.optimizer == 4 * some.trainable.parameters
    assert some.memory.weights == 4 * (some.parameters + some.trainable.adapters)
    assert some.memory.logits < all_of_it.memory.logits
    assert some.flops_per_token < all_of_it.flops_per_token


def test_more_rank_is_more_memory(load: Load) -> None:
    twice = ("global_train_batch_size=8", "device_train_microbatch_size=4")
    one, other = (
        make_plan(load(words=(*LORA, *twice, f"model.peft_config.r={r}")), cpu()).memory for r in (4, 64)
    )
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(one, part) < getattr(other, part)


def test_names_are_those_that_peft_gives() -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'mptfoundry[peft]'")
    import torch

    from mptfoundry.models.lora import add_adapters
    from mptfoundry.mpt.network import MPT

    for lora in (LoRAConfig(r=2), LoRAConfig(r=3, target_modules=("Wqkv",))):
        network: Any = MPT(TINY, device="meta")
        options = {"r": lora.r}
        nothing = torch.zeros(32, dtype=torch.uint8)
        add_adapters(network, options, targets=lora.targets(TINY), fingerprint=nothing, seed=1)
        found = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        assert names_in(TINY, lora) == found
        learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert learned == count_trainable(TINY, lora, ()).parameters
