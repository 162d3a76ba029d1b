from __future__ import annotations

import math
from pathlib import Path

import pytest

from mptfoundry.config.load import parse_words
from mptfoundry.config.tasks import GauntletConfig, TaskFileConfig
from mptfoundry.errors import ConfigError
from mptfoundry.tasks.gauntlet import gauntlet_scores, refuse_missing

FILE = """
eval_gauntlet:
  weighting: {weighting}
  subtract_random_baseline: {subtract}
  rescale_accuracy: {rescale}
  averages: {{core: [reading, counting]}}
  categories:
  - name: reading
    benchmarks:
    - {{name: a, num_fewshot: 0, random_baseline: 0.5}}
    - {{name: b, num_fewshot: 2, random_baseline: 0.25}}
  - name: counting
    benchmarks:
    - {{name: c, num_fewshot: 0}}
"""
SCORES = {"a/0-shot": 0.75, "b/2-shot": 0.25, "c/0-shot": 0.4}
DOCUMENTS = {"a/0-shot": 8, "b/2-shot": 32, "c/0-shot": 100}


def gauntlet(
    folder: Path, weighting: str = "EQUAL", subtract: str = "true", rescale: str = "true"
) -> GauntletConfig:
    (folder / "g.yaml").write_text(FILE.format(weighting=weighting, subtract=subtract, rescale=rescale))
    found = parse_words([], TaskFileConfig, folder / "g.yaml").eval_gauntlet
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "reading"),
    [
        ({}, (0.5 + 0.0) / 2),
        ({"rescale": "false"}, (0.25 + 0.0) / 2),
        ({"subtract": "false", "rescale": "false"}, (0.75 + 0.25) / 2),
        ({"weighting": "SAMPLE_SZ"}, 0.5 * 8 / 40),
        ({"weighting": "LOG_SAMPLE_SZ"}, 0.5 * math.log2(8) / (math.log2(8) + math.log2(32))),
    ],
)
def test_categories_and_averages(tmp_path: Path, options: dict[str, str], reading: float) -> None:
    found = gauntlet_scores(gauntlet(tmp_path, **options), SCORES, DOCUMENTS)
    assert found["reading"] == pytest.approx(reading)
    assert found["counting"] == pytest.approx(0.4)
    assert found["core"] == pytest.approx((reading + 0.4) / 2)


def test_a_missing_task_is_named_with_its_category(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reading: b/2-shot: is not among the tasks"):
        refuse_missing(gauntlet(tmp_path), ["a/0-shot", "b/0-shot", "c/0-shot"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("core: [reading, counting]", "core: [reading, county]", "county in core is not a category"),
        ("core: [", "reading: [", "reading is also the name of a category"),
        ("random_baseline: 0.5", "random_baseline: 1.5", "1.5 is too large"),
        ("weighting: EQUAL", "weighting: EVEN", "EVEN"),
        ("benchmarks:\n    - {name: c, num_fewshot: 0}", "benchmarks: []", "Name the category's tasks"),
        ("name: c,", "nam: c,", ".name: is missing"),
    ],
)
def test_mistakes_in_a_file_are_found_with_their_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = FILE.format(weighting="EQUAL", subtract="true", rescale="true").replace(old, new)
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        parse_words([], TaskFileConfig, tmp_path / "g.yaml")
    assert said in str(error.value) and "g.yaml:" in str(error.value)
