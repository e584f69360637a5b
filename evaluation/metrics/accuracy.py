"""Accuracy, of all questions and by kind of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sums import Sums, ratio

ASKED, RIGHT = "asked", "right"


def accuracy_counts(kind: str, right: bool) -> dict[str, float]:
    """What one answer adds."""
    return {ASKED: 1, RIGHT: float(right), f"{ASKED}/{kind}": 1, f"{RIGHT}/{kind}": float(right)}


def accuracy_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """accuracy, and accuracy/KIND for every kind that occurs; a zero denominator gives 0."""
    kinds = sorted(name.removeprefix(f"{ASKED}/") for name in sums if name.startswith(f"{ASKED}/"))
    by_kind = {f"accuracy/{kind}": ratio(sums[f"{RIGHT}/{kind}"], sums[f"{ASKED}/{kind}"]) for kind in kinds}
    return {"accuracy": ratio(sums[RIGHT], sums[ASKED]), **by_kind}


def accuracy(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Accuracy of answers. kinds, right: one per question."""
    counts = (accuracy_counts(kind, bool(is_right)) for kind, is_right in zip(kinds, right, strict=True))
    return {name: float(value) for name, value in accuracy_metrics(Sums.of(counts)).items()}
