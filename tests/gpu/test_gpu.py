"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

import math

import pytest
import torch

from mptfoundry.mpt.backends import why_not
from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT, KVCache
from tests.mpt.reference import assert_as_exact

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs it where there is one"
)


def small_network(**attention: object) -> MPT:
    config = MPTConfig(
        d_model=256,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        vocab_size=1024,
        no_bias=True,
        attn_config=AttnConfig(alibi=True, **attention),  # type: ignore[arg-type]
    )
    return MPT(config, seed=1)


def rows(count: int = 4, seq_len: int = 512) -> torch.Tensor:
    return torch.randint(1024, (count, seq_len), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", [{}, {"sliding_window_size": 64}, {"attn_logit_softcapping": 20.0}])
def test_loss_and_gradients_on_the_gpu_equal_the_cpus(attention: dict[str, object]) -> None:
    ids = rows()
    exact, network = small_network(**attention).double().train(), small_network(**attention).cuda().train()
    plain = small_network(**attention).train()
    gradients = []
    for model, device in ((network, "cuda"), (plain, "cpu"), (exact, "cpu")):
        model(ids.to(device), labels=ids.to(device)).loss.backward()
        gradients.append([model.transformer.blocks[0].attn.Wqkv.weight.grad.cpu()])
    assert_as_exact(*gradients)


def test_a_bf16_training_step_lowers_the_loss() -> None:
    network, ids = small_network().cuda().train(), rows().cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = network(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]


GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
FEATURES = [{}, GROUPED, {"sliding_window_size": 64}, {"attn_logit_softcapping": 20.0}]
PACKED = torch.tensor([[0] * 100 + [1] * 300 + [2] * 112, [0] * 511 + [1]])
ROWS = {
    "whole": torch.zeros(2, 512, dtype=torch.int64),
    "packed": PACKED,
    "padded right": PACKED.masked_fill(PACKED == 2, -1),
    "padded left": PACKED.masked_fill(PACKED == 0, -1),
}


@pytest.mark.parametrize("name", ["triton", "flash"])
@pytest.mark.parametrize("attention", FEATURES, ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_a_backend_in_bf16_is_as_exact_as_torchs(name: str, attention: dict[str, object], kind: str) -> None:
    def gradient(backend: str, device: str, dtype: torch.dtype, **known: int) -> torch.Tensor:
        model = small_network(**attention, attn_impl=backend).to(device, dtype)
        ids, documents = rows(2).to(device), ROWS[kind].to(device)
        learned = torch.zeros_like(ids, dtype=torch.bool)
        learned[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        given = {"attention_mask": documents >= 0, "sequence_id": documents.clamp(min=0), **known}
        if kind == "whole":
            given = {}
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device == "cuda"):
            model(ids, labels=ids.masked_fill(~learned, -100), **given).loss.backward()
        return model.transformer.blocks[0].attn.Wqkv.weight.grad.cpu()

    if reason := why_not(name, small_network(**attention).config, "cuda", "bfloat16"):
        pytest.skip(reason)
    truth, plain = gradient("torch", "cpu", torch.float64), gradient("torch", "cuda", torch.float32)
    assert_as_exact([gradient(name, "cuda", torch.float32)], [plain], [truth])
    if kind in ("packed", "padded right"):
        assert_as_exact([gradient(name, "cuda", torch.float32, max_documents=3)], [plain], [truth])


@pytest.mark.parametrize("name", ["triton", "flash"])
@pytest.mark.parametrize("attention", FEATURES, ids=str)
def test_a_backend_in_bf16_continues_as_exactly_as_torchs(name: str, attention: dict[str, object]) -> None:
    """A prompt padded on the left, a chunk, and single tokens, against a cache."""
    ids, mask = rows(2, 300), torch.ones(2, 300, dtype=torch.bool)
    mask[1, :70] = False

    def logits(backend: str, device: str, dtype: torch.dtype) -> torch.Tensor:
        model = small_network(**attention, attn_impl=backend).to(device, dtype).eval()
        cache = KVCache(model.config, 2, 300, device=device, dtype=dtype)
        pieces = [slice(0, 200), slice(200, 298), slice(298, 299), slice(299, 300)]
        with torch.no_grad():
            found = [
                model(ids[:, p].to(device), attention_mask=mask[:, : p.stop].to(device), cache=cache).logits
                for p in pieces
            ]
        return torch.cat(found, 1).cpu()[mask]

    if reason := why_not(name, small_network(**attention).config, "cuda", "bfloat16"):
        pytest.skip(reason)
    plain = logits("torch", "cuda", torch.bfloat16)
    assert_as_exact([logits(name, "cuda", torch.bfloat16)], [plain], [logits("torch", "cpu", torch.float64)])
