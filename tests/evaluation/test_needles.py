"""needles: the sentence lies where the item says, its answer is in the prompt once, rivals are beside it; recall is counted."""

from __future__ import annotations

import pytest
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.evaluation.material import prose
from suite_checks import ask, check_items, subject


def test_the_needle_lies_at_its_depth_in_a_text_of_its_length() -> None:
    needles = suite("needles", lengths=(300, 900), rivals=2)
    items = check_items(needles, 12)
    assert [item.data["length"] for item in items] == [300] * 6 + [900] * 6
    tokenizer = subject().tokenizer
    for item in items:
        needle, prompt = needles.prompt(tokenizer, item)
        text = prompt[: prompt.index("\n\nBased on")]
        assert prompt.count(needle.answer) == 1 and needle.answer in needle.sentence
        assert prompt.count(needle.question) == 1 and item.data["places"][0] in needle.question
        assert any(sentence in text for sentence in prose.all_sentences())
        width = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert 0.3 * item.data["length"] < width <= item.data["length"] + 20
        if item.data["length"] == 900:
            # whole sentences, some of them long, go before and after the needle
            place = text.index(needle.sentence) / len(text)
            assert item.data["depth"] - 0.45 < place <= item.data["depth"] + 0.1
        assert not any(set(needle.answer.split()) & set(rival.split()) for rival in item.data["answers"][1:])
    texts = [needles.prompt(tokenizer, item)[1] for item in items]
    rivals = [sum(answer in text for answer in item.data["answers"][1:]) for item, text in zip(items, texts)]
    assert sum(rivals) > len(items) / 2, "most texts hold rivals"
    assert len({text[:200] for text in texts}) == len(texts)
    depths = [item.data["depth"] for item in needles.items(60, 0)]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_recall_counts_words_and_where_they_were() -> None:
    needles = suite("needles", lengths=(100, 200))
    right = {"wanted": "two red pears", "said": "It is Two red pears.", "length": 100, "depth": 0.1}
    part = {"wanted": "two red pears", "said": "two big pears", "length": 200, "depth": 0.9}
    scores = needles.score([right, part, {**part, "said": "nothing", "depth": 0.5}])
    assert scores["recall"] == pytest.approx((1 + 2 / 3) / 3) and scores["found"] == pytest.approx(1 / 3)
    assert (scores["recall_first"], scores["recall_middle"]) == (1, 0)
    assert scores["recall_last"] == pytest.approx(2 / 3)
    assert scores["recall_100"] == 1 and scores["recall_200"] == pytest.approx(1 / 3)


def test_a_model_is_asked() -> None:
    needles = suite("needles", lengths=(250,))
    records = ask(needles, needles.items(2, 0))
    assert all(record["wanted"] and isinstance(record["said"], str) for record in records)
    ask(needles, needles.items(2, 0), [("streaming", {"window": 16})])
    with pytest.raises(ReattendError, match="lengths"):
        ask(suite("needles", lengths=(30,)), needles.__class__(lengths=(30,)).items(1, 0))


def test_what_one_would_do_without_a_recipe() -> None:
    tokenizer = subject().tokenizer
    plain, cut, twice = (suite("needles", lengths=(300,), **how) for how in ({}, {"last": 40}, {"asked_first": True}))
    for item in plain.items(4, 0):
        (needle, whole), (_, short), (_, asked) = (one.prompt(tokenizer, item) for one in (plain, cut, twice))
        assert asked.count(needle.question) == 2 and whole.count(needle.question) == short.count(needle.question) == 1
        text = short[: short.index("\n\nBased on")]
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == pytest.approx(50, abs=14), (
            "and the frame of the chat"
        )
        # the end of the same text, after what a chat template writes first
        assert text[-30:] in whole and len(short) < len(whole)
