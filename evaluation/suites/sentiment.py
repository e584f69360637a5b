"""Sentiment classification: which of two labels a model finds likelier after a sentence with an opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...interventions import ReattendError
from ..likelihood import option_scores
from ..material import opinions
from ..metrics.auc import auc_counts, auc_metric
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

LABELS = ("negative", "positive")
# a review that says nothing: what a model answers to it is its leaning (Zhao et al. 2021, arXiv 2102.09690)
EMPTY = "N/A"


class Sentiment(Suite):
    name: ClassVar[str] = "sentiment"
    kind: ClassVar = "llm"
    version: ClassVar[int] = 2
    does: ClassVar[str] = (
        "Tells positive from negative opinions, half of them each: accuracy by the likelihood of the labels, accuracy_calibrated less "
        "what they have after an empty review, and auc, which no threshold moves."
    )
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_calibrated", "auc", "said_positive")
    neutral: ClassVar[Sequence[str]] = ("said_positive",)

    def items(self, count: int, seed: int) -> list[Item]:
        pool = opinions.pool(seed)
        if count > len(pool):
            raise ReattendError(f"suite 'sentiment' has {len(pool)} sentences, {count} were asked for")
        return [
            Item(f"{seed}-{i}", {"text": o.text, "positive": o.positive, "written": o.written})
            for i, o in enumerate(pool[:count])
        ]

    def prompt(self, text: str) -> str:
        return f"Review: {text}\nThe sentiment of this review (positive or negative) is:"

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [self.prompt(text) for text in (*(item.data["text"] for item in items), EMPTY)]
        rows = [
            [round(s.logprob, 5) for s in row]
            for row in option_scores(subject, prompts, [[f" {label}" for label in LABELS]] * len(prompts))
        ]
        return [{**item.data, "logprobs": row, "empty": rows[-1]} for item, row in zip(items, rows)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        negative, positive = record["logprobs"]
        said = positive > negative
        right = said == record["positive"]
        part = "written" if record["written"] else "pattern"
        leaning = record["empty"][1] - record["empty"][0]
        return {"asked": 1, "right": right, "said": said, "lead": (positive - negative) * (1 if record["positive"] else -1),
                "calibrated": (positive - negative > leaning) == record["positive"],
                f"asked {part}": 1, f"right {part}": right, **auc_counts(positive - negative, record["positive"])}  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            "accuracy_calibrated": ratio(sums["calibrated"], sums["asked"]),
            "auc": auc_metric(sums),
            "accuracy_written": ratio(sums["right written"], sums["asked written"]),
            "accuracy_pattern": ratio(sums["right pattern"], sums["asked pattern"]),
            "said_positive": ratio(sums["said"], sums["asked"]),
            "lead": ratio(sums["lead"], sums["asked"]),
        }

    def chance(self) -> dict[str, float]:
        return {"accuracy": 0.5, "accuracy_calibrated": 0.5, "accuracy_written": 0.5, "accuracy_pattern": 0.5, "auc": 0.5}
