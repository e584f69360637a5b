"""Questions about scenes of shapes, one of each kind per scene: presence, colour, number, and where one shape lies from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...zoo.worlds.language import KINDS, NUMBERS, SIDES, ask
from ...zoo.worlds.shapes import COLOURS
from ..metrics.accuracy import accuracy_counts, accuracy_metrics
from ..metrics.chair import words_of
from ..metrics.sums import Sums
from ..subject import Subject
from .base import Item
from .shapes_world import ShapesSuite

ANSWERS = {"presence": ("yes", "no"), "colour": tuple(COLOURS), "count": NUMBERS, "side": SIDES}
DIGITS = {str(value): name for value, name in enumerate(NUMBERS)}


class Questions(ShapesSuite):
    name = "questions"
    does = "Questions about shapes: accuracy of presence, colour, number and side."
    shown = ("accuracy", *(f"accuracy/{kind}" for kind in sorted(KINDS)))

    def items(self, count: int, seed: int) -> list[Item]:
        found = []
        for number in range(count):
            scene = self.scene(seed, number)
            rng = np.random.default_rng([seed, number, 2])
            for kind in KINDS:
                question = ask(kind, scene, rng)
                # a scene of one shape has no sides
                if question.kind == kind:
                    data = {"scene": [seed, number], "kind": kind, "question": question.text, "truth": question.answer}
                    found.append(Item(f"{seed}-{number}-{kind}", data, f"{seed}-{number}"))
        return found

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [subject.chat(item.data["question"], picture=True) for item in items]
        said = subject.generate(prompts, [self.picture(item) for item in items], 8)
        return [
            {name: item.data[name] for name in ("kind", "question", "truth")} | {"answer": text}
            for text, item in zip(said, items)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return accuracy_counts(record["kind"], given(record["kind"], record["answer"]) == record["truth"])

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return accuracy_metrics(sums)


def given(kind: str, answer: str) -> str | None:
    """The first word of an answer that could answer a question of this kind, digits as words; None if there is none."""
    words = (DIGITS.get(word, word) for word in words_of(answer))
    return next((word for word in words if word in ANSWERS[kind]), None)
