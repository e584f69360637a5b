"""highlight: both facts of a pair are marked once each, so an untouched model follows exactly half of the marks."""

from __future__ import annotations

from collections import Counter

import pytest
from reattend.evaluation import suite
from reattend.evaluation.likelihood import written_losses
from suite_checks import ask, check_items, subject


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_both_facts_are_in_the_prompt_and_each_is_marked_once(form: str) -> None:
    asked, view = suite("highlight", prompt_form=form), subject()
    items = check_items(asked, 20)
    assert len(items) == 40 and set(Counter(item.group for item in items).values()) == {2}
    for first, second in zip(items[::2], items[1::2]):
        assert (first.data["marked"], second.data["marked"]) == (0, 1)
        assert {**first.data, "marked": 1} == second.data
        prompt = asked.prompt(view, first)
        assert prompt == asked.prompt(view, second) and prompt.endswith(first.data["start"])
        one, other = first.data["facts"]
        assert prompt.index(one) < prompt.index(other) and prompt.count(one) == prompt.count(other) == 1
        assert one.replace(first.data["words"][0], first.data["words"][1]) == other != one


def test_an_untouched_model_follows_half_of_the_marks() -> None:
    asked = suite("highlight")
    scores = asked.score(ask(asked, asked.items(10, 0)))
    assert scores["followed"] == 0.5 and scores["lead"] == pytest.approx(0, abs=1e-4)


def test_a_highlighter_is_told_what_to_mark() -> None:
    asked = suite("highlight")
    items = asked.items(6, 0)
    plain = ask(asked, items)
    steered = ask(asked, items, [("emphasise", {"alpha": 0.01})])
    assert all(a["logprobs"] != b["logprobs"] for a, b in zip(plain, steered))
    # two prompts of a pair are one text, told apart by their marks alone
    assert all(a["logprobs"] != b["logprobs"] for a, b in zip(steered[::2], steered[1::2]))


def test_scores_of_made_up_answers() -> None:
    record = {"words": ["red", "blue"], "logprobs": [-1.0, -3.0], "top": [True, False]}
    scores = suite("highlight").score([{**record, "marked": 0}, {**record, "marked": 1}, {**record, "marked": 0}])
    assert scores["followed"] == scores["on_top"] == pytest.approx(2 / 3)
    assert scores["lead"] == pytest.approx((2 - 2 + 2) / 3) and scores["logprob"] == pytest.approx(-5 / 3)
    assert (scores["followed_first"], scores["followed_second"]) == (1, 0)


@pytest.mark.parametrize("how", ["repeated", "important", "capitals"])
def test_a_fact_can_stand_out_in_the_prompt_s_words_instead(how: str) -> None:
    asked, view = suite("highlight", prompting=how), subject()
    first, second = asked.items(1, 0)
    plain = suite("highlight").prompt(view, first)
    prompts = [asked.prompt(view, item) for item in (first, second)]
    assert prompts[0] != prompts[1] and plain not in prompts
    fact, other = first.data["facts"]
    expected = {
        "repeated": f"{fact} {other} {fact}",
        "important": f"Important: {fact} {other}",
        "capitals": f"{fact.upper()} {other}",
    }
    assert expected[how] in prompts[0]
    records = ask(asked, [first, second])
    assert records[0]["logprobs"] != records[1]["logprobs"]


def test_what_was_written_is_judged_by_the_untouched_model_and_the_plain_prompt() -> None:
    asked, view = suite("highlight", written=6), subject()
    items = asked.items(2, 0)
    plain = ask(asked, items)
    for item, record in zip(items, plain):
        (loss,) = written_losses(view, [suite("highlight").prompt(view, item)], [record["text"]])
        assert record["losses"] == pytest.approx(loss, abs=1e-3) and record["text"]
    # a recipe that acts all the time steps aside for the judgement: the same text gets the same loss
    calmed = ask(asked, items, [("streaming", {"window": 2, "sinks": 1})])
    for item, record in zip(items, calmed):
        (loss,) = written_losses(view, [suite("highlight").prompt(view, item)], [record["text"]])
        assert record["losses"] == pytest.approx(loss, abs=1e-3)
    assert [r["logprobs"] for r in calmed] != [r["logprobs"] for r in plain]
    counted = asked.score(plain)
    assert counted["loss"] == pytest.approx(sum(sum(r["losses"]) for r in plain) / sum(len(r["losses"]) for r in plain))
    assert "loss" not in suite("highlight").score(ask(suite("highlight"), items))
