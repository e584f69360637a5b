"""Permutation tests against counting all exchanges, false discoveries on made-up changes, and AUC against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from reattend.evaluation.metrics.auc import auc_counts, auc_metric
from reattend.evaluation.metrics.significance import false_discovery, swap_tests
from reattend.evaluation.metrics.sums import Sums, ratio


def mean(sums):
    return {"mean": ratio(sums["sum"], sums["count"])}


def counts(values):
    return [{"sum": float(v), "count": 1.0} for v in values]


def test_a_p_value_is_the_share_of_all_exchanges_of_whole_groups():
    rng = np.random.default_rng(0)
    groups = [f"g{i // 2}" for i in range(12)]
    before, after = rng.normal(0, 1, 12), rng.normal(0.6, 1, 12)
    change = (after - before).reshape(6, 2).sum(1)
    exchanges = [abs((change * signs).sum()) >= abs(change.sum()) - 1e-9 for signs in itertools.product((1, -1), repeat=6)]
    found = swap_tests(groups, counts(before), counts(after), mean, count=20_000)["mean"]
    assert found == pytest.approx(np.mean(exchanges), abs=0.01)


def test_nothing_changed_is_no_surprise_and_a_sure_change_is_one():
    values, groups = np.arange(40.0), [str(i) for i in range(40)]
    assert swap_tests(groups, counts(values), counts(values), mean)["mean"] == 1
    assert swap_tests(groups, counts(values), counts(values + 1), mean, count=999)["mean"] == 1 / 1000


def test_p_values_of_no_effect_are_even():
    rng = np.random.default_rng(1)
    groups = [str(i) for i in range(30)]
    found = [
        swap_tests(groups, counts(rng.normal(0, 1, 30)), counts(rng.normal(0, 1, 30)), mean, count=400)["mean"]
        for _ in range(200)
    ]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(found) == pytest.approx(0.5, abs=0.07)


def test_false_discovery_by_hand():
    assert false_discovery([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert false_discovery([]) == [] and false_discovery([0.2]) == [0.2]
    # one alone would be believed, among twenty it is not
    assert false_discovery([0.04])[0] < 0.05 < false_discovery([0.04] + [0.6] * 19)[0]


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(2)
    truth = rng.random(60) < 0.4
    scores = np.round(rng.normal(truth * 0.8, 1) * 10) / 10
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    sums = Sums.of(auc_counts(float(s), bool(t)) for s, t in zip(scores, truth))
    assert float(auc_metric(sums)) == pytest.approx(np.mean(pairs))
    # moving every score moves no pair
    moved = Sums.of(auc_counts(float(s) + 3, bool(t)) for s, t in zip(scores, truth))
    assert float(auc_metric(moved)) == pytest.approx(np.mean(pairs))
    drawn = Sums({name: np.array([value, 2 * value]) for name, value in sums.items()})
    assert auc_metric(drawn) == pytest.approx([np.mean(pairs)] * 2)
    assert float(auc_metric(Sums())) == 0
