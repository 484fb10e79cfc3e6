"""From rounds to medians, quartiles and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CLOCKS = ("wall_ms", "cpu_ms")


def quartiles(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median and quartiles of at least one value."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits)}


def summarize(samples: Mapping[str, Sequence[Mapping[str, float]]], baseline: str) -> dict[str, dict[str, Any]]:
    """Milliseconds an image of each variant, and its ratio to the baseline in the same round.

    Args:
        samples: For each variant, one sample a round.
        baseline: The variant to divide by.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, rounds in samples.items():
        result[name] = {clock: quartiles([sample[clock] for sample in rounds]) for clock in CLOCKS}
        for clock in CLOCKS:
            pairs = zip(rounds, samples[baseline], strict=True)
            result[name][clock.replace("_ms", "_ratio")] = quartiles([own[clock] / base[clock] for own, base in pairs])
    return result


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Share of pairs of an anomalous and a normal image in which the anomalous one scores higher; ties count half."""
    judged = list(zip(scores, labels, strict=True))
    normal = [score for score, anomalous in judged if not anomalous]
    wins = [(own > other) + 0.5 * (own == other) for own, anomalous in judged if anomalous for other in normal]
    return sum(wins) / len(wins)
