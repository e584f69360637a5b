"""choices: four different options, one of them right, at places without a pattern; plain and length-normalised accuracy."""

from __future__ import annotations

from collections import Counter

import pytest
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.evaluation.material import questions
from suite_checks import ask, check_items


def test_questions_are_different_and_their_answers_lie_everywhere() -> None:
    pool = questions.pool(0)
    assert len(pool) >= 200 and len({q.prompt for q in pool}) == len(pool)
    kinds = Counter(q.kind for q in pool)
    assert set(kinds) == set(questions.KINDS) and min(kinds.values()) >= 30
    assert set(Counter(q.kind for q in pool[:60]).values()) == {10}, "kinds take turns"
    places = Counter(q.right for q in pool)
    assert max(places.values()) < 1.5 * min(places.values())
    for q in pool:
        assert len(set(q.options)) == 4 and 0 <= q.right < 4
        assert all(option and option == option.strip() for option in q.options)


def test_right_answers_are_right() -> None:
    for q in questions.pool(3):
        right = q.options[q.right]
        if q.kind == "capital":
            country = q.prompt.split(" of ")[1].split("?")[0]
            assert f"{country}:{right}".replace(" ", "_") in questions.CAPITALS.split()
        elif q.kind == "opposite":
            assert f"{q.prompt.split(chr(34))[1]}:{right}" in questions.OPPOSITES.split()
        elif q.kind == "category":
            member = q.prompt.split(" is a kind")[0].split()[-1].lower()
            assert member in questions.CATEGORIES[right].split()
        elif q.kind == "number" and "plus" in q.prompt:
            a, b = (int(word) for word in q.prompt.replace("?", " ").split() if word.isdigit())
            assert a + b == int(right)
        elif q.kind == "number":
            assert max(map(int, q.options)) == int(right) and all(option in q.prompt for option in q.options)
        elif q.kind == "order" and "letter" in q.prompt:
            asked = q.prompt.split("after ")[1][0]
            assert ord(right) == ord(asked) + 1
        elif q.kind == "everyday":
            assert f"{q.prompt} | {right}," in questions.EVERYDAY


def test_accuracy_plain_and_per_character() -> None:
    data = {"kind": "capital", "options": ["ab", "abcdefgh"], "right": 1, "empty": [-1.0, -4.0]}
    longer = {**data, "logprobs": [-2.0, -3.0]}  # -1 against -0.375 per character
    scores = suite("choices").score([longer, {**data, "logprobs": [-3.0, -2.0]}])
    assert scores["accuracy"] == 0.5 and scores["accuracy_norm"] == 1 and scores["accuracy_capital"] == 0.5
    # less what the options have by themselves: -1 and -1 against +1 and +2
    assert scores["accuracy_calibrated"] == 1


def test_a_model_is_asked() -> None:
    asked = suite("choices")
    items = check_items(asked, 12)
    records = ask(asked, items)
    assert all(len(record["logprobs"]) == 4 and max(record["logprobs"]) < 0 for record in records)
    ask(asked, items[:4], [("streaming", {"window": 4})])
    with pytest.raises(ReattendError, match="questions"):
        asked.items(10_000, 0)
