"""POPE (Li et al. 2023, arXiv 2305.10355): yes-or-no questions about the presence of objects; the positive class is "yes".

Three ways of choosing the absent objects that are asked for make three splits: random, popular (those most often seen), adversarial
(those that most often come with what is present).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .sums import Sums, ratio

NEGATIVE = {"No", "not", "no", "NO"}


def yes_or_no(answer: str) -> bool:
    """True for yes, as the scripts in use read answers: no if any word is a negation, yes otherwise - also for an empty answer."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    return not any(word in NEGATIVE or word.endswith("n't") for word in words)


def strict_yes_or_no(answer: str) -> bool | None:
    """True or False if the answer's first word is yes or no in any case, else None: the question was not answered."""
    words = re.findall(r"[^\W_]+", answer.lower())
    return {"yes": True, "no": False}.get(words[0]) if words else None


def pope_counts(said: bool | None, truth: bool) -> dict[str, float]:
    """What one answer adds. An unknown answer (None) is wrong; it counts as neither a yes nor a no."""
    return {
        "asked": 1,
        "positive": float(truth),
        "tp": float(said is True and truth),
        "fp": float(said is True and not truth),
        "tn": float(said is False and not truth),
        "unknown": float(said is None),
    }


def pope_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """accuracy, precision, recall, f1, yes_ratio, unknown (share) from summed `pope_counts`; a zero denominator gives 0."""
    tp, yes = sums["tp"], sums["tp"] + sums["fp"]
    precision, recall = ratio(tp, yes), ratio(tp, sums["positive"])
    return {
        "accuracy": ratio(tp + sums["tn"], sums["asked"]),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(yes, sums["asked"]),
        "unknown": ratio(sums["unknown"], sums["asked"]),
    }


def pope(said: Sequence[bool | int | None], truth: Sequence[bool | int]) -> dict[str, float]:
    """Metrics of parsed answers against the truth. said, truth: one per question, True or 1 for yes, None where unknown."""
    counts = (pope_counts(None if s is None else bool(s), bool(t)) for s, t in zip(said, truth, strict=True))
    return {name: float(value) for name, value in pope_metrics(Sums.of(counts)).items()}
