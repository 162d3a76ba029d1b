"""The gauntlet: scores of tasks averaged to scores of abilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from mptfoundry.config.tasks import GauntletConfig
from mptfoundry.errors import ConfigError


def refuse_missing(gauntlet: GauntletConfig, labels: Iterable[str]) -> None:
    """Raise ConfigError if the gauntlet counts a task that is not evaluated.

    Args:
        gauntlet: What is averaged.
        labels: The evaluated tasks, each `label/N-shot`.
    """
    known = set(labels)
    missing = [
        f"{category.name}: {benchmark.name}/{benchmark.num_fewshot}-shot"
        for category in gauntlet.categories
        for benchmark in category.benchmarks
        if f"{benchmark.name}/{benchmark.num_fewshot}-shot" not in known
    ]
    if missing:
        raise ConfigError(
            f"eval_gauntlet: {', '.join(missing)}: is not among the tasks of icl_tasks. Add it there with "
            "this num_fewshot, or remove it here."
        )


def gauntlet_scores(
    gauntlet: GauntletConfig, scores: Mapping[str, float], documents: Mapping[str, int]
) -> dict[str, float]:
    """Average the scores of tasks.

    Args:
        gauntlet: What is averaged.
        scores: `label/N-shot` -> accuracy.
        documents: `label/N-shot` -> the number of its documents, for weights.

    Returns:
        Category or average -> score; 0 is what random answers get if the baseline is subtracted.
    """
    results = {}
    for category in gauntlet.categories:
        total = weights = 0.0
        for benchmark in category.benchmarks:
            label = f"{benchmark.name}/{benchmark.num_fewshot}-shot"
            score, baseline = scores[label], benchmark.random_baseline
            if gauntlet.subtract_random_baseline:
                score -= baseline
                score /= 1 - baseline if gauntlet.rescale_accuracy else 1
            weight = _weight(gauntlet.weighting, documents[label])
            total, weights = total + weight * score, weights + weight
        results[category.name] = total / weights
    for average, members in gauntlet.named_averages.items():
        results[average] = sum(results[name] for name in members) / len(members)
    return results


def _weight(weighting: str, documents: int) -> float:
    if weighting == "EQUAL":
        return 1.0
    return float(documents) if weighting == "SAMPLE_SZ" else max(math.log2(documents), 1.0)
