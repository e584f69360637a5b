"""Question answering over several segments in changing order: a model without position bias gives one answer in all orders."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..likelihood import option_scores
from ..material.facts import KINDS, draw
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class PositionSwap(Suite):
    name: ClassVar[str] = "position-swap"
    kind: ClassVar = "llm"
    does: ClassVar[str] = (
        "Answers from several short documents in every cyclic order: accuracy, and how often all orders agree."
    )
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "consistency", "accuracy_first", "accuracy_last")
    marks: ClassVar[Sequence[str]] = ("segments",)
    batch: ClassVar[int] = 4
    version: ClassVar[int] = 2

    segments: int = Field(3, ge=2, le=8, description="documents in a prompt; one of them answers the question")

    def items(self, count: int, seed: int) -> list[Item]:
        items = []
        for i in range(count):
            rng = random.Random(f"position-swap {seed} {i}")
            kinds = [k for k in KINDS if len(k.words) >= self.segments]
            kind = kinds[i % len(kinds)]
            asked = draw(rng, kind, self.segments, self.segments)
            texts = [" ".join(rng.sample([s, a], 2)) for s, a in zip(asked.sentences, asked.asides)]
            first = list(range(self.segments))
            rng.shuffle(first)
            # every segment stands once at every place
            orders = [first[k:] + first[:k] for k in range(self.segments)]
            data = {"segments": texts, "orders": orders, "question": asked.question, "start": asked.start, "words": asked.words}
            items.append(Item(f"{seed}-{i}", data))
        return items

    def prompt(self, subject: Subject, item: Item, order: Sequence[int]) -> str:
        # one line break on either side of every document, which tokenizers may not melt with a second one, so that all can change places
        documents = "\n".join(f"- {item.data['segments'][k]}" for k in order)
        return subject.chat(f"Read these notes.\n{documents}\n{item.data['question']}", answer=item.data["start"])

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        rows = [(item, order) for item in items for order in item.data["orders"]]
        scores = option_scores(
            subject,
            [self.prompt(subject, item, order) for item, order in rows],
            [[f" {word}" for word in item.data["words"]] for item, _ in rows],
            segments=[[item.data["segments"][k] for k in order] for item, order in rows],
        )
        logprobs = iter([[round(s.logprob, 5) for s in row] for row in scores])
        records = []
        for item in items:
            rows = [next(logprobs) for _ in item.data["orders"]]
            words = item.data["words"]
            records.append({
                "question": item.data["question"], "wanted": words[0], "words": words, "logprobs": rows,
                "chosen": [_best(words, row) for row in rows],
                # what asking in all orders and taking the mean gives, the plain way to have one answer
                "averaged": _best(words, [sum(column) / len(rows) for column in zip(*rows)]),
                "place": [order.index(0) for order in item.data["orders"]],
            })  # fmt: skip
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        right = [word == record["wanted"] for word in record["chosen"]]
        by_place = dict(zip(record["place"], right))
        averaged = record["averaged"] == record["wanted"]
        return {
            "items": 1, "averaged": averaged, "averaged in all": averaged * len(right), "asked": len(right),
            "right": sum(right), "consistent": len(set(record["chosen"])) == 1, "robust": all(right),
            **{f"right {place}": right for place, right in by_place.items()},
        }  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        last = self.segments - 1
        places = {"first": 0, **{f"place_{k + 1}": k for k in range(1, last)}, "last": last}
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            "consistency": ratio(sums["consistent"], sums["items"]),
            "all_right": ratio(sums["robust"], sums["items"]),
            "accuracy_averaged": ratio(sums["averaged"], sums["items"]),
            **{f"accuracy_{name}": ratio(sums[f"right {k}"], sums["items"]) for name, k in places.items()},
        }

    def chance(self) -> dict[str, float]:
        places = ("first", *(f"place_{k + 1}" for k in range(1, self.segments - 1)), "last", "averaged")
        guess = 1 / self.segments
        # guesses that know nothing of each other agree in all orders only by accident
        return {
            "accuracy": guess, **{f"accuracy_{name}": guess for name in places}, "consistency": guess ** (self.segments - 1),
            "all_right": guess**self.segments,
        }  # fmt: skip


def _best(words: Sequence[str], values: Sequence[float]) -> str:
    return words[max(range(len(words)), key=lambda i: values[i])]
