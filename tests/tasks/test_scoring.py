"""Scores with shared prefixes are those of one forward pass for each whole row."""

from __future__ import annotations

import random

import pytest
import torch

from mptfoundry.mpt.config import AttnConfig, MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.tasks.questions import Question, Row
from mptfoundry.tasks.scoring import plan_batches, score_batch, shared_prefix


def network(**attention: object) -> MPT:
    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96, attn_config=AttnConfig(**attention)
    )
    return MPT(config, seed=1).double().eval()


def questions(count: int) -> list[Question]:
    draw = random.Random(0)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(96) for _ in range(draw.randint(least, most)))

    made = []
    for number in range(count):
        context = ids(1, 40)
        answers = [ids(1, 6) for _ in range(draw.choice([1, 2, 4]))]
        rows = [Row(context + answer, len(context)) for answer in answers]
        if number % 3 == 0:  # a schema task: contexts that differ at their end
            contexts = [context + ids(1, 5) for _ in range(2)]
            rows = [Row(each + answers[0], len(each)) for each in contexts]
        made.append(Question(number, tuple(rows), ("",) * len(rows)))
    return made


@pytest.mark.parametrize("attention", [{"alibi": True}, {"alibi": False}, {"rope": True}])
@pytest.mark.parametrize("tokens", [1, 400, 100_000])
def test_scores_are_those_of_each_row_alone(attention: dict[str, bool], tokens: int) -> None:
    model, documents = network(**attention), questions(24)
    found = {}
    for batch in plan_batches(documents, tokens):
        found |= score_batch(model, batch)
    assert sorted(found) == list(range(24))
    for question in documents:
        for row, score in zip(question.rows, found[question.doc_id], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
            answer = torch.tensor(row.ids[row.start :])
            expected = logits.float().log_softmax(-1)
            assert score.logprobs == pytest.approx(
                expected.gather(-1, answer[:, None])[:, 0].tolist(), abs=1e-5
            )
            assert score.is_greedy == bool((logits.argmax(-1) == answer).all())
            assert score.confidence == pytest.approx(float(expected.exp().max(-1).values.min()), abs=1e-5)


def test_batches_hold_every_question_once_and_no_more_tokens_than_allowed() -> None:
    documents = questions(60)
    for tokens in (50, 500, 5000):
        batches = plan_batches(documents, tokens)
        assert sorted(each.doc_id for batch in batches for each in batch.questions) == list(range(60))
        for batch in batches:
            assert len({bool(prefix) for prefix in batch.prefixes}) == 1
            longest = max(
                len(row.ids) - prefix
                for each, prefix in zip(batch.questions, batch.prefixes, strict=True)
                for row in each.rows
            )
            rows = sum(len(each.rows) for each in batch.questions)
            assert len(batch.questions) == 1 or rows * (max(batch.prefixes) + longest) <= tokens


def test_the_plan_depends_on_the_questions_alone() -> None:
    documents = questions(30)
    shuffled = random.Random(1).sample(documents, len(documents))
    assert plan_batches(documents, 500) == plan_batches(shuffled, 500)


def test_choices_share_their_question_except_for_its_last_token() -> None:
    context = tuple(range(20))
    assert shared_prefix([Row((*context, 30), 20), Row((*context, 31, 32), 20)]) == 19
    assert shared_prefix([Row((*context, 30), 20)]) == 19
    assert shared_prefix([Row((*context, 30), 20), Row((*context[:12], 50, 31), 13)]) == 12
    assert shared_prefix([Row((1, 2, 3), 2), Row((1, 2, 4), 2)]) == 0  # too short to be worth it
