"""Networks with heads, beside transformers' classes with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.flops import count_parameters, flops_per_token
from mptfoundry.mpt.head_config import (
    HeadConfig,
    SequenceClassifierConfig,
    SpanFinderConfig,
    TokenClassifierConfig,
    head_named,
)
from mptfoundry.mpt.heads import make_network

from .reference import assert_as_exact, assert_gradients_as_exact, rms

PAD, ROWS, SEQ = 0, 24, 12
TRUNK: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 16}
OURS: dict[str, Any] = {**TRUNK, "no_bias": True, "attn_config": AttnConfig(alibi=True)}
CONFIGS: list[HeadConfig] = [
    SequenceClassifierConfig(**OURS, num_labels=3),
    TokenClassifierConfig(**OURS, num_labels=5),
    SpanFinderConfig(**OURS),
]


def pair(config: HeadConfig, **more: Any) -> tuple[Any, Any]:
    """Our network and transformers' of the same weights, large enough that logits differ much."""
    kind = getattr(transformers, config.architecture)
    theirs = kind(transformers.MptConfig(**TRUNK, pad_token_id=PAD, num_labels=config.outputs, **more)).eval()
    ours = make_network(config, seed=3).eval()
    with torch.no_grad():
        getattr(ours, config.head).weight.mul_(20)
    theirs.load_state_dict(ours.state_dict())
    ours.pad_token_id = PAD
    return ours, theirs


def rows(padding: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids of rows and their mask; the pad id stands inside of a text too."""
    ids = torch.randint(1, 64, (ROWS, SEQ), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = PAD
    if padding == "none":
        return ids, None
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, SEQ - 4 * row % 9 :] = 0
    if padding == "left":
        mask = mask.flip(1)
    return ids.masked_fill(mask == 0, PAD), mask


def their_logits(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


def labels_for(config: HeadConfig, problem: str | None = None) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    if isinstance(config, SpanFinderConfig):
        first = torch.randint(0, 9, (ROWS,), generator=draw)
        first[1] = 99  # outside of the row: it is not learned
        return {"start_positions": first, "end_positions": first + 2}
    if isinstance(config, TokenClassifierConfig):
        labels = torch.randint(0, config.num_labels, (ROWS, SEQ), generator=draw)
        return {"labels": labels.masked_fill(torch.rand(ROWS, SEQ, generator=draw) < 0.3, -100)}
    labels = torch.randint(0, config.outputs, (ROWS,), generator=draw)
    if problem == "regression":
        shape = (ROWS, config.outputs) if config.outputs > 1 else (ROWS,)
        return {"labels": torch.randn(shape, generator=draw)}
    if problem == "multi_label_classification":
        return {"labels": (torch.rand(ROWS, config.outputs, generator=draw) < 0.5).float()}
    return {"labels": labels}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_logits_equal_those_of_transformers(config: HeadConfig, padding: str) -> None:
    ours, theirs = pair(config)
    ids, mask = rows(padding)
    with torch.no_grad():
        found, wanted = ours(ids, attention_mask=mask).logits, their_logits(theirs(ids, attention_mask=mask))
        exact = ours.double()(ids, attention_mask=mask).logits
    assert found.shape == wanted.shape
    if mask is not None and found.ndim == 3:
        found, wanted, exact = (x[mask.bool()] for x in (found, wanted, exact))
    assert rms(exact) > 0.5
    assert rms(wanted - exact) < 1e-5 * rms(exact)
    assert_as_exact([found], [wanted], [exact])


@pytest.mark.parametrize(
    ("labels", "problem", "given"),
    [
        (1, "regression", None),
        (3, "regression", "regression"),
        (3, "single_label_classification", None),
        (3, "multi_label_classification", None),
        (3, "multi_label_classification", "multi_label_classification"),
    ],
)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_losses_and_gradients_of_texts_equal_those_of_transformers(
    labels: int, problem: str, given: Any, padding: str
) -> None:
    config = SequenceClassifierConfig(**OURS, num_labels=labels, problem_type=given)
    compare_losses(config, padding, labels_for(config, problem), problem_type=given)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_losses_and_gradients_of_tokens_equal_those_of_transformers(padding: str) -> None:
    config = TokenClassifierConfig(**OURS, num_labels=5)
    given = labels_for(config)
    _, mask = rows(padding)
    if mask is not None:
        given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    compare_losses(config, padding, given)


def test_losses_and_gradients_of_answers_equal_those_of_transformers() -> None:
    config = SpanFinderConfig(**OURS)
    compare_losses(config, "none", labels_for(config))


def compare_losses(config: HeadConfig, padding: str, labels: dict[str, torch.Tensor], **more: Any) -> None:
    ours, theirs = pair(config, **more)
    ids, mask = rows(padding)
    exact = pair(config)[0].double()
    losses = [network(ids, attention_mask=mask, **labels).loss for network in (ours, theirs, exact)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    names = [name for name, _ in ours.named_parameters()]
    gradients = [[network.get_parameter(name).grad for name in names] for network in (ours, theirs, exact)]
    assert_gradients_as_exact(*gradients)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_cannot_be_an_answer(padding: str) -> None:
    """Transformers' own logits, with the padding left out, give our loss."""
    ours, theirs = pair(CONFIGS[2])
    ids, mask = rows(padding)
    assert mask is not None
    first = mask.argmax(1)
    positions = {"start_positions": first, "end_positions": first + 2}
    logits = their_logits(theirs(ids, attention_mask=mask)).masked_fill(mask[..., None] == 0, -torch.inf)
    wanted = sum(F.cross_entropy(logits[..., end], p) for end, p in enumerate(positions.values())) / 2
    output = ours(ids, attention_mask=mask, **positions)
    torch.testing.assert_close(output.loss, wanted)
    assert (output.logits.argmax(1) >= first[:, None]).all() and output.logits.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_mean_loss_is_that_of_its_parts_by_their_terms(config: HeadConfig) -> None:
    ours, _ = pair(config)
    ids, mask = rows("right")
    labels = labels_for(config)
    whole = ours(ids, attention_mask=mask, **labels)
    parts = []
    for row in range(ROWS):
        one = {name: value[row : row + 1] for name, value in labels.items()}
        parts.append(ours(ids[row : row + 1], attention_mask=mask[row : row + 1], **one))
    assert whole.terms == sum(part.terms for part in parts)
    mean = sum(part.loss * part.terms for part in parts) / whole.terms
    torch.testing.assert_close(mean, whole.loss)


def test_nothing_to_learn_is_no_loss() -> None:
    outside = torch.tensor([99])
    output = make_network(CONFIGS[2], seed=0)(
        torch.ones(1, 4, dtype=torch.int64), start_positions=outside, end_positions=outside
    )
    assert output.loss == 0 and output.terms == 0


def test_a_batch_of_texts_needs_a_padding_token_and_one_text_does_not() -> None:
    network = make_network(CONFIGS[0], seed=0).eval()
    ids, _ = rows("none")
    with pytest.raises(ValueError, match="several rows need a pad_token_id"):
        network(ids)
    alone = network(ids[1:2]).logits
    network.pad_token_id = PAD
    torch.testing.assert_close(network(ids).logits[1:2], alone)


def test_tokens_are_dropped_before_the_classifier_in_training_only() -> None:
    network = make_network(TokenClassifierConfig(**OURS, classifier_dropout=0.5), seed=0)
    ids, _ = rows("none")
    assert not torch.equal(network(ids).logits, network(ids).logits)
    network.eval()
    assert torch.equal(network(ids).logits, network(ids).logits)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_weights_are_transformers_by_name_number_and_size_at_first(config: HeadConfig) -> None:
    ours, theirs = make_network(config, seed=0), pair(config)[1]
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert sum(p.numel() for p in ours.parameters()) == count_parameters(config)
    head = getattr(ours, config.head)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert head.bias is None or not head.bias.any()
    trunk = make_network(MPTConfig(**OURS), seed=0).state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in ours.state_dict().items() if name in trunk)
    assert flops_per_token(config, 8, causal=True) < flops_per_token(MPTConfig(**OURS), 8, causal=True)


def test_a_head_is_found_by_both_of_its_names() -> None:
    for config in CONFIGS:
        assert head_named(config.name) is head_named(config.architecture) is type(config)
    assert head_named("mpt_causal_lm") is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_labels": 0}, "num_labels: 0 is not positive"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "one label leaves nothing"),
        ({"id2label": {"0": "no"}}, "id2label: has the numbers 0. Name each from 0 to 1"),
        ({"id2label": {"0": "no", "1": "no"}}, "two labels have the same name"),
    ],
)
def test_labels_that_do_not_fit_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SequenceClassifierConfig(**OURS, **values)


def test_labels_have_transformers_names_unless_given() -> None:
    config = SequenceClassifierConfig(**OURS, num_labels=2)
    native = transformers.MptConfig(num_labels=2)
    assert config.label2id == native.label2id
    assert config.head_keys()["id2label"] == {str(n): name for n, name in native.id2label.items()}


def test_a_problem_type_is_exported_only_where_it_was_given() -> None:
    """Without one transformers tells it from the labels, as our networks do."""
    assert "problem_type" not in SequenceClassifierConfig(**OURS, num_labels=3).head_keys()
    given = SequenceClassifierConfig(**OURS, num_labels=3, problem_type="regression")
    assert given.head_keys()["problem_type"] == "regression"
