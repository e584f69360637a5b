"""instructions: every rule is told apart by code, and stands in the prompt word for word so that it can be marked."""

from __future__ import annotations

import pytest
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.evaluation.suites.instructions import RULES
from suite_checks import ask, check_items, subject

OBEYED = {
    "word": ("Its Rivers are long.", "A riverbed."),
    "capitals": ("PARIS IS LOVELY, 3 TIMES", "PARIS is"), "small": ("paris is lovely.", "Paris is lovely."),
    "one_word": ("Paris.", "It is Paris."), "begin": ("Honestly, I do not know.", "I honestly do not know."),
    "number": ("3 reasons: food", "Three reasons"), "list": ("- bread\n- wine", "Bread and wine"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_obeyed_or_not(rule: str) -> None:
    right, wrong = ({"rule": rule, "word": "river", "said": text} for text in OBEYED[rule])
    scores = suite("instructions", rules=(rule,)).score([right, wrong, {**wrong, "said": " "}])
    assert scores["obeyed"] == scores[f"obeyed_{rule}"] == pytest.approx(1 / 3)
    assert suite("instructions").score([wrong])["obeyed"] == 0


def test_rules_take_turns_and_stand_before_and_after_the_question() -> None:
    asked, view = suite("instructions", rules=tuple(RULES)), subject()
    items = check_items(asked, 28)
    assert [item.data["rule"] for item in items] == list(RULES) * 4
    before = 0
    for item in items:
        prompt, rule = asked.prompt(view, item), item.data["text"]
        assert prompt.count(rule) == prompt.count(item.data["question"]) == 1
        before += prompt.index(rule) < prompt.index(item.data["question"])
    assert 4 < before < 24


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ReattendError, match="unknown rule 'loudly'"):
        suite("instructions", rules=("loudly",))


def test_a_model_is_asked() -> None:
    asked = suite("instructions")
    items = asked.items(4, 0)
    plain, steered = ask(asked, items), ask(asked, items, [("emphasise", {"alpha": 0.01})])
    assert [r["said"] for r in plain] != [r["said"] for r in steered]
