"""The task that all prompt highlighters share: two facts contradict each other, and one of them is marked.

Every pair of facts is asked twice, once with each of the two marked; an untouched model prefers the marked one half of the time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..likelihood import option_scores
from ..material.facts import KINDS, draw
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class Highlight(Suite):
    name: ClassVar[str] = "highlight"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Two contradicting facts, one of them marked: how often the answer follows the marked one."
    shown: ClassVar[Sequence[str] | None] = ("followed", "on_top", "lead")
    marks: ClassVar[Sequence[str]] = ("highlight",)

    prompt_form: Literal["chat", "plain"] = Field(
        "chat", description="in the model's chat template where it has one, or as plain text"
    )

    def items(self, count: int, seed: int) -> list[Item]:
        """Two items for each of `count` pairs of facts, in one group."""
        items = []
        for i in range(count):
            asked = draw(random.Random(f"highlight {seed} {i}"), KINDS[i % len(KINDS)], 1, 2)
            for marked in (0, 1):
                data = {
                    "facts": asked.sentences, "question": asked.question, "start": asked.start, "words": asked.words, "marked": marked
                }  # fmt: skip
                items.append(Item(f"{seed}-{i}-{marked}", data, group=f"{seed}-{i}"))
        return items

    def prompt(self, subject: Subject, item: Item) -> str:
        first, second = item.data["facts"]
        if self.prompt_form == "chat":
            return subject.chat(f"{first} {second}\n{item.data['question']}", answer=item.data["start"])
        return f"{first} {second}\nQuestion: {item.data['question']} Answer: {item.data['start']}"

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        scores = option_scores(
            subject,
            [self.prompt(subject, item) for item in items],
            [[f" {word}" for word in item.data["words"]] for item in items],
            highlight=[[item.data["facts"][item.data["marked"]]] for item in items],
        )
        return [
            {
                "question": item.data["question"], "words": item.data["words"], "marked": item.data["marked"],
                "logprobs": [round(s.logprob, 5) for s in row], "top": [s.top for s in row],
            }
            for item, row in zip(items, scores)
        ]  # fmt: skip

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        marked = record["marked"]
        mine, other = record["logprobs"][marked], record["logprobs"][1 - marked]
        place = ("first", "second")[marked]
        return {
            "asked": 1, "followed": mine > other, "top": record["top"][marked], "logprob": mine, "lead": mine - other,
            f"asked {place}": 1, f"followed {place}": mine > other,
        }  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "followed": ratio(sums["followed"], sums["asked"]),
            "on_top": ratio(sums["top"], sums["asked"]),
            "lead": ratio(sums["lead"], sums["asked"]),
            "logprob": ratio(sums["logprob"], sums["asked"]),
            "followed_first": ratio(sums["followed first"], sums["asked first"]),
            "followed_second": ratio(sums["followed second"], sums["asked second"]),
        }
