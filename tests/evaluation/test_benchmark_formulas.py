"""Formulas of AMBER, MME and HallusionBench on cases worked out by hand."""

from __future__ import annotations

import pytest
from reattend.evaluation.metrics.amber import amber_answers, amber_counts, amber_metrics, amber_score
from reattend.evaluation.metrics.groups import all_right, hallusion, mme
from reattend.evaluation.metrics.sums import Sums


def test_amber_of_two_descriptions():
    tables = {"associations": {"dog": ["puppy"], "tree": ["forest"]}, "safe": ["picture"]}
    one = amber_counts(["puppy", "picture", "cat", "cat"], ["dog", "grass"], ["cat", "ball"], **tables)
    two = amber_counts(["grass"], ["grass"], ["tree"], **tables)
    assert one["nouns_wrong"] == 2 and one["truths_covered"] == 1 and one["likely_said"] == 1
    found = {name: float(value) for name, value in amber_metrics(Sums.of([one, two])).items()}
    assert found == {"chair": 2 / 5, "cover": 2 / 3, "hal": 1 / 2, "cog": 1 / 3}
    assert {float(value) for value in amber_metrics(Sums()).values()} == {0}
    near = amber_counts(["hound"], ["dog"], [], similar=lambda a, b: {a, b} == {"hound", "dog"})
    assert near["nouns_wrong"] == 0 and near["truths_covered"] == 1


def test_amber_answers_count_no_as_positive():
    said = ["No", "No", "No", "Yes", "no", "Yes"]
    truth = ["No", "No", "Yes", "Yes", "No", "No"]
    found = amber_answers(said, truth)
    assert found["accuracy"] == 0.5 and found["precision"] == 0.667 and found["recall"] == 0.5
    assert found["f1"] == pytest.approx(2 * 0.667 * 0.5 / (0.667 + 0.5 + 1e-4), abs=1e-12)
    assert amber_answers([], []) == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert amber_score(0.1, 0.7) == pytest.approx(0.8)


def test_mme_adds_two_accuracies():
    found = mme(["count"] * 4 + ["color"] * 2, ["a", "a", "b", "b", "a", "a"], [True, True, True, False, True, True])
    assert found["count"] == {"accuracy": 0.75, "accuracy_plus": 0.5, "score": 125}
    assert found["color"]["score"] == 200 and found["total"] == {"score": 325}
    assert mme([], [], []) == {"total": {"score": 0}}


def test_hallusion_by_figure_and_by_question():
    found = hallusion(["f1", "f2", "f1", None], ["q1", "q1", "q2", "q2"], [True, False, True, True])
    assert found == {"accuracy": 0.75, "figure_accuracy": 0.5, "question_accuracy": 0.5}
    assert all_right([], []) == 0
