"""Intervals against resampling written out, and the properties that make paired changes worth having."""

from __future__ import annotations

import numpy as np
import pytest
from reattend import ReattendError
from reattend.evaluation.metrics.intervals import Resamples, mean_change, mean_interval
from reattend.evaluation.metrics.pope import pope, pope_counts, pope_metrics
from reattend.evaluation.metrics.sums import Sums, ratio


def answers(count: int, seed: int):
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.5
    said = np.where(rng.random(count) < 0.8, truth, ~truth)
    return [bool(s) for s in said], [bool(t) for t in truth], [f"scene{i // 3}" for i in range(count)]


def test_every_resample_equals_scoring_the_drawn_records():
    said, truth, groups = answers(60, 1)
    draws = Resamples(groups, count=50, seed=3)
    counts = [pope_counts(s, t) for s, t in zip(said, truth)]
    whole, drawn = draws.sums(counts)
    by_hand = []
    for times in draws.times.astype(int):
        rows = [i for i, group in enumerate(groups) for _ in range(times[int(group.removeprefix("scene"))])]
        assert len(rows) == 60, "scenes are drawn whole and as many as there are"
        by_hand.append(pope([said[i] for i in rows], [truth[i] for i in rows]))
    found = pope_metrics(drawn)
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[name] == pytest.approx([one[name] for one in by_hand])
    interval = draws.intervals(counts, pope_metrics)["f1"]
    low, high = np.quantile([one["f1"] for one in by_hand], (0.025, 0.975))
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    assert interval.value == pytest.approx(pope(said, truth)["f1"])
    assert {n: float(v) for n, v in pope_metrics(whole).items()} == pytest.approx(pope(said, truth))


def test_the_interval_of_a_share_has_its_known_width():
    values = [1.0] * 300 + [0.0] * 100
    interval = mean_interval(values, count=4000)
    width = 2 * 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.value == 0.75 and interval.high - interval.low == pytest.approx(width, rel=0.06)


def test_same_seed_same_interval_other_seed_another():
    values = list(np.random.default_rng(0).random(40))
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_a_scene_with_many_questions_counts_as_one():
    values = [float(scene % 2) for scene in range(20) for _ in range(10)]
    scenes = [str(scene) for scene in range(20) for _ in range(10)]
    grouped, alone = mean_interval(values, scenes), mean_interval(values)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_paired_changes_are_sharper_than_the_difference_of_two_intervals():
    rng = np.random.default_rng(5)
    before = list(rng.normal(0, 10, 200))
    after = [b + 1 + e for b, e in zip(before, rng.normal(0, 0.1, 200))]
    change = mean_change(before, after)
    assert change.low < change.value < change.high and change.low > 0.95 and change.high < 1.05
    draws = Resamples([str(i) for i in range(200)])
    mean = lambda s: {"mean": ratio(s["sum"], s["count"])}  # noqa: E731
    counts = [[{"sum": v, "count": 1.0} for v in values] for values in (before, after)]
    assert draws.changes(*counts, mean)["mean"].value == pytest.approx(change.value)
    same = draws.changes(counts[0], counts[0], mean)["mean"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_counts_that_only_some_records_have():
    draws = Resamples(["a", "b", "c"], count=20)
    counts = [{"x": 1.0}, {"y": 2.0}, {}]
    whole, drawn = draws.sums(counts)
    assert whole == {"x": 1.0, "y": 2.0} and whole["z"] == 0
    assert drawn["x"].tolist() == draws.times[:, 0].tolist()
    assert draws.intervals(counts, lambda s: {"never": ratio(s["z"], s["z"])})["never"].high == 0


def test_nothing_to_resample():
    with pytest.raises(ReattendError, match="no records"):
        Resamples([])


def test_ratio_and_sums():
    assert ratio(1, 0) == 0 and ratio(1, 4) == 0.25
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist() == [0, 0.5]
    assert ratio(1, np.array([0.0, 4.0])).tolist() == [0, 0.25]
    assert Sums.of([{"a": 1}, {"a": 2, "b": True}]) == {"a": 3, "b": 1}
