"""Percentile intervals by resampling whole groups (scenes, texts), of metrics and of their change, without a loop over resamples.

Metrics are functions of counts that add up over records. A resample is a number of times that each group is drawn, so the sums of all
resamples are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...interventions import ReattendError
from .sums import Sums

Counts = Mapping[str, float]
Metrics = Callable[[Sums], Mapping[str, Any]]


def group_sums(groups: Sequence[str], *sides: Sequence[Counts]) -> tuple[Any, ...]:
    """(for each side an array [groups, names] of its counts added up by group, ..., names). Groups in order of appearance."""
    index = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    places = np.array([index[name] for name in groups])
    names = list(dict.fromkeys(name for side in sides for one in side for name in one))
    tables = []
    for side in sides:
        table = np.zeros((len(index), len(names)))
        np.add.at(table, places, np.array([[one.get(name, 0.0) for name in names] for one in side]))
        tables.append(table)
    return (*tables, names)


@dataclass(frozen=True)
class Interval:
    """A value and the interval in which `level` of the resamples lie."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


class Resamples:
    """Draws of groups with replacement. groups: the group of every record; count: how many resamples; seed: fixes the draws."""

    def __init__(self, groups: Sequence[str], count: int = 2000, seed: int = 0, level: float = 0.95) -> None:
        if not groups:
            raise ReattendError("there are no records to compute metrics of")
        self.level, self.groups = level, list(groups)
        self.size = len(set(groups))
        times = np.random.default_rng(seed).multinomial(self.size, np.full(self.size, 1 / self.size), size=count)
        self.times = times.astype(float)

    def sums(self, counts: Sequence[Counts]) -> tuple[Sums, Sums]:
        """(sums over all records, sums in every resample [count]) by name."""
        table, names = group_sums(self.groups, counts)
        drawn = self.times @ table
        return Sums(zip(names, table.sum(axis=0).tolist())), Sums(zip(names, drawn.T))

    def intervals(self, counts: Sequence[Counts], metrics: Metrics) -> dict[str, Interval]:
        """Every metric with its interval. counts: one per record, in the order of `groups`."""
        whole, drawn = self.sums(counts)
        return self._between(metrics(whole), metrics(drawn))

    def changes(self, before: Sequence[Counts], after: Sequence[Counts], metrics: Metrics) -> dict[str, Interval]:
        """The change of every metric, after minus before, on the same records: both sides of a resample draw the same groups."""
        (old, old_drawn), (new, new_drawn) = self.sums(before), self.sums(after)
        return self._between(_minus(metrics(new), metrics(old)), _minus(metrics(new_drawn), metrics(old_drawn)))

    def _between(self, values: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Interval]:
        edge = (1 - self.level) / 2
        found = {}
        for name, value in values.items():
            low, high = np.quantile(np.broadcast_to(drawn[name], self.times.shape[:1]), (edge, 1 - edge))
            found[name] = Interval(float(value), float(low), float(high))
        return found


def _minus(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(a[name]) - np.asarray(b[name]) for name in a}


def mean_interval(values: Sequence[float], groups: Sequence[str] | None = None, **options: Any) -> Interval:
    """The mean of numbers with its interval. groups: what is drawn as one; by default every number. options: as for `Resamples`."""
    draws = Resamples(groups if groups is not None else [str(i) for i in range(len(values))], **options)
    counts = [{"sum": float(value), "count": 1.0} for value in values]
    return draws.intervals(counts, lambda s: {"mean": s["sum"] / s["count"]})["mean"]


def mean_change(
    before: Sequence[float], after: Sequence[float], groups: Sequence[str] | None = None, **options: Any
) -> Interval:
    """The mean of after minus before, pair by pair, with its interval."""
    return mean_interval([b - a for a, b in zip(before, after, strict=True)], groups, **options)
