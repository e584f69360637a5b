"""position-swap: every segment stands once at every place; accuracy and agreement across orders are counted."""

from __future__ import annotations

import pytest
from reattend.evaluation import suite
from suite_checks import ask, check_items, subject


def test_every_segment_stands_once_at_every_place() -> None:
    asked, view = suite("position-swap", segments=4), subject()
    for item in check_items(asked, 12):
        data = item.data
        assert [sorted(order) for order in data["orders"]] == [[0, 1, 2, 3]] * 4
        assert [sorted(column) for column in zip(*data["orders"])] == [[0, 1, 2, 3]] * 4
        assert len(set(data["words"])) == 4
        for segment, word in zip(data["segments"], data["words"]):
            assert [w in segment for w in data["words"]].count(True) == 1 and word in segment
        for order in data["orders"]:
            prompt = asked.prompt(view, item, order)
            starts = [prompt.index(data["segments"][k]) for k in order]
            assert starts == sorted(starts)
            assert data["question"] in prompt and prompt.endswith(data["start"])
    kinds = {item.data["start"] for item in asked.items(40, 0)}
    assert len(kinds) > 10


def test_scores_of_made_up_answers() -> None:
    asked = suite("position-swap", segments=3)
    steady = {"wanted": "red", "averaged": "red", "chosen": ["red", "red", "red"], "place": [0, 2, 1]}
    biased = {"wanted": "red", "averaged": "red", "chosen": ["red", "blue", "green"], "place": [0, 2, 1]}
    wrong = {"wanted": "red", "averaged": "blue", "chosen": ["blue", "blue", "blue"], "place": [2, 1, 0]}
    scores = asked.score([steady, biased, wrong])
    assert scores["accuracy"] == pytest.approx(4 / 9)
    assert scores["consistency"] == pytest.approx(2 / 3) and scores["all_right"] == pytest.approx(1 / 3)
    assert scores["accuracy_first"] == pytest.approx(2 / 3) and scores["accuracy_last"] == pytest.approx(1 / 3)
    assert scores["accuracy_averaged"] == pytest.approx(2 / 3)
    assert asked.chance()["accuracy"] == pytest.approx(1 / 3) and asked.chance()["consistency"] == pytest.approx(1 / 9)
    assert scores["accuracy_place_2"] == pytest.approx(1 / 3)


def test_a_model_is_asked_in_all_orders_and_segments_are_named_to_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.evaluation import Subject

    asked, named = suite("position-swap"), []
    marked = Subject.marked
    monkeypatch.setattr(Subject, "marked", lambda self, **rows: named.append(rows) or marked(self, **rows))
    items = asked.items(3, 0)
    for item, record in zip(items, ask(asked, items)):
        assert [order[place] for order, place in zip(item.data["orders"], record["place"])] == [0, 0, 0]
        means = [sum(column) / 3 for column in zip(*record["logprobs"])]
        assert record["averaged"] == item.data["words"][means.index(max(means))]
        assert set(record["chosen"]) <= set(item.data["words"]) and record["wanted"] == item.data["words"][0]
    (rows,) = named
    texts = {item.data["segments"][k] for item in items for k in range(3)}
    assert set(rows) == {"segments"} and {text for row in rows["segments"] for text in row} == texts
    ask(asked, items, [("streaming", {"window": 8})])
