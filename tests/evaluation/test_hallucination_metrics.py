"""POPE and CHAIR against official results, and by hand where the official scripts say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reattend.evaluation.metrics.accuracy import accuracy
from reattend.evaluation.metrics.chair import Vocabulary, chair, chair_counts, words_of
from reattend.evaluation.metrics.pope import pope, strict_yes_or_no, yes_or_no

GOLDEN = Path(__file__).parents[1] / "golden" / "_metrics"


def test_pope_as_the_official_script():
    golden = json.loads((GOLDEN / "pope.json").read_text())
    said = [yes_or_no(answer) for answer in golden["answers"]]
    assert [int(s) for s in said] == golden["predictions"]
    found = pope(said, golden["labels"])
    expected = {"f1" if name == "f1_score" else name: value for name, value in golden["metrics"].items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found["unknown"] == 0


def test_pope_without_denominators_is_zero():
    assert pope([], []) == dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio", "unknown"), 0.0)
    found = pope([False, False], [False, False])
    assert found["accuracy"] == 1 and found["precision"] == found["recall"] == found["f1"] == 0


def test_the_strict_reader_knows_when_it_does_not_know():
    read = [strict_yes_or_no(a) for a in ("Yes.", "no, never", "YES", "", "maybe yes", "**No**", "not sure", "yesterday")]
    assert read == [True, False, True, None, None, False, None, None]
    # lenient: everything that does not deny is a yes
    assert [yes_or_no(a) for a in ("", "maybe", "I don't", "no", "No way", "nothing")] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_an_unknown_answer_is_wrong_but_no_yes():
    found = pope([True, None, None, False], [True, True, False, False])
    assert found == {
        "accuracy": 0.5,
        "precision": 1,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 0.25,
        "unknown": 0.5,
    }


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "chair.json").read_text())


def test_chair_as_the_official_script(golden):
    vocabulary = Vocabulary(golden["vocabulary"], golden["double_words"])
    captions = [entry["caption"] for entry in golden["captions"]]
    truths = [golden["ground_truth"][str(entry["image_id"])] for entry in golden["captions"]]
    for caption, truth, expected in zip(captions, truths, golden["per_caption"], strict=True):
        said = vocabulary.mentions(caption)
        assert said == expected["generated"], caption
        counts = chair_counts(said, truth)
        assert counts["captions_wrong"] == expected["chair_s"]
        assert counts["mentions_wrong"] == len(expected["hallucinated"])
        if said:
            assert counts["mentions_wrong"] / counts["mentions"] == pytest.approx(expected["chair_i"], abs=1e-9)
    found, overall = chair(captions, truths, vocabulary), golden["overall"]
    names = {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "Recall", "precision": "Precision", "f1": "F1"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(overall[theirs], abs=1e-9), ours
    assert found["length"] / 100 == pytest.approx(overall["Len"], abs=1e-9)


def test_chair_of_nothing_is_zero():
    assert set(chair([], [], Vocabulary({"cat": "cat"})).values()) == {0.0}
    found = chair(["nothing at all"], [[]], Vocabulary({"cat": "cat"}))
    assert found == {"chair_i": 0, "chair_s": 0, "recall": 0, "precision": 0, "f1": 0, "length": 3}


def test_a_vocabulary_from_groups_of_synonyms():
    vocabulary = Vocabulary.of(
        [["person", "man", "woman"], ["hot dog"], ["dog", "puppy"]],
        pairs={"puppy dog": "dog"},
        singular=lambda word: word.removesuffix("s"),
    )
    assert vocabulary.mentions("Two puppy dogs, a man and hot dogs; a Puppy!") == ["dog", "person", "hot dog", "dog"]
    assert vocabulary.mentions("dog") == ["dog"] and vocabulary.mentions("") == []
    assert words_of("A T-shirt, isn't it?") == ["a", "t-shirt", ",", "isn't", "it", "?"]


def test_accuracy_by_kind():
    found = accuracy(["colour", "count", "colour"], [True, False, False])
    assert found == {"accuracy": pytest.approx(1 / 3), "accuracy/colour": 0.5, "accuracy/count": 0}
    assert accuracy([], []) == {"accuracy": 0}
