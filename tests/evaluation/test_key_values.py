"""key-values: the value stands beside its key in the third that the item names; exact values are counted."""

from __future__ import annotations

import json

import pytest
from reattend import ReattendError
from reattend.evaluation import suite
from suite_checks import ask, check_items, subject


def test_the_pair_stands_in_its_third() -> None:
    asked, view = suite("key-values", pairs=9, groups=8), subject()
    items = check_items(asked, 12)
    assert [item.data["third"] for item in items] == ["first", "middle", "last"] * 4
    places = set()
    for item in items:
        prompt = asked.prompt(view, item)
        shown = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
        assert shown == item.data["entries"] and len(shown) == 9
        assert len({*shown, *shown.values()}) == 18, "all keys and values are different"
        assert all(len(word.replace("-", "")) == 32 for pair in shown.items() for word in pair)
        place = list(shown).index(item.data["key"])
        assert ("first", "middle", "last")[place // 3] == item.data["third"]
        places.add(place)
        assert prompt.count(item.data["key"]) == 3 and prompt.count(shown[item.data["key"]]) == 1
        assert prompt.endswith(f'"{item.data["key"]}" is "')
    assert len(places) > 4


def test_a_value_counts_only_whole_and_at_the_beginning() -> None:
    said = {"ab12-cd34": True, '"ab12-cd34", "x"': True, "ab12-cd3": False, "no: ab12-cd34": False, "": False}
    for text, right in said.items():
        scores = suite("key-values").score([{"wanted": "ab12-cd34", "said": text, "third": "last"}])
        assert (scores["accuracy"], scores["accuracy_last"], scores["accuracy_first"]) == (right, right, 0)


def test_a_model_is_asked() -> None:
    asked = suite("key-values", pairs=3)
    ask(asked, asked.items(3, 0))
    ask(asked, asked.items(3, 0), [("streaming", {"window": 16})])
    with pytest.raises(ReattendError, match="pairs"):
        suite("key-values", pairs=1)
