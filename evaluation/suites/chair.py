"""CHAIR over the world of shapes: which shapes a description mentions that are not there.

Colours and numbers are not judged. Recall and length belong to the two rates: who says less hallucinates less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from ...zoo.worlds.language import DESCRIBE
from ...zoo.worlds.shapes import SHAPES
from ..metrics.chair import Vocabulary, chair_counts, chair_metrics
from ..metrics.sums import Sums
from ..subject import Subject
from .base import Item
from .shapes_world import CrowdSuite

VOCABULARY = Vocabulary.of([[shape, f"{shape}es" if shape.endswith("s") else f"{shape}s"] for shape in SHAPES])
LONGEST = 48  # tokens of a description


class Chair(CrowdSuite):
    name = "chair"
    does = "Descriptions of scenes: shapes that are mentioned but not there (CHAIR), and how many of those there are mentioned."
    shown = ("chair_i", "chair_s", "recall", "f1", "length")
    lower = ("chair_i", "chair_s")
    neutral = ("length",)

    tokens: int = Field(LONGEST, ge=1, description="longest description, in tokens")
    prompt: str = Field(DESCRIBE, min_length=1, description="what is asked")

    def items(self, count: int, seed: int) -> list[Item]:
        found = []
        for number in range(count):
            data = {"scene": [seed, number], "truth": sorted(self.scene(seed, number).kinds)}
            found.append(Item(f"{seed}-{number}", data))
        return found

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [subject.chat(self.prompt, picture=True)] * len(items)
        said = subject.generate(prompts, [self.picture(item) for item in items], self.tokens)
        return [{"caption": text, "truth": item.data["truth"]} for text, item in zip(said, items)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        caption = record["caption"]
        return chair_counts(VOCABULARY.mentions(caption), record["truth"], len(VOCABULARY.words(caption)))

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return chair_metrics(sums)
