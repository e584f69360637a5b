"""Sentiment classification: which of two labels a model finds likelier after a sentence with an opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...interventions import ReattendError
from ..likelihood import option_scores
from ..material import opinions
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

LABELS = ("negative", "positive")


class Sentiment(Suite):
    name: ClassVar[str] = "sentiment"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Tells positive from negative opinions, half of them each: accuracy by the likelihood of the labels."
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_written", "said_positive")
    neutral: ClassVar[Sequence[str]] = ("said_positive",)

    def items(self, count: int, seed: int) -> list[Item]:
        pool = opinions.pool(seed)
        if count > len(pool):
            raise ReattendError(f"suite 'sentiment' has {len(pool)} sentences, {count} were asked for")
        return [
            Item(f"{seed}-{i}", {"text": o.text, "positive": o.positive, "written": o.written})
            for i, o in enumerate(pool[:count])
        ]

    def prompt(self, item: Item) -> str:
        return f"Review: {item.data['text']}\nThe sentiment of this review (positive or negative) is:"

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        scores = option_scores(subject, [self.prompt(item) for item in items], [[f" {label}" for label in LABELS]] * len(items))
        return [{**item.data, "logprobs": [round(s.logprob, 5) for s in row]} for item, row in zip(items, scores)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        negative, positive = record["logprobs"]
        said = positive > negative
        right = said == record["positive"]
        part = "written" if record["written"] else "pattern"
        return {"asked": 1, "right": right, "said": said, "lead": (positive - negative) * (1 if record["positive"] else -1),
                f"asked {part}": 1, f"right {part}": right}  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            "accuracy_written": ratio(sums["right written"], sums["asked written"]),
            "accuracy_pattern": ratio(sums["right pattern"], sums["asked pattern"]),
            "said_positive": ratio(sums["said"], sums["asked"]),
            "lead": ratio(sums["lead"], sums["asked"]),
        }
