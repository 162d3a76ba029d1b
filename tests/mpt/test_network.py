from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MptConfig, MptForCausalLM

from mptfoundry.data.collate import RowCollator
from mptfoundry.mpt.config import (
    ActivationConfig,
    AttnConfig,
    FFNConfig,
    MPTConfig,
    RotaryScalingConfig,
)
from mptfoundry.mpt.network import MPT, KVCache, MPTOutput

from .reference import assert_as_exact, assert_gradients_as_exact, in_float64, livelier, rms


def config(attention: dict[str, Any] | None = None, **rest: Any) -> MPTConfig:
    shape = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64}
    return MPTConfig(**{**shape, **rest}, attn_config=AttnConfig(**(attention or {})))


ARCHITECTURES = {
    "mpt": config({"alibi": True}, no_bias=True),
    "learned positions": config(norm_type="layernorm", attention_bias=False),
    "rotary": config({"rope": True, "clip_qkv": 0.5}),
    "scaled rotary": config(
        {
            "rope": True,
            "rope_impl": "hf",
            "rope_hf_config": RotaryScalingConfig(type="linear", factor=2.0),
        }
    ),
    "grouped queries, qk_ln": config(
        {"alibi": True, "qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}
    ),
    "one key head, qk_gn, window": config(
        {"alibi": True, "qk_gn": True, "attn_type": "multiquery_attention", "sliding_window_size": 5}
    ),
    "gated, rms, softcaps, untied": config(
        {"rope": True, "attn_logit_softcapping": 5.0, "softmax_scale": 0.3},
        norm_type="low_precision_rmsnorm",
        ffn_config=FFNConfig(ffn_type="mptglu", ffn_hidden_size=80, ffn_act_fn=ActivationConfig("silu")),
        final_logit_softcapping=4.0,
        logit_scale="inv_sqrt_d_model",
        tie_word_embeddings=False,
    ),
    "wide heads, plain positions": config(head_dim=20, learned_pos_emb=False),
}
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)


def network(name: str) -> MPT:
    return livelier(ARCHITECTURES[name])


def tokens(batch: int, seq: int, vocab: int = 101) -> torch.Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(2))


def native_pair(**attention: Any) -> tuple[MPT, MptForCausalLM]:
    """Our network and transformers' of the same weights."""
    heads = attention.pop("n_heads", 4)
    shape = {"d_model": 8 * heads, "n_heads": heads, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64}
    ours = MPT(config({"alibi": True, **attention}, **shape, no_bias=True), seed=1).eval()
    torch.manual_seed(0)
    theirs = MptForCausalLM(MptConfig(**shape, attn_config=attention)).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})
    return ours, theirs


@pytest.mark.parametrize(
    "attention",
    [{}, {"n_heads": 12}, {"n_heads": 32}, {"clip_qkv": 0.2}, {"softmax_scale": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_equal_those_of_transformers(attention: dict[str, Any], padding: str) -> None:
    ours, theirs = native_pair(**attention)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.bool)
    if padding != "none":
        mask[1, slice(0, 9) if padding == "left" else slice(31, 40)] = False
    with torch.no_grad():
        truth = in_float64(ours)(ids, attention_mask=mask).logits[mask]
        logits = ours(ids, attention_mask=mask if padding != "none" else None).logits[mask]
        native = theirs(ids, attention_mask=mask.long()).logits[mask]
    assert rms(native - truth) < 1e-5 * rms(truth)
    assert_as_exact([logits], [native], [truth])


def test_loss_and_gradients_equal_those_of_transformers() -> None:
    ours, theirs = native_pair()
    exact, ids = in_float64(ours).train(), tokens(2, 60)
    labels = ids.masked_fill(ids < 20, -100)
    losses = [model(ids, labels=labels).loss for model in (ours.train(), exact)]
    losses.append(F.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[2])
    names = [name for name, _ in ours.named_parameters()]
    gradients = [[model.get_parameter(name).grad for name in names] for model in (ours, theirs, exact)]
    assert_gradients_as_exact(*gradients)


def test_weights_have_the_names_of_published_ones() -> None:
    with torch.device("meta"):
        theirs = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=100))
    ours = MPT(config({"alibi": True}, no_bias=True, d_model=64, vocab_size=100), device="meta").state_dict()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    assert {k: v.shape for k, v in ours.items()} == expected
    names = MPT(ARCHITECTURES["grouped queries, qk_ln"], device="meta").state_dict()
    assert names["transformer.blocks.1.attn.q_ln.weight"].shape == (48,)
    assert names["transformer.blocks.1.attn.k_ln.weight"].shape == (24,)
    assert names["transformer.blocks.1.attn.Wqkv.weight"].shape == (96, 48)
    assert "lm_head.weight" in MPT(ARCHITECTURES["gated, rms, softcaps, untied"], device="meta").state_dict()


@EACH
def test_left_right_and_no_padding_agree_on_real_tokens(architecture: str) -> None:
    model, ids, junk = network(architecture), tokens(2, 20), tokens(2, 7)
    real, none = torch.ones(2, 20, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    with torch.no_grad():
        alone = model(ids).logits
        left = model(torch.cat([junk, ids], 1), attention_mask=torch.cat([none, real], 1)).logits
        right = model(torch.cat([ids, junk], 1), attention_mask=torch.cat([real, none], 1)).logits
    torch.testing.assert_close(left[:, 7:], alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(right[:, :20], alone, atol=2e-5, rtol=1e-4)
    assert left.isfinite().all() and right.isfinite().all()


@EACH
def test_packed_documents_equal_the_same_documents_alone(architecture: str) -> None:
    model, ids = network(architecture), tokens(1, 30)
    lengths = [11, 1, 18]
    sequence_id = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = model(ids, sequence_id=sequence_id).logits.split(lengths, 1)
        for part, some in zip(packed, ids.split(lengths, 1), strict=True):
            torch.testing.assert_close(part, model(some).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_packed_row_teaches_what_its_examples_teach_alone(
    backend: str, request: pytest.FixtureRequest
) -> None:
    """As exactly as the torch backend in float32 computes one example after the other."""
    if backend == "triton":
        request.getfixturevalue("triton_runs")
    packed = MPT(config({"alibi": True, "attn_impl": backend}, d_model=64, no_bias=True), seed=1)
    plain = MPT(config({"alibi": True}, d_model=64, no_bias=True), seed=1)
    ids, lengths = tokens(1, 27)[0].numpy(), np.array([11, 1, 15])
    pieces = np.split(ids, lengths.cumsum()[:-1])
    row = {"input_ids": ids, "trained": np.ones(27, bool), "lengths": lengths, "sample_id": 0}
    batch = RowCollator(32)([row])
    given = {name: batch[name] for name in ("attention_mask", "sequence_id", "labels", "max_documents")}
    packed(batch["input_ids"], **given).loss.backward()

    def alone(made: MPT) -> list[torch.Tensor]:
        for some in map(torch.from_numpy, pieces):
            (made(some[None], labels=some[None]).loss * (len(some) - 1) / 24).backward()
        return gradients(made)

    assert_gradients_as_exact(gradients(packed), alone(plain), alone(in_float64(plain)))


def gradients(made: MPT) -> list[torch.Tensor]:
    return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]


@EACH
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_changes_nothing(architecture: str, padded: bool) -> None:
    model, ids = network(architecture), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    if padded:
        mask[1, :5] = False
    cache = KVCache(model.config, 2, 20, device="cpu", dtype=torch.float32)
    steps = [(0, 9), (9, 13), *((i, i + 1) for i in range(13, 20))]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        parts = []
        for start, stop in steps:
            some = mask[:, :stop] if padded and stop < 15 else None
            parts.append(model(ids[:, start:stop], attention_mask=some, cache=cache).logits)
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=2e-5, rtol=1e-4)


@EACH
def test_no_token_sees_a_later_one(architecture: str) -> None:
    model, ids = network(architecture), tokens(1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 101
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12] != after[:, 12]).any()


def test_a_prefix_sees_forward_and_only_within_itself() -> None:
    shape = config({"alibi": True, "prefix_lm": True})
    model, ids = MPT(shape, seed=1).eval(), tokens(1, 20)
    prefix = torch.arange(20)[None] < 8

    def moved(place: int) -> torch.Tensor:
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 101
        with torch.no_grad():
            before = model(ids, prefix_mask=prefix).logits
            after = model(changed, prefix_mask=prefix).logits
        return (before - after)[0].abs().amax(1) > 1e-6

    assert moved(7).all()
    assert moved(12).tolist() == [False] * 12 + [True] * 8
    cache = KVCache(shape, 1, 20, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        parts = [
            model(ids[:, :10], prefix_mask=prefix[:, :10], cache=cache).logits,
            model(ids[:, 10:], cache=cache).logits,
        ]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids, prefix_mask=prefix).logits)


def test_a_window_ends_what_a_layer_sees() -> None:
    shape = config({"alibi": True, "sliding_window_size": 3}, n_layers=1)
    model, ids = MPT(shape, seed=1).eval(), tokens(1, 20)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 101
    with torch.no_grad():
        moved = (model(ids).logits - model(changed).logits)[0].abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_training_gives_a_loss_and_evaluation_each_tokens() -> None:
    model, ids = MPT(ARCHITECTURES["mpt"], seed=1), tokens(2, 16)
    labels = ids.clone()
    labels[0, :5] = -100
    trained, evaluated = model.train()(ids, labels=labels), model.eval()(ids, labels=labels)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    assert trained.logits is None and trained.token_loss is None and trained.loss.dtype == torch.float32
    torch.testing.assert_close(evaluated.token_loss[:, :-1], expected)
    assert not evaluated.token_loss[:, -1].any() and evaluated.token_loss.shape == (2, 16)
    torch.testing.assert_close(trained.loss, expected.sum() / (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(evaluated.loss, trained.loss)


@EACH
def test_loss_and_logits_say_the_same(architecture: str) -> None:
    model, ids = network(architecture), tokens(2, 16)
    with torch.no_grad():
        output = model(ids, labels=ids)
        logits = model(ids).logits
        last = model(ids, last_only=True).logits
    torch.testing.assert_close(
        output.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    assert last.shape == (2, 1, 101)
    torch.testing.assert_close(last, logits[:, -1:])


@EACH
def test_every_weight_gets_a_gradient_and_checkpointing_does_not_change_it(architecture: str) -> None:
    model, ids = network(architecture).train(), tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    gradients = [x.grad for x in model.parameters()]
    assert all(x is not None and x.isfinite().all() for x in gradients)
    for block in model.transformer.blocks:
        plain = block.forward
        block.forward = lambda x, context, plain=plain: checkpoint(plain, x, context, use_reentrant=False)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before)


def test_dropout_is_there_in_training_and_absent_in_evaluation() -> None:
    for shape in (
        config({"alibi": True}, emb_pdrop=0.3),
        config({"alibi": True}, resid_pdrop=0.3),
        config({"alibi": True, "attn_pdrop": 0.3}),
    ):
        model, ids = MPT(shape, seed=1), tokens(1, 16)
        assert not torch.equal(model.train()(ids).logits, model(ids).logits)
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_the_embedding_gets_its_share_of_the_gradient() -> None:
    ids, gradients = tokens(1, 16), []
    for fraction in (1.0, 0.25):
        model = MPT(config({"alibi": True}, embedding_fraction=fraction, tie_word_embeddings=False), seed=1)
        model(ids, labels=ids).loss.backward()
        gradients.append(model.transformer.wte.weight.grad)
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0])


def test_low_precision_norms_compute_in_the_dtype_of_autocast() -> None:
    ids = tokens(1, 16)
    for norm_type, dtype in (
        ("low_precision_layernorm", torch.bfloat16),
        ("low_precision_rmsnorm", torch.bfloat16),
        ("layernorm", torch.float32),
    ):
        model = MPT(config({"alibi": True}, norm_type=norm_type), seed=1)
        seen = []
        model.transformer.norm_f.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.dtype)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert seen == [dtype] and loss.dtype == torch.float32 and loss.isfinite()


def test_alibi_reaches_beyond_the_trained_length_and_learned_positions_do_not() -> None:
    ids = tokens(1, 80)
    assert MPT(ARCHITECTURES["mpt"], seed=1)(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match="80 tokens, but the model has 64 learned positions"):
        MPT(ARCHITECTURES["learned positions"], seed=1)(ids)


def refused(model: MPT, **inputs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        model(tokens(1, 8), **inputs)
    return str(caught.value)


def test_what_does_not_fit_together_is_refused() -> None:
    model = MPT(ARCHITECTURES["mpt"], seed=1)
    cache = KVCache(model.config, 1, 4, device="cpu", dtype=torch.float32)
    assert refused(model, cache=cache) == "cache: 8 tokens don't fit into its 4."
    assert "can't be given with a cache" in refused(model, cache=cache, max_documents=1)
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert "prefix_lm: true" in refused(model, prefix_mask=mask)
    assert "several documents" in refused(model, cache=cache, sequence_id=mask.long())


def test_an_output_is_empty_until_asked() -> None:
    assert MPTOutput() == MPTOutput(loss=None, token_loss=None, token_correct=None, logits=None)


@pytest.mark.parametrize("alibi", [True, False])
def test_under_autocast_the_residual_stream_is_the_same_with_and_without_fsdp(alibi: bool) -> None:
    """FSDP gathers weights in the low precision; one device keeps them in float32."""
    whole = MPT(config({"alibi": alibi}, no_bias=alibi), seed=1).train()
    gathered = copy.deepcopy(whole).bfloat16()
    ids = torch.randint(101, (2, 48), generator=torch.Generator().manual_seed(0))
    streams: list[list[torch.Tensor]] = [[], []]
    losses = []
    for network, stream in zip((whole, gathered), streams, strict=True):
        for block in network.transformer.blocks:
            block.register_forward_pre_hook(lambda _, args, stream=stream: stream.append(args[0].detach()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(network(ids, labels=ids).loss)
    assert {x.dtype for stream in streams for x in stream} == {torch.bfloat16}
    assert all(torch.equal(one, other) for one, other in zip(*streams, strict=True))
    assert torch.equal(*losses)
