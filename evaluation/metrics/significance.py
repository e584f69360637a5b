"""How likely chance alone would give a change as large as the one that was seen, and which of many changes to believe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .intervals import Counts, Metrics, group_sums
from .sums import Sums


def swap_tests(
    groups: Sequence[str],
    before: Sequence[Counts],
    after: Sequence[Counts],
    metrics: Metrics,
    *,
    count: int = 10_000,
    seed: int = 0,
    at_once: int = 1000,
) -> dict[str, float]:
    """{metric: p value} of the change from `before` to `after`, two-sided: a paired permutation test over whole groups.

    groups, before, after: one entry per record. Were the change nothing, either side of a group could as well be the other one: both
    are exchanged at random, `count` times, and p is the share of exchanges whose change is at least as large as the one seen (which
    counts as one of them, so p is never 0).
    """
    old, new, names = group_sums(groups, before, after)
    rng = np.random.default_rng(seed)

    def changes(swapped: Any) -> dict[str, Any]:
        first, second = old.sum(0) + swapped @ (new - old), new.sum(0) + swapped @ (old - new)
        found = [metrics(Sums(zip(names, np.moveaxis(side, -1, 0)))) for side in (first, second)]
        return {name: np.asarray(found[1][name]) - np.asarray(found[0][name]) for name in found[0]}

    seen = changes(np.zeros(len(old)))
    reached = dict.fromkeys(seen, 1)
    for start in range(0, count, at_once):
        drawn = changes((rng.random((min(at_once, count - start), len(old))) < 0.5).astype(float))
        for name, value in seen.items():
            # sums of the same numbers in another order differ by rounding
            reached[name] += int((np.abs(drawn[name]) >= abs(value) - 1e-9).sum())
    return {name: number / (count + 1) for name, number in reached.items()}


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """q values: the share of false discoveries among all changes that are at least as surprising (Benjamini and Hochberg 1995).

    Believing those with q of at most 0.05 makes one in twenty of the believed ones false, on average.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, least = [1.0] * len(p_values), 1.0
    for rank in range(len(order), 0, -1):
        least = min(least, p_values[order[rank - 1]] * len(order) / rank)
        found[order[rank - 1]] = least
    return found
