from __future__ import annotations

import math

import pytest

from mptfoundry.config.tasks import TaskConfig
from mptfoundry.tasks.outcomes import (
    Outcome,
    calibration_error,
    judge_scores,
    judge_text,
    mean_of_categories,
    task_metrics,
)
from mptfoundry.tasks.questions import Question, Row
from mptfoundry.tasks.scoring import Score

ROW = Row((1, 2), 1)
GENERATION = {
    "label": "t",
    "dataset_uri": "t",
    "num_fewshot": 0,
    "icl_task_type": "generation_task_with_answers",
}
CHOICE = TaskConfig(label="t", dataset_uri="t", num_fewshot=0, icl_task_type="multiple_choice")


def test_the_choice_with_the_highest_mean_per_token_is_chosen_and_ties_go_to_the_first() -> None:
    question = Question(0, (ROW, ROW), ("a", "b"), gold=1)
    longer = judge_scores(CHOICE, question, [Score((-1.0,), False, 0), Score((-0.9, -0.9), False, 0)])
    assert longer.chosen == 1 and longer.is_correct
    assert longer.loglikelihoods == (-1.0, -1.8) and longer.tokens == (1, 2)
    tie = judge_scores(CHOICE, question, [Score((-1.0,), False, 0), Score((-1.0,), False, 0)])
    assert tie.chosen == 0 and not tie.is_correct


def test_confidence_is_a_choices_share_of_mean_probability() -> None:
    question = Question(0, (ROW, ROW), ("a", "b"), gold=0)
    found = judge_scores(
        CHOICE, question, [Score((math.log(0.6),), False, 0), Score((math.log(0.1), math.log(0.3)), False, 0)]
    )
    assert found.confidence == pytest.approx(0.6 / 0.8) and found.is_confidently_correct


@pytest.mark.parametrize(
    ("text", "is_correct"),
    [
        (" The Two!\n\nQuestion: what", True),
        (" two, of course", True),
        (" it is two", False),
        (" thirty\n\ntwo", False),
        (" counting gives one. So: two", True),
    ],
)
def test_a_generated_text_is_right_if_it_starts_with_an_answer_after_normalisation(
    text: str, is_correct: bool
) -> None:
    task = TaskConfig(**GENERATION, early_stopping_criteria=("\n\n",), cot_delimiter="So: ")
    assert judge_text(task, Question(0, (ROW,), ("two", "2")), text).is_correct == is_correct


def test_without_normalisation_only_white_space_is_removed() -> None:
    task = TaskConfig(**GENERATION, do_normalization=False)
    question = Question(0, (ROW,), ("Two",))
    assert judge_text(task, question, "  Two things").is_correct
    assert not judge_text(task, question, " two things").is_correct


def test_the_metrics_of_a_task() -> None:
    outcomes = [Outcome(0, right, 0.55, right) for right in (True, True, True, False)]
    found = task_metrics(CHOICE, outcomes)
    assert found["InContextLearningMultipleChoiceAccuracy"] == 0.75
    assert found["InContextLearningMCExpectedCalibrationError"] == pytest.approx(0.75 - 0.55)
    assert found["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) and found["documents"] == 4


def test_calibration_weighs_buckets_by_their_documents() -> None:
    sure = [Outcome(0, True, 0.99, True)] * 3
    unsure = [Outcome(0, False, 0.15, False)]
    assert calibration_error(sure + unsure) == pytest.approx(0.75 * 0.05 + 0.25 * 0.15)
    assert calibration_error([Outcome(0, True, 1.0, True)]) == pytest.approx(0.05)


def test_categories_count_the_same_whatever_their_size() -> None:
    parts = [
        task_metrics(CHOICE, [Outcome(0, True, 0.5, True)] * 9),
        task_metrics(CHOICE, [Outcome(0, False, 0.5, False)] * 3),
    ]
    found = mean_of_categories(CHOICE, parts)
    assert found["InContextLearningMultipleChoiceAccuracy"] == 0.5 and found["documents"] == 12
