"""AMBER (Wang et al. 2023, arXiv 2311.07397): hallucination of a description beyond its objects' presence, and of yes-or-no answers.

The nouns of a response come from the caller (tagged, brought to dictionary form, those of the benchmark's vocabulary only), as do the
tables. Numbers are fractions; the benchmark prints them as percentages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .sums import Sums, ratio

Similar = Callable[[str, str], bool]


def amber_counts(
    nouns: Sequence[str],
    truth: Collection[str],
    likely: Collection[str],
    associations: Mapping[str, Collection[str]] | None = None,
    safe: Collection[str] = (),
    similar: Similar | None = None,
) -> dict[str, float]:
    """What one description adds. truth: what the picture shows; likely: what models tend to invent for it; safe: nouns that never count.

    associations: object -> nouns that mean it as well. similar: whether two nouns mean the same (the benchmark: word vectors over 0.8).
    """

    def means(noun: str, thing: str) -> bool:
        near = similar is not None and any(similar(noun, word) for word in (thing, *(associations or {}).get(thing, ())))
        return noun == thing or noun in (associations or {}).get(thing, ()) or near

    wrong = [noun for noun in nouns if noun not in safe and not any(means(noun, thing) for thing in truth)]
    return {
        "responses": 1,
        "responses_wrong": float(bool(wrong)),
        "nouns": len(nouns),
        "nouns_wrong": len(wrong),
        "truths": len(truth),
        "truths_covered": sum(any(means(noun, thing) for noun in nouns) for thing in truth),
        "likely": len(likely),
        "likely_said": sum(any(noun == t or noun in (associations or {}).get(t, ()) for noun in nouns) for t in likely),
    }


def amber_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """chair, cover, hal and cog from summed `amber_counts`; a zero denominator gives 0. cog is divided by the likely inventions."""
    return {
        "chair": ratio(sums["nouns_wrong"], sums["nouns"]),
        "cover": ratio(sums["truths_covered"], sums["truths"]),
        "hal": ratio(sums["responses_wrong"], sums["responses"]),
        "cog": ratio(sums["likely_said"], sums["likely"]),
    }


def amber_answers(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """accuracy, precision, recall and f1 of yes-or-no answers; the positive class is "No" and only "Yes" and "No" count, to the letter.

    Precision and recall are rounded to three places before f1 is taken from them, and f1's denominator has 0.0001 added, as the
    benchmark does. Call it per dimension (existence, attribute, relation) for the benchmark's parts.
    """
    sums = Sums.of(
        {"asked": 1, "right": said == truth, "said_no": said == "No", "no": truth == "No", "right_no": said == truth == "No"}
        for said, truth in zip(answers, truths, strict=True)
    )
    precision = round(float(ratio(sums["right_no"], sums["said_no"])), 3)
    recall = round(float(ratio(sums["right_no"], sums["no"])), 3)
    f1 = 2 * precision * recall / (precision + recall + 1e-4)
    return {"accuracy": float(ratio(sums["right"], sums["asked"])), "precision": precision, "recall": recall, "f1": f1}


def amber_score(chair: float, f1: float) -> float:
    """The benchmark's one number, from the rate of wrong nouns and the f1 of the answers."""
    return ((1 - chair) + f1) / 2
