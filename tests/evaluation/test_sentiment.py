"""sentiment: half of all opinions are positive, however many are asked; labels are compared by their likelihood."""

from __future__ import annotations

import pytest
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.evaluation.material import opinions
from suite_checks import ask, check_items


def test_opinions_are_balanced_and_different() -> None:
    pool = opinions.pool(0)
    assert len({o.text for o in pool}) == len(pool)
    assert sum(o.written for o in pool) >= 60 and sum(not o.written for o in pool) >= 200
    for part in (pool, pool[:40], [o for o in pool if o.written], [o for o in pool if not o.written]):
        assert sum(o.positive for o in part) * 2 == len(part)
    assert sum(o.written for o in pool[:40]) == 10
    assert not any(" a excellent" in o.text or " a un" in o.text or " an clean" in o.text for o in pool)
    assert {o.text for o in opinions.pool(1)} == {o.text for o in pool} and opinions.pool(1) != pool


def test_words_of_patterns_stand_on_their_side() -> None:
    for thing, good, bad in opinions.FIELDS:
        for o in opinions.pool(0):
            if o.written or not any(f" {t} " in o.text for t in thing.split("|")) or " not " in o.text or "expected" in o.text:
                continue
            wanted, other = (good, bad) if o.positive else (bad, good)
            assert any(word in o.text for word in wanted.split("|")), o
            assert not any(f" {word} " in o.text for word in other.split("|")), o


def test_scores_of_made_up_answers() -> None:
    # leans to "positive" by 2.5 after a review that says nothing
    base = {"text": "x", "written": True, "empty": [-4.0, -1.5]}
    records = [
        {**base, "positive": True, "logprobs": [-3.0, -1.0]},
        {**base, "positive": False, "logprobs": [-3.0, -1.0]},
        {**base, "positive": False, "written": False, "logprobs": [-1.0, -4.0]},
    ]
    scores = suite("sentiment").score(records)
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["said_positive"] == pytest.approx(2 / 3)
    assert (scores["accuracy_written"], scores["accuracy_pattern"]) == (0.5, 1)
    assert scores["accuracy_calibrated"] == pytest.approx(2 / 3), "one positive less, one negative more"
    assert scores["auc"] == pytest.approx(0.75), "the positive one stands above one negative one and beside the other"
    assert scores["lead"] == pytest.approx((2 - 2 + 3) / 3)


def test_a_model_is_asked() -> None:
    asked = suite("sentiment")
    items = check_items(asked, 12)
    records = ask(asked, items)
    assert [record["positive"] for record in records] == [True, False] * 6
    ask(asked, items[:4], [("streaming", {"window": 4})])
    with pytest.raises(ReattendError, match="sentences"):
        asked.items(10_000, 0)
